"""What may be wrong with one record: patterns and rules that show where to look, each tried on real data sets."""

import re
from collections.abc import Iterator

from dolly.prompt import CONTROL_TOKENS
from dolly.records import Record

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
# Keys of Hugging Face, OpenAI and Anthropic, GitHub, AWS, Google and Slack, web tokens, private keys.
SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{50,}|A[KS]IA[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
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
LONGEST = 8  # characters that it may need
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
    if match := SECRET.search(text):
        yield "secret", match[0][:6] + "..."
    if match := personal(text):
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


def private(text: str) -> bool:
    """Whether a text holds what nobody should publish unseen: a key to a service, or personal data."""
    return bool(SECRET.search(text) or personal(text))


def personal(text: str) -> re.Match | None:
    """The first e-mail address, phone number or number of a payment card."""
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
    return bool(
        answer.count("```") % 2 or (len(last.split()) >= 4 and GOES_ON.search(last[-LONGEST:]) and not set(last) & CODE)
    )


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
