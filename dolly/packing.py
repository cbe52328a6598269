"""Packed rows: documents of many lengths put side by side into rows of one fixed length.

A padded batch of instruction records is half padding; best-fit decreasing over the whole data set leaves about 1 %.
Each document in a row counts its positions from 0, by which attention keeps it apart from its neighbours.
"""

import bisect
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from dolly.prompt import encode
from dolly.records import Problem, Record

IGNORED = -100  # the label of a token that is not learned, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Document:
    """The ids of one record and, for each, whether it is learned (an answer or its end) or only read."""

    ids: list[int]
    learned: list[bool]
    category: str = ""

    def answer_tokens(self) -> int:
        return sum(self.learned[1:])


def tokenize(
    records: list[Record], tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[list[Document], list[Problem]]:
    """The documents of the records, and a problem for each that is longer than `length` tokens: none is cut."""
    documents, problems = [], []
    for record in records:
        document = Document(*encode(tokenizer, record.messages), record.category)
        if len(document.ids) <= length:
            documents.append(document)
        else:
            problems.append(Problem(record.line, f"longer than {length} tokens"))
    return documents, problems


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

    input_ids, position_ids: [rows, length]; keep: [rows, length], true where the next token is learned;
    targets: [learned tokens], those next tokens in row order; documents: [learned tokens], whose they are.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def collate(rows: list[list[int]], documents: list[Document], length: int, pad_id: int) -> Batch:
    """Rows of document indices as one `Batch`. Padding is a document of its own at the end of a row."""
    input_ids = torch.full((len(rows), length), pad_id)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    owners = torch.zeros((len(rows), length), dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            document = documents[index]
            ids = torch.tensor(document.ids)
            end = start + len(ids)
            learned = torch.tensor(document.learned)
            learned[0] = False  # nothing before it inside the document predicts it
            input_ids[number, start:end] = ids
            position_ids[number, start:end] = torch.arange(len(ids))
            labels[number, start:end] = torch.where(learned, ids, IGNORED)
            owners[number, start:end] = index
            start = end
        position_ids[number, start:] = torch.arange(length - start)
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORED
    return Batch(input_ids, position_ids, keep, labels[:, 1:][keep[:, :-1]], owners[:, 1:][keep[:, :-1]])
