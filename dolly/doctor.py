"""The data doctor: what is wrong with a file of records, line by line, and what is in it.

Errors are what training refuses or what makes its measure a lie; warnings are what a careful editor would look at.
The file is read once, in order; of each record a few numbers are kept, so a million of them fit into memory.
"""

import itertools
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dolly.errors import UserError
from dolly.language import language
from dolly.prompt import CONTROL_TOKENS, instruction_of
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
from dolly.similar import SAME, Sketches, groups

TOGETHER, CHARACTERS = 4096, 2**23  # records that are worked on at once, and their characters
SIZES = (512, 1024, 2048, 4096)  # tokens of rows for which it is told how many records would not fit
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
    sketches = Sketches(), Sketches(minima=False), Sketches(minima=False)  # of all, of the contexts, of the answers
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
                long = [record for record in readable if may_exceed(record, min(*SIZES, length))]
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
            _sketch(sketches, readable)
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


# ---- one record ------------------------------------------------------------------------------------------------------

# Of Dolly's prompt and of the chat formats of others.
CONTROL = re.compile(
    "|".join(re.escape(token.strip()) for token in CONTROL_TOKENS)
    + r"|<\|[\w ]{2,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
# At most 64 characters before the sign (RFC 5321), so that a long run of letters is not tried from each of them.
EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?!example\.)[\w-]+\.(?!example\b)(?:[\w-]+\.)*[A-Za-z]{2,}\b(?![(.]\w|\()"
)
# With a country's code, an area code in brackets or before a dash, or a leading 0. 555-01.. belongs to films.
PHONE = re.compile(
    r"(?<![\w.,:/$€£#=+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3,5}\) ?\d{3}[ .-]?\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4}|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w%]|[.,]\d)"
)
CARD = re.compile(r"(?<![\d.,])[3-6](?:[ -]?\d){12,18}(?![\d.,]?\d)")
DIGITS = re.compile(r"\d[\d ().-]{6,}\d")
INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd]")
ENCODING = re.compile(
    "ï»¿|â€|Â[\u00a0-\u00bf]"
    "|(?<![A-Z])Ã[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u2018-\u203a\u20ac\u2122]"
    "|&(?:amp|lt|gt|quot|nbsp|apos|#x?[0-9a-fA-F]{1,6});"
)
LEFTOVER = re.compile(
    r"(?<=[.,;:)\"”’])\[\d{1,3}\](?=\s|$)"
    r"|\[(?:edit|citation needed|clarification needed|who\?|when\?)\]"
    r"|</?(?:p|br|div|span|b|i|a|li|ul|td|tr|h\d)(?: [^<>\n]*)?/?>"
    r"|\b[Aa]s an AI\b|\bAI language model\b|\bI am an AI\b|\bmy knowledge cutoff\b|\b[Cc]lick here\b"
)
PLACEHOLDER = re.compile(
    r"(?<![\w\]])\[(?:(?:your|my|insert|add|enter)\b[^\]\n]{0,40}|(?:the )?(?:\w+ )?(?:name|date|company|recipient"
    r"|address|city|title|product|number|time|place|location|topic|link|url))\](?!\()|<(?:your|insert)\b[^<>\n]{0,30}>"
    r"|\blorem ipsum\b|\bX{4,}\b",
    re.I,
)
# What a text holds if a pattern is in it: to look for these first takes a tenth of the time.
SEARCHED = (
    ("control token", CONTROL, ("<", "[", "#")),
    ("encoding", ENCODING, ("&", "Ã", "Â", "â€", "ï»¿")),
    ("leftover", LEFTOVER, ("[", "<", " AI", "lick here", "knowledge cutoff")),
)
GAPS = ("[", "<", "XXXX", "xxxx", "orem")
CODED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.S)
CODE = set("=+({;`")  # signs of a line that is no prose
SENTENCE = re.compile(r"[.!?][\"')\]”’]?\s")
# Words that no sentence ends in, or a sign that goes on.
GOES_ON = re.compile(r"(?:\b(?:and|or|the|an|because|your|their|my|our|whose|und|oder|et|ou)|[,(–-])$")
AFTER_ANOTHER, ON_ITS_LINE = 6, 12  # words of a sentence without an end; fewer may be a signature
LIST_ITEM = re.compile(r"\s*(?:[-*•#+>|@]|\w{1,3}[.):]|.{1,40}:|https?://)")


def faults(record: Record, text: str) -> Iterator[tuple[str, str]]:
    """The kinds of faults of a record and where each shows; text: `whole_text` of it."""
    if "`" in text:
        text = CODED.sub(" ", text)
    for kind, pattern, signs in SEARCHED:
        if any(sign in text for sign in signs) and (match := pattern.search(text)):
            yield kind, around(text, match)
    if match := INVISIBLE.search(text):
        yield "encoding", around(text, match)
    if match := _personal(text):
        yield "personal data", around(text, match)
    for prompt, answer in exchanges(record):
        if any(sign in answer for sign in GAPS) and (match := PLACEHOLDER.search(CODED.sub(" ", answer))):
            yield "placeholder", around(match.string, match)
        if repeats(prompt, answer):
            yield "echo", shortened(answer)
        if looks_cut(answer) or lacks_end(answer):
            yield "cut off" if looks_cut(answer) else "no full stop", "..." + shortened(answer[-80:])


def exchanges(record: Record) -> Iterator[tuple[str, str]]:
    """Each answer with the turn before it."""
    turns = [message["content"] for message in record.messages if message["role"] != "system"]
    return zip(turns[::2], turns[1::2], strict=True)


def _personal(text: str) -> re.Match | None:
    if "@" in text and (match := EMAIL.search(text)):
        return match
    if not DIGITS.search(text):
        return None
    for match in PHONE.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if 9 <= len(digits) <= 15 and "55501" not in digits and set(digits) - set("01"):
            return match
    return next((match for match in CARD.finditer(text) if _luhn(re.sub(r"\D", "", match[0]))), None)


def _luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812-1)."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return len(set(digits)) > 1 and sum(n // 10 + n % 10 for n in doubled) % 10 == 0


def repeats(prompt: str, answer: str) -> bool:
    """Whether an answer begins with the first line of the prompt, of five words at least, or is the prompt."""
    first = _plain(prompt.lstrip().split("\n", 1)[0])
    if not first:
        return False
    begins = _plain(answer[: 2 * len(first) + 20]) + " "
    return begins.startswith(first + " ") and (first.count(" ") >= 4 or _plain(answer) == _plain(prompt))


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def looks_cut(answer: str) -> bool:
    """Whether an answer stops in the middle: a fence of code left open, or a word or sign that goes on."""
    answer = answer.rstrip()
    last = answer.rsplit("\n", 1)[-1]
    return bool(answer.count("```") % 2 or (len(last.split()) >= 4 and GOES_ON.search(last) and not set(last) & CODE))


def lacks_end(answer: str) -> bool:
    """Whether the last sentence of several has no full stop. Signatures, lists and hashtags need none."""
    answer = answer.rstrip()
    last = answer.rsplit("\n", 1)[-1]
    *before, rest = SENTENCE.split(last)
    goes_on = len(rest.split()) >= (AFTER_ANOTHER if before else ON_ITS_LINE) and rest[-1].isalnum()
    return goes_on and not LIST_ITEM.match(last) and bool(SENTENCE.search(answer)) and "#" not in rest.split()[-1]


def around(text: str, match: re.Match, width: int = 30) -> str:
    start, end = max(0, match.start() - width), match.end() + width
    return "..." * (start > 0) + printable(text[start:end]) + "..." * (end < len(text))


def printable(text: str) -> str:
    """One line without anything that a terminal would obey."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\ufffd" else f"\\x{ord(c):02x}" for c in text)


def shortened(text: str, length: int = 100) -> str:
    text = printable(text[: 4 * length])
    return text if len(text) <= length else text[: length - 3] + "..."


# ---- the file --------------------------------------------------------------------------------------------------------


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
    sizes = {*SIZES, result.length}
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


def _sketch(sketches: tuple[Sketches, ...], records: list[Record]) -> None:
    sketches[0].add(map(whole_text, records))
    turns = [[m["content"] for m in record.messages if m["role"] != "assistant"] for record in records]
    sketches[1].add("\n".join(turn.removeprefix(instruction_of(turn)) for turn in each) for each in turns)
    sketches[2].add(r.text or "\n".join(m["content"] for m in r.messages if m["role"] == "assistant") for r in records)


def _alike(
    result: Examination,
    sketches: tuple[Sketches, ...],
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
        _sketch(sketches, others)
        leaked = {hash(question(record)): record.line for record in others}

    def same(pairs: np.ndarray) -> np.ndarray:
        """Neither several questions about one text nor one question about several texts are duplicates."""
        return (sketches[1].similarities(pairs) > SAME) & (sketches[2].similarities(pairs) > SAME)

    pairs = sketches[0].pairs(same)
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
