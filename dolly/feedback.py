"""From the chat back to the data: ratings and corrected answers, which a person reviews, become ordinary records.

A line of a feedback file is one answer that somebody judged:

    {"id": "...", "time": "2026-11-22T10:00:00+00:00", "model": "...", "rating": "good" or "bad" or null,
     "messages": [{"role", "content"}, ... the answer], "correction": "a better answer" or null}

A reviewed line leaves the file; what was accepted stands in the data, with its `source`.
"""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock
from huggingface_hub import CommitScheduler

from dolly.doctor import KINDS
from dolly.errors import UserError
from dolly.faults import faults, printable
from dolly.hub import FAILURES, reason
from dolly.prompt import Message
from dolly.records import Record, whole_text

MOST_TEXT, MOST_FILE = 2**16, 2**26  # characters of a line, bytes of the file: visitors write it
KEYS = "[a]ccept  [e]dit the answer  [d]rop  [s]kip  [q]uit"


@dataclass(frozen=True)
class Feedback:
    messages: list[Message]  # ends with the answer that was judged
    rating: str | None = None  # good or bad
    correction: str | None = None
    model: str = ""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def answer(self) -> str:
        """The answer to learn: the better one, where there is one."""
        return self.correction or self.messages[-1]["content"]


def add(path: Path, feedback: Feedback) -> None:
    """Appends a line; several processes may. Raises `UserError` for what is not worth keeping, or too much."""
    if [m["role"] for m in feedback.messages][-2:] != ["user", "assistant"] or not feedback.answer.strip():
        raise UserError("There is no question with an answer to judge.")
    line = json.dumps(asdict(feedback), ensure_ascii=False)
    if len(line) > MOST_TEXT or (path.exists() and path.stat().st_size > MOST_FILE):
        raise UserError("This conversation is too long to be kept, or too much is kept already.")
    _append(path, line)


def kept_on_hub(dataset: str) -> Path:
    """A file of this process's own, which is added to a private data set every five minutes and at the end.

    A Space keeps no files. Raises `UserError` where the token, HF_TOKEN, may not write there.
    """
    try:
        keeper = CommitScheduler(repo_id=dataset, repo_type="dataset", folder_path="feedback", private=True)
    except FAILURES as error:
        raise UserError(f"{dataset} needs a token that may write there, as HF_TOKEN. {reason(error)}.") from None
    return keeper.folder_path / f"{uuid.uuid4().hex}.jsonl"


def read(path: Path) -> tuple[list[Feedback], list[int]]:
    """What was judged, and the numbers of lines that are no feedback, which stay where they are.

    Of several judgements of one answer the newest counts. Raises `UserError` for a file that cannot be read.
    """
    found: dict[str, Feedback] = {}
    broken = []
    for number, line in enumerate(_lines(path), 1):
        try:
            made = Feedback(**json.loads(line))
            if [m["role"] for m in made.messages][-2:] != ["user", "assistant"] or not made.answer.strip():
                raise ValueError("no question with its answer")
            found[json.dumps(made.messages)] = made
        except (ValueError, TypeError, KeyError, AttributeError):
            broken.append(number)
    return list(found.values()), broken


def _lines(path: Path) -> list[str]:
    """Not `splitlines`, which ends a line at signs that JSON leaves as they are."""
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UserError(f"There is no file {path}. The chat writes it when it is started with --feedback.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def record_of(feedback: Feedback, answer: str, category: str) -> dict:
    """The line of the data: an instruction with its answer, or a conversation, and where it comes from."""
    source = {"feedback": feedback.id, "time": feedback.time, "model": feedback.model, "rating": feedback.rating}
    turns = feedback.messages
    if len(turns) == 2:
        row = {"instruction": turns[0]["content"], "context": "", "response": answer}
    else:
        row = {"messages": [*turns[:-1], {"role": "assistant", "content": answer}]}
    return row | {"category": category, "source": source}


def review(path: Path, data: Path, ask: Callable[[str], str], say: Callable[[str], None]) -> dict[str, int]:
    """Shows one line after another and does what the person says; counts what was accepted, dropped and left.

    A line leaves the feedback only when its record is safely in the data, so a crash between the two shows it again,
    and one that is there already is not added twice. Raises `UserError` for files that cannot be read or written.
    """
    if data.suffix != ".jsonl":
        raise UserError(f"{data}: what is accepted is added to .jsonl files only.")
    pending, broken = read(path)
    if broken:
        say(f"{path}: {len(broken)} lines are no feedback and are left alone (line {broken[0]})")
    there = {_source(line) for line in (_lines(data) if data.exists() else [])}
    counts = {"accepted": 0, "dropped": 0}
    for number, feedback in enumerate(pending, 1):
        if feedback.id in there:
            _remove(path, feedback)
            continue
        rated = f"rated {feedback.rating}" if feedback.rating else "corrected"
        say(f"\n--- {number} of {len(pending)}: {rated}, {feedback.time}, {feedback.model}")
        for message in feedback.messages:
            say(f"{message['role']}: {shown(message['content'])}")
        if feedback.correction:
            say(f"corrected: {shown(feedback.correction)}")
        answer = feedback.answer
        while True:
            for fault in _faults(feedback, answer):
                say(f"note: {fault}")
            if (key := _key(ask)) != "e":
                break
            try:
                answer = edited(answer)
                say(f"answer: {shown(answer)}")
            except UserError as error:
                say(str(error))
        if key == "a":
            try:
                category = ask("category [feedback]: ").strip() or "feedback"
            except EOFError:
                break
            _append(data, json.dumps(record_of(feedback, answer, category), ensure_ascii=False))
        if key == "q":
            break
        if key != "s":
            _remove(path, feedback)
            counts["accepted" if key == "a" else "dropped"] += 1
    return counts | {"left": len(read(path)[0])}


def shown(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return "\n".join(map(printable, text.split("\n")))


def _key(ask: Callable[[str], str]) -> str:
    while True:
        try:
            key = ask(f"{KEYS}: ").strip().lower()[:1]
        except EOFError:
            return "q"
        if key in tuple("aedsq"):
            return key


def _faults(feedback: Feedback, answer: str) -> list[str]:
    record = Record([*feedback.messages[:-1], {"role": "assistant", "content": answer}], "", 0)
    return [f"the record {KINDS[kind].what}: {detail}" for kind, detail in faults(record, whole_text(record))]


def edited(text: str) -> str:
    """The text after the person's editor; raises `UserError` where none is set, and leaves an emptied one as it was."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError("Set EDITOR to the editor of your choice, for example: EDITOR=nano")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answer.txt")
        path.write_text(text + "\n", encoding="utf-8")
        try:
            subprocess.run([*shlex.split(editor, posix=os.name != "nt"), str(path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"The editor {editor} failed ({error}).") from None
        return path.read_text(encoding="utf-8").strip() or text


def _append(path: Path, line: str) -> None:
    """Adds a line at the end, after a line end where the last line lacks one, and waits until it is on the disk."""
    try:
        with _locked(path), path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((line + "\n").encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from None


def _remove(path: Path, feedback: Feedback) -> None:
    """Takes all judgements of an answer out; the file is replaced whole, with what the chat has added meanwhile."""
    path = path.resolve()  # a link stays one
    with _locked(path):
        kept = [line for line in _lines(path) if not _judges(line, feedback.messages)]
        beside = path.with_name(f".{path.name}.new")
        with beside.open("w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, beside)
        beside.replace(path)


def _judges(line: str, messages: list[Message]) -> bool:
    try:
        return json.loads(line)["messages"] == messages
    except (ValueError, TypeError, KeyError):
        return False


def _source(line: str) -> str | None:
    """The id of the feedback that a line of the data came from."""
    try:
        return json.loads(line)["source"]["feedback"] if '"feedback"' in line else None
    except (ValueError, TypeError, KeyError):
        return None


def _locked(path: Path) -> FileLock:
    path = path.resolve()
    return FileLock(path.with_name(f".{path.name}.lock"))
