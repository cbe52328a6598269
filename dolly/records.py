"""Records: what they are, reading them from a file or the Hub, and the fixed split into training and validation.

A record is a conversation that ends with an answer, or a plain text. It is read from any of these columns:

    instruction, context, response, category     databricks-dolly-15k, and this project
    instruction, input, output                   Alpaca
    prompt (or question), completion (or answer)
    messages: [{"role", "content"}]              or ShareGPT's conversations: [{"from", "value"}]
    text                                         a plain text, where nothing stands in the columns above

A .txt file is one plain text.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dolly.errors import UserError
from dolly.prompt import Message, user_text
from dolly.similar import Sketches, groups

SUFFIXES, PACKED = (".jsonl", ".json", ".csv", ".parquet", ".txt"), (".gz", ".zip", ".xz", ".bz2", ".zst")
INSTRUCTION, CONTEXT = ("instruction", "prompt", "question"), ("context", "input")
RESPONSE, MESSAGES = ("response", "output", "completion", "answer"), ("messages", "conversations")
FEW = 10  # near-duplicates, in a small file
KNOWN = {*INSTRUCTION, *CONTEXT, *RESPONSE, *MESSAGES, "text", "category"}
BLANK = "\u200b\u200c\u200d\u2060\ufeff"  # characters without any width, which `str.strip` leaves
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Record:
    """`messages` alternate user and assistant turns after an optional system turn and end with the assistant's.

    A plain text is in `text`, and has no messages.
    """

    messages: list[Message]
    category: str
    line: int  # of the file, from 1; for Parquet, JSON lists and Hub data sets the row
    text: str | None = None


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used, and why."""

    line: int
    what: str


def whole_text(record: Record) -> str:
    return record.text or "\n".join(message["content"] for message in record.messages)


def first_prompt(record: Record) -> str:
    """The first user turn, or the text."""
    return record.text or next(message["content"] for message in record.messages if message["role"] == "user")


def read_records(source: str) -> tuple[list[Record], list[Problem]]:
    """All records of a file or Hub data set; together with the problems they account for every line but blank ones.

    Raises `UserError` when the source does not exist, is of an unknown kind, cannot be read or holds nothing.
    """
    records, problems = [], []
    for item in iterate(source):
        (problems if isinstance(item, Problem) else records).append(item)
    if not records and not problems:
        raise empty(source)
    return records, problems


def iterate(source: str) -> Iterator[Record | Problem]:
    """What `read_records` reads, one by one, without holding a whole JSONL, CSV or Parquet file in memory."""
    try:
        for line, row in _rows(source):
            try:
                yield row if isinstance(row, Problem) else _record(row, line)
            except ValueError as error:
                yield Problem(line, str(error))
    except OSError as error:  # pyarrow's for a damaged page has no strerror
        raise UserError(f"{source} cannot be read ({error.strerror or error}).") from None


def empty(source: str) -> UserError:
    return UserError(f"{source} is empty. Put at least one record in it, for example\n  {EXAMPLE}")


EXAMPLE = '{"instruction": "Name a fruit.", "context": "", "response": "The apple.", "category": "open_qa"}'


def split(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Training and validation records. A record is held out when the hash of its first user turn (or of its text)
    falls in the lowest `fraction`, so the split neither depends on the order nor changes for old records when new ones
    are added. Records with the same question, and near-duplicates in the question or as a whole, are a group that stays
    on one side, that of the member with the lowest second hash. A small file still gives a validation record when it
    has two groups.
    """
    if fraction == 0 or not records:
        return records, []
    places = _places(records)
    bound = max(fraction, min(places))
    training = [record for record, place in zip(records, places, strict=True) if place > bound]
    return (training, [r for r, p in zip(records, places, strict=True) if p <= bound]) if training else (records, [])


def unlike(records: list[Record], heldout: list[Record]) -> list[Record]:
    """The records that neither ask the question of a held-out one nor are a near-duplicate of one."""
    asked, near = {question(record)[1] for record in heldout}, set()
    for text_of in (whole_text, first_prompt):
        sketches = Sketches()
        sketches.add((text_of(record),) for record in heldout + records)
        near |= {b - len(heldout) for a, b in sketches.pairs().tolist() if a < len(heldout) <= b}
    return [record for at, record in enumerate(records) if at not in near and question(record)[1] not in asked]


def spread(items: list, count: int) -> list:
    """At most `count` of the items, from all over the list."""
    return [items[len(items) * i // count] for i in range(count)] if len(items) > count else items


def explain(problems: list[Problem], source: str, total: int, remedy: str) -> str:
    """One paragraph that names the first lines of each kind of problem."""
    lines: dict[str, list[int]] = {}
    for problem in problems:
        lines.setdefault(problem.what, []).append(problem.line)
    kinds = [
        f"  {'lines' if len(where) > 1 else 'line'} {_some(where)}: {what}" for what, where in list(lines.items())[:8]
    ]
    if len(lines) > 8:
        kinds.append(f"  and {len(lines) - 8} more kinds")
    return "\n".join([f"{source}: {len(problems)} of {total} records cannot be used.", *kinds, remedy])


def _some(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5]))
    return shown if len(lines) <= 5 else f"{shown} and {len(lines) - 5} more"


def _places(records: list[Record]) -> list[float]:
    """A number between 0 and 1 for each record, the same throughout a group of near-duplicates.

    A group of more than a hundredth of all records is a form that many were written in; they are split like others.
    """
    own = [_place(record) for record in records]
    first: dict[tuple[float, float], int] = {}
    pairs = [(first.setdefault(place, at), at) for at, place in enumerate(own)]  # with the same question
    for text_of in (whole_text, first_prompt):
        sketches = Sketches()
        sketches.add((text_of(record),) for record in records)
        pairs += sketches.pairs().tolist()
    roots = groups(len(records), pairs)
    size = Counter(roots)
    lowest: dict[int, tuple[float, float]] = {}
    for at, place in enumerate(own):
        if size[roots[at]] > max(FEW, len(records) / 100):
            roots[at] = first[place]
        lowest[roots[at]] = min(place, lowest.get(roots[at], place))
    return [lowest[root][1] for root in roots]


def question(record: Record) -> tuple[str, str]:
    """The system turn, and the first user turn (or the text) in lower case without punctuation."""
    system = record.messages[0]["content"] if record.messages and record.messages[0]["role"] == "system" else ""
    return system, re.sub(r"\W+", " ", first_prompt(record).casefold()).strip(" ")


def _place(record: Record) -> tuple[float, float]:
    """Two numbers between 0 and 1 that any change of a letter or digit of the question changes."""
    digest = hashlib.sha256(question(record)[1].encode()).digest()
    return int.from_bytes(digest[8:16]) / 2**64, int.from_bytes(digest[:8]) / 2**64


def _rows(source: str) -> Iterator[tuple[int, dict | Problem]]:
    if not source:
        raise UserError("The name of the data is empty. Give a file, or the id of a data set on the Hub.")
    path, suffix = Path(source), Path(source).suffix.lower()
    if path.is_file() and suffix in SUFFIXES:
        return {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}[suffix](path)
    if path.is_file() and suffix in PACKED:
        raise UserError(f"{source} is packed: unpack it first.")
    if path.exists():
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
        raise UserError(f"{source} is {kind}; Dolly reads {', '.join(SUFFIXES)} files and Hub data set ids.")
    if suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"There is no file {source}. Check the path (it is taken from {Path.cwd()}).")
    return _hub(source)


def _jsonl(path: Path) -> Iterator[tuple[int, dict | Problem]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parsed(line, number)


def _parsed(line: bytes, number: int) -> dict | Problem:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Problem(number, f"not UTF-8 text (byte {error.object[error.start]:#04x}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Problem(number, f"not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Problem(number, f"not valid JSON ({error})")
    return row if isinstance(row, dict) else Problem(number, 'not a JSON object ({"instruction": ..., ...})')


def _json(path: Path) -> Iterator[tuple[int, dict | Problem]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). One record a line? Then name it .jsonl.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of records: write [{{...}}, {{...}}], or one record a line (.jsonl).")
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else Problem(number, "not a JSON object")


def _csv(path: Path) -> Iterator[tuple[int, dict | Problem]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        try:
            for row in rows:
                texts = (
                    text for value in row.values() for text in (value if isinstance(value, list) else [value or ""])
                )
                line = rows.line_num - sum(text.count("\n") for text in texts)  # where the row begins
                more = Problem(line, "more fields than columns (a comma inside a text needs quotes around the text)")
                yield line, more if None in row else row
        except csv.Error as error:
            where = f"{path}, line {rows.line_num + 1}"  # where the broken row begins
            raise UserError(f"{where}: not valid CSV ({error}). Export it again, or use JSONL.") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}). Export it again as UTF-8.") from None


def _txt(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it again as UTF-8.") from None
    if text.strip():
        yield 1, {"text": text}


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Only the columns of records are read: others may be large, or of types that Python has no value for."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            others = dict.fromkeys(name for name in table.schema_arrow.names if name not in KNOWN)
            chosen = [name for name in table.schema_arrow.names if name in KNOWN]
            batches = table.iter_batches(1024, columns=chosen)
            rows = (row | others for batch in batches for row in batch.to_pylist())
            if not chosen:
                rows = (dict(others) for _ in range(table.metadata.num_rows))
            yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read ({error}).") from None


def _hub(name: str) -> Iterator[tuple[int, dict]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"There is no file {name}, and no such data set on the Hub can be read ({error}).") from None
    yield from enumerate(rows, 1)


def _record(row: dict, line: int) -> Record:
    """The record in a row; `ValueError` says what is wrong with it."""
    category = _text(row.get("category"), "category")
    if "text" in row and not any(row.get(name) for name in MESSAGES + INSTRUCTION + RESPONSE):
        return Record([], category, line, _filled(row["text"], "text"))
    return Record(_messages(row), category, line)


def _messages(row: dict) -> list[Message]:
    """The conversation in a row; `ValueError` says what is wrong with it."""
    if key := _present(row, MESSAGES):
        return _conversation(row[key], key)
    instruction, response = _present(row, INSTRUCTION), _present(row, RESPONSE)
    if instruction is None or response is None:
        found = ", ".join(map(str, row)).encode(errors="backslashreplace").decode() or "none"
        missing = "instruction" if instruction is None else "response"
        hint = "; separate the columns by commas" if re.search("[;\t]", found) else ""
        raise ValueError(f"no column for the {missing} (columns: {found}){hint}")
    context = _present(row, CONTEXT)
    note = _text(row[context], context) if context else ""
    return [
        {"role": "user", "content": user_text(_filled(row[instruction], instruction), note)},
        {"role": "assistant", "content": _filled(row[response], response).strip()},
    ]


def _conversation(turns, key: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'"{key}" is not a list of turns')
    messages = []
    for number, turn in enumerate(turns, 1):
        role = _text(turn.get("role", turn.get("from")), f"role of turn {number}")
        name = f"content of turn {number}"
        content = _filled(_joined(turn.get("content", turn.get("value")), name), name)
        messages.append({"role": ROLES.get(role, role), "content": content.strip()})
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f'the turns of "{key}" do not alternate user, assistant and end with assistant')
    return messages


def _joined(content, name: str):
    """A content given as parts, [{"type": "text", "text": ...}], as one; any other as it is."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError(f'"{name}" has a part that is not text')
    return "".join(_text(part.get("text"), name) for part in content)


def _filled(value, name: str) -> str:
    text = _text(value, name)
    if all(character.isspace() or character in BLANK for character in text):
        raise ValueError(f'"{name}" is empty')
    return text


def _text(value, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is not text')
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f'"{name}" holds half a character (a lone surrogate)')
    return value


def _present(row: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)
