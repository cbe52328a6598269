"""The data doctor: what is wrong with a file of records, line by line, and what is in it.

Errors are what training refuses or what makes its measure a lie; warnings are what a careful editor would look at.
The file is read once, in order; of each record a few numbers are kept, so a million of them fit into memory.
"""

import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from dolly.errors import UserError
from dolly.faults import exchanges, faults, shortened
from dolly.language import language
from dolly.prompt import instruction_of
from dolly.records import (
    Problem,
    Record,
    empty,
    explain,
    first_prompt,
    iterate,
    question,
    read_records,
    whole_text,
)
from dolly.similar import Sketches, groups

TOGETHER, CHARACTERS = 4096, 2**23  # records that are worked on at once, and their characters
SIZES = (1024, 2048, 4096, 8192)  # tokens of rows, longer than the given one, for which it is told what would not fit
FRAME = 128  # tokens of the prompt around the texts, at most
SHOWN = 70  # characters of a prompt
EXAMPLES = 50  # of a kind whose text is kept
MONOTONOUS, MANY = 0.02, 10  # share of the records with the same first four words, and number, above which it is told
FEW = 100  # records of which no share is told
MINORITY = 0.1  # a language with a smaller share is told by line


@dataclass(frozen=True)
class Kind:
    severity: str  # error or warning
    what: str
    remedy: str


KINDS = {
    "unreadable": Kind("error", "cannot be read as a record", "mend the line, or train with --bad-records drop"),
    "empty": Kind("error", "has nothing where a text belongs", "write the text, or delete the line"),
    "too long": Kind("error", "is longer than a row of tokens", "shorten it, or raise --max-length"),
    "leak": Kind("error", "is, nearly, also in the other file", "delete it here: the measure would flatter the model"),
    "secret": Kind("error", "holds a key to a service", "have the service withdraw the key, and delete it here"),
    "duplicate": Kind("warning", "says the same as an earlier record", "delete all but one"),
    "near-duplicate": Kind("warning", "is almost an earlier record", "look at both: rewrite one, or delete it"),
    "cut off": Kind("warning", "has an answer that stops within a sentence", "complete the answer"),
    "no full stop": Kind("warning", "has an answer whose last sentence has no end", "complete it, or end the sentence"),
    "echo": Kind("warning", "has an answer that repeats the prompt", "delete the repetition"),
    "control token": Kind(
        "warning", "spells a token that steers a model", "delete it: Dolly learns it as text, other trainers do not"
    ),
    "personal data": Kind(
        "warning", "holds an e-mail address, a phone or a card number", "replace it, unless it is meant to be known"
    ),
    "encoding": Kind("warning", "has damaged characters", "repair them: export the file as UTF-8, decode HTML"),
    "leftover": Kind("warning", "has remains of a web page or of another assistant", "delete them"),
    "placeholder": Kind("warning", "has an answer with a gap to fill in", "fill it in: the model learns the gap"),
    "language": Kind("warning", "is in another language than most", "check that it is meant to be"),
}


@dataclass
class Examination:
    """What was found in a file. Lines count from 1; for Parquet, JSON lists and Hub data sets they are rows."""

    source: str
    records: int = 0  # that can be read
    conversations: int = 0  # of them, with more than one exchange
    length: int | None = None  # tokens of a row
    over: dict[int, int] = field(default_factory=dict)  # tokens of a row -> records that would not fit
    found: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})  # lines, ascending
    examples: dict[str, dict[int, str]] = field(default_factory=lambda: {kind: {} for kind in KINDS})  # line -> text
    categories: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    monotony: dict[str, int] = field(default_factory=dict)  # four words that too many records begin with -> how many
    prompt_words: array = field(default_factory=lambda: array("i"))  # of each exchange
    answer_words: array = field(default_factory=lambda: array("i"))

    def add(self, kind: str, line: int, text: str = "") -> None:
        self.found[kind].append(line)
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind][line] = text

    def count(self, severity: str) -> int:
        alike = len(self.monotony) if severity == "warning" else 0
        return alike + sum(len(lines) for kind, lines in self.found.items() if KINDS[kind].severity == severity)


def examine(
    source: str,
    length: int | None = None,
    tokens_of: Callable[[list[Record]], list[int]] | None = None,
    against: str | None = None,
    seen: Callable[[int], None] = lambda records: None,
) -> Examination:
    """Reads a file or Hub data set and tells what is in it.

    length: tokens of a row, and `tokens_of` how many a record has; against: a validation file, none of whose records
    may be in this one; seen: is told from time to time how many records have been read. Raises `UserError` as
    `records.read_records` does.
    """
    others = None
    if against is not None:
        others, broken = read_records(against)
        if broken:
            remedy = "Mend them: a record that cannot be read cannot be told from one that is here too."
            raise UserError(explain(broken, against, len(others) + len(broken), remedy))
    result = Examination(source, length=length)
    sketches = Sketches()
    lines, exact, prompts = array("q"), array("q"), array("q")
    languages: list[str | None] = []
    openings: Counter[str] = Counter()
    shown: list[str] = []  # the beginnings of the prompts, to tell of duplicates
    items = iterate(source)
    measured: deque[tuple[list[Record], Future]] = deque()
    with ThreadPoolExecutor(1) as aside:  # tokenizers leave Python's lock to others
        while part := _part(items):
            readable = []
            for item in part:
                if isinstance(item, Problem):
                    result.add("empty" if item.what.endswith("is empty") else "unreadable", item.line, item.what)
                else:
                    readable.append(item)
            if tokens_of:
                long = [record for record in readable if may_exceed(record, length)]
                measured.append((long, aside.submit(tokens_of, long)))
            for record in readable:
                text = whole_text(record)
                for kind, detail in dict(faults(record, text)).items():  # one of a kind
                    result.add(kind, record.line, detail)
                languages.append(language(text))
                lines.append(record.line)
                exact.append(hash(text))
                if others is not None:
                    prompts.append(hash(question(record)))
                openings[" ".join(first_prompt(record)[:200].lower().split()[:4])] += 1
                shown.append(shortened(first_prompt(record), SHOWN))
                _count(result, record)
            sketches.add(map(parts, readable))
            result.records += len(readable)
            seen(result.records)
            while len(measured) > 2:
                _measure(result, *measured.popleft())
        for records, counts in measured:
            _measure(result, records, counts)
    if not result.records and not result.found["unreadable"] + result.found["empty"]:
        raise empty(source)
    _alike(result, sketches, lines, exact, prompts, shown, others)
    _foreign(result, lines, languages)
    if result.records >= FEW:
        most = max(MANY, MONOTONOUS * result.records)
        result.monotony = {words: count for words, count in openings.most_common(50) if count > most}
    for kind in result.found:
        result.found[kind].sort()
    return result


def _count(result: Examination, record: Record) -> None:
    result.categories[record.category] += 1
    turns = 0
    for prompt, answer in exchanges(record):
        result.prompt_words.append(len(prompt.split()))
        result.answer_words.append(len(answer.split()))
        turns += 1
    result.conversations += turns > 1
    if record.text is not None:
        result.answer_words.append(len(record.text.split()))


def may_exceed(record: Record, size: int) -> bool:
    """Whether a record may have more tokens: no tokenizer makes more of a text than it has bytes.

    Texts are cut into rows when they are trained on, so none is too long.
    """
    return record.text is None and len(whole_text(record).encode(errors="replace")) + FRAME > size


def _measure(result: Examination, records: list[Record], counts: Future) -> None:
    sizes = [result.length, *(size for size in SIZES if size > result.length)]
    for size in sizes:
        result.over.setdefault(size, 0)
    for record, count in zip(records, counts.result(), strict=True):
        for size in sizes:
            result.over[size] += count > size
        if count > result.length:
            result.add("too long", record.line, f"{count:,} tokens: {shortened(first_prompt(record))}")


def _part(items: Iterator[Record | Problem]) -> list[Record | Problem]:
    part, size = [], 0
    for item in itertools.islice(items, TOGETHER):
        part.append(item)
        size += len(whole_text(item)) if isinstance(item, Record) else 0
        if size > CHARACTERS:
            break
    return part


def parts(record: Record) -> list[str]:
    """Question, context, answer, question ... of a record, for `Sketches`."""
    if record.text is not None:
        return ["", "", record.text]
    found, before = [], ""
    for message in record.messages:
        content = message["content"]
        if message["role"] == "system":
            before = content + "\n"
        elif message["role"] == "user":
            found += [before + instruction_of(content), content.removeprefix(instruction_of(content))]
            before = ""
        else:
            found.append(content)
    return found


def _alike(
    result: Examination,
    sketches: Sketches,
    lines: array,
    exact: array,
    prompts: array,
    shown: list[str],
    others: list[Record] | None,
) -> None:
    first: dict[int, int] = {}
    for line, text, prompt in zip(lines, exact, shown, strict=True):
        if text in first:
            result.add("duplicate", line, f"as line {first[text]}: {prompt}")
        first.setdefault(text, line)
    if others is not None:
        sketches.add(map(parts, others))
        leaked = {hash(question(record)): record.line for record in others}

    pairs = sketches.pairs()
    roots = groups(len(lines), ((a, b) for a, b in pairs.tolist() if b < len(lines)))
    seen: dict[int, int] = {}
    duplicates = set(result.found["duplicate"])
    for line, root, prompt in zip(lines, roots, shown, strict=True):
        if root in seen and line not in duplicates:
            result.add("near-duplicate", line, f"as line {seen[root]}: {prompt}")
        seen.setdefault(root, line)
    if others is not None:
        of_all = groups(len(lines) + len(others), pairs.tolist())
        near = {of_all[len(lines) + at]: record.line for at, record in enumerate(others)}
        for line, root, prompt in zip(lines, of_all, prompts, strict=False):
            if prompt in leaked:
                result.add("leak", line, f"line {leaked[prompt]} there has the same prompt")
            elif root in near:
                result.add("leak", line, f"almost line {near[root]} there")


def _foreign(result: Examination, lines: array, languages: list[str | None]) -> None:
    result.languages.update(name or "undecided" for name in languages)
    known = Counter(name for name in languages if name)
    rare = set()
    if 2 * max(known.values(), default=0) > known.total():
        rare = {name for name, count in known.items() if count < MINORITY * known.total()}
    for line, name in zip(lines, languages, strict=True):
        if name in rare:
            result.add("language", line, name)
