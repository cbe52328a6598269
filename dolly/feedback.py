"""From the chat back to the data: ratings and corrected answers, which a person reviews, become ordinary records.

A line of a feedback file is one answer that somebody judged:

    {"id": "...", "time": "2026-11-22T10:00:00+00:00", "model": "...", "rating": "good" or "bad" or null,
     "messages": [{"role", "content"}, ... the answer], "correction": "a better answer" or null}

A reviewed line leaves the file; what was accepted stands in the data, with its `source`.
"""

import json
import os
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from dolly.doctor import KINDS, faults
from dolly.errors import UserError
from dolly.prompt import Message
from dolly.records import Record, whole_text

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
    """Appends a line; several processes may."""
    with _locked(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(feedback), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Feedback]:
    """Raises `UserError` naming the first line that is no feedback."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. The chat writes it when it is started with --feedback {path}.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            made = Feedback(**json.loads(line))
            if [m["role"] for m in made.messages][-2:] != ["user", "assistant"] or not made.answer.strip():
                raise ValueError("no question with its answer")
            found.append(made)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a line of feedback ({error}). Delete it.") from None
    return found


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
    and one that is there already is not added twice.
    """
    pending = read(path)
    there = _ids(data)
    counts = {"accepted": 0, "dropped": 0}
    for number, feedback in enumerate(pending, 1):
        if feedback.id in there:
            _remove(path, feedback.id)
            continue
        say(
            f"\n--- {number} of {len(pending)}: rated {feedback.rating or 'nothing'}, {feedback.time}, {feedback.model}"
        )
        for message in feedback.messages:
            say(f"{message['role']}: {message['content']}")
        if feedback.correction:
            say(f"corrected: {feedback.correction}")
        answer = feedback.answer
        while (key := _key(ask)) == "e":
            answer = edited(answer)
            say(f"answer: {answer}")
        if key == "q":
            break
        if key == "s":
            continue
        if key == "a":
            category = ask("category [feedback]: ").strip() or "feedback"
            row = record_of(feedback, answer, category)
            for fault in _faults(feedback, answer):
                say(f"note: {fault}")
            _append(data, row)
        _remove(path, feedback.id)
        counts["accepted" if key == "a" else "dropped"] += 1
    return counts | {"left": len(read(path))}


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
            subprocess.run([*shlex.split(editor), str(path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"The editor {editor} failed ({error}).") from None
        return path.read_text(encoding="utf-8").strip() or text


def _append(data: Path, row: dict) -> None:
    """Adds a line at the end, after a line end where the last line lacks one, and waits until it is on the disk."""
    with _locked(data), data.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path, id: str) -> None:
    """Takes a line out; the file is replaced whole, with what the chat has added meanwhile."""
    with _locked(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("id") != id]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)


def _ids(data: Path) -> set[str]:
    if not data.is_file():
        return set()
    lines = (line for line in data.read_text(encoding="utf-8").splitlines() if '"feedback"' in line)
    return {json.loads(line).get("source", {}).get("feedback") for line in lines}


def _locked(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))
