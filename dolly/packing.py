"""Packed rows: documents of many lengths put side by side into rows of one fixed length.

A padded batch of instruction records is half padding; best-fit decreasing over the whole data set leaves about 1 %.
Each document in a row counts its positions from 0, by which attention keeps it apart from its neighbours.
"""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dolly.prompt import as_texts, bos_token, encode_all
from dolly.records import Problem, Record

IGNORED = -100  # the label of a token that is not learned, as in torch.nn.functional.cross_entropy
PART = 100_000  # characters of a long text that are tokenised apart, to spare memory and to use all cores
BORDER = re.compile(r"\b \b")  # tokenizers join nothing across it; those that begin every text with a space add one


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """The ids of a record or of a piece of a text and, for each, whether it is learned or only read.

    ids: int32, learned: bool, both [tokens]; lists will do. line: of the record; the pieces of a text share it.
    """

    ids: np.ndarray | list[int]
    learned: np.ndarray | list[bool]
    category: str = ""
    line: int = 0

    def answer_tokens(self) -> int:
        return int(np.count_nonzero(self.learned[1:]))

    def __reduce__(self):  # arrays are pickled as bytes: 7 times as fast as themselves, and 44 bytes smaller
        ids, learned = np.asarray(self.ids, dtype=np.int32), np.asarray(self.learned, dtype=bool)
        return _unpickled, (ids.tobytes(), learned.tobytes(), self.category, self.line)


def _unpickled(ids: bytes, learned: bytes, *others) -> Document:
    return Document(np.frombuffer(ids, dtype=np.int32), np.frombuffer(learned, dtype=bool), *others)


def tokenize(
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    base: PreTrainedTokenizerBase | None = None,
) -> tuple[list[Document], list[Problem]]:
    """The documents of the records in their order, and a problem for each record that gives none.

    tokenizer: `dolly_tokenizer(base)`, for the conversations; one of more than `length` tokens is a problem, not cut.
    base: the base's own, needed for texts: they are framed as the base has learned them, by its bos where it puts one
    and its end of text. A longer one is cut into pieces of at most `length` tokens. The last token of a piece is the
    first of the next, so that all tokens but the first of the text are learned, each of them once.
    """
    conversations = encode_all(tokenizer, [record.messages for record in records if record.text is None])
    texts = _framed(base, [record.text for record in records if record.text is not None])
    documents, problems = [], []
    for record in records:
        if record.text is None:
            ids, learned = next(conversations)
            pieces = [(ids, learned)] if len(ids) <= length else []
            problem = f"longer than {length} tokens"
        else:
            ids = next(texts)
            starts = range(0, len(ids) - 1, length - 1)
            pieces = [(ids[at : at + length], np.ones(min(length, len(ids) - at), dtype=bool)) for at in starts]
            problem = "too short to learn anything from"
        documents += [Document(*piece, record.category, record.line) for piece in pieces]
        if not pieces:
            problems.append(Problem(record.line, problem))
    return documents, problems


def _framed(base: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[np.ndarray]:
    """The ids of each text between the base's own bos and end of text, where it has them."""
    parts = as_texts(base, (part for text in texts for part in _parts(text)))
    begin = [base.bos_token_id] if bos_token(base) else []
    end = [base.eos_token_id] if base.eos_token is not None else []
    for text in texts:
        ids = [next(parts) for _ in _parts(text)]
        yield np.concatenate([np.array(begin, dtype=np.int32), *ids, np.array(end, dtype=np.int32)])


def _parts(text: str) -> Iterator[str]:
    start = 0
    while border := BORDER.search(text, start + PART):
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, by best-fit decreasing: the longest first, each into the fullest row it fits.

    Raises `ValueError` for a length above `capacity`: a document is never cut.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows
    spaces: list[int] = []  # the keys of open_rows, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(spaces, lengths[index])
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(index)
        if left := space - lengths[index]:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(spaces, left)
            open_rows[left].append(row)
    return rows


@dataclass
class Batch:
    """Packed rows on a device.

    input_ids, position_ids: [rows, length], the positions from 0 in each document, in padding too;
    places: [learned tokens], where in the flattened batch each is predicted, one token before it; ascending;
    targets: [learned tokens], their ids; documents: [learned tokens], whose they are. All are int64.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor

    @property
    def keep(self) -> torch.Tensor:
        """`places` as a mask, [rows, length]: a `logits_to_keep` for separate rows."""
        mask = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.places.device)
        return mask.index_fill_(0, self.places, True).view_as(self.input_ids)

    def flat(self) -> "Batch":
        """The same as one row, [1, rows * length], of which `places` are a `logits_to_keep`.

        For attention that reads documents off the positions; a dense mask would grow by the square of the rows.
        """
        return replace(self, input_ids=self.input_ids.view(1, -1), position_ids=self.position_ids.view(1, -1))

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`. To a GPU it goes from pinned memory, so that nobody waits for it."""
        if device.type == "cuda":
            return Batch(**{name: each.pin_memory().to(device, non_blocking=True) for name, each in vars(self).items()})
        return Batch(**{name: each.to(device) for name, each in vars(self).items()})


def collate(rows: list[list[int]], documents: list[Document], length: int, pad_id: int) -> Batch:
    """Rows of document indices as one `Batch`; a row of none is legal. Padding is a document at the end of a row."""
    padding, unlearned = np.full(length, pad_id, dtype=np.int32), np.zeros(length, dtype=bool)
    pieces = []  # ids, learned, index of the document
    for row in rows:
        pieces += [(documents[index].ids, documents[index].learned, index) for index in row]
        if free := length - sum(len(documents[index].ids) for index in row):
            pieces.append((padding[:free], unlearned[:free], -1))
    ids, marks, owners = zip(*pieces, strict=True)
    lengths = np.array([len(piece) for piece in ids])
    starts = lengths.cumsum() - lengths
    ids, marks = np.concatenate(ids, dtype=np.int64), np.concatenate(marks)
    marks[starts] = False  # nothing before it inside the document predicts it
    learned = marks.nonzero()[0]
    shape = (len(rows), length)
    arrays = (
        ids.reshape(shape),
        (np.arange(len(ids)) - starts.repeat(lengths)).reshape(shape),
        learned - 1,
        ids[learned],
        np.repeat(owners, lengths)[learned],
    )
    return Batch(*map(torch.from_numpy, arrays))
