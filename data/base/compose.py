"""Writes texts from the grammars in compose/: our own letters, posts, advice, stories ... for pre-training.

    python data/base/compose.py letters --seed 1 --documents 3            # to read some
    python data/base/compose.py letters posts --words 1000000 --out texts.jsonl

A grammar file has three kinds of section; a line beginning with # is a comment, and a blank line ends a table or list:

    table shop: name | sells | smell         one entity a row, columns divided by |, several values in a cell by ;
    bakery | bread; rye loaves | warm crust
    bookshop | novels; old maps | paper and dust

    list greeting                            one phrase a line
    Good morning from the {s.name}!
    [Hello|Hi] [neighbours|everybody].

    text document 3                          one text of any lines, up to the next section; 3 is its weight (else 1)
    {s=shop}
    {greeting} Today we have {s.sells}, and the whole street smells of {s.smell}.

In a phrase or text: `[a|b|]` is one of a, b or nothing, and may be nested; `{s=shop}` draws a row of a table, called s
in the whole document; `{s.sells}` is one value of its cell, another one each time while they last; `{=x phrase}` fixes
x as the expansion of `phrase`, `{x}` repeats it; `{greeting}` is a phrase of that list (or a text of that name), again
another one each time; `{2-4 tip}` is two to four of them as sentences, `{2-4 , tip}` as "a, b and c", `{2-4 - tip}` as
lines with dashes, `{2-4 1 tip}` as numbered lines. `a(n)` becomes "a" or "an". The first letter of a sentence or line
is made a capital, of a list of lines too; HASTE tells of exceptions. Every file's documents are the texts of the name
`document`.
"""

import argparse
import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "compose"
HASTE = 0.06  # share of the documents whose first line is typed in a hurry: small letters, no full stop
# A sentence of few signs that may stand anywhere, and first words of which a clause has the small letter.
PLAIN = re.compile(r"(?:[A-Z][a-z']*|I'[a-z]+)(?:,? [A-Za-z0-9'-]+)+\.")
SMALL = set(
    re.findall(
        r"\S+",
        """The A An My Our Your His Her Their Its This That These Those We He She It They You There Here In On At After
        Before When If As Some Many Most All Every Each One Two Three Four Five No Not Now Today Yesterday Tomorrow Then
        So But And Or For From With Without By People Children Everybody Everyone Nobody Somebody Something Last Next
        Sometimes Often Never Please It's That's There's We're He's She's They're You're""",
    )
)
# What a request that is told of has, and an answer with further turns.
TOLD = re.compile(r"\b(?:said|says|asked|asks|wrote|writes|told|thought|typed|posted|wanted|had to|sat)\b|:$")
TURNS = re.compile(
    r"(?m)^(?:[A-Z]|[A-Z][a-z]+): |\b(?:too long|longer|shorter|another one|one more|[Nn]ow (?:a|with))\b"
)
SECTION = re.compile(r"(table|list|text) (\w+)(?:: (.*)| (\d+))?$")
CALL = re.compile(r"(?:(\d+)-(\d+) )?(?:([-,1]) )?(\w+)(?:\.(\w+))?$")


def read(path: Path) -> dict:
    """A grammar: name -> {"rows": [...]} of a table, else {"texts": [...], "weights": [...]}."""
    grammar, section = {}, None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("#"):
            continue
        if found := SECTION.match(line):
            kind, name, columns, weight = found.groups()
            section = grammar.setdefault(name, {"kind": kind, "texts": [], "weights": [], "rows": []})
            if section["kind"] != kind:
                raise SystemExit(f"{path}:{number}: {name} is a {section['kind']} already")
            if kind == "table":
                section["columns"] = [column.strip() for column in columns.split("|")]
            if kind == "text":
                section["texts"].append("")
                section["weights"].append(int(weight or 1))
        elif section and section["kind"] == "text":
            section["texts"][-1] += line + "\n"
        elif not line.strip():
            section = None
        elif not section:
            raise SystemExit(f"{path}:{number}: a line outside of any table, list or text")
        elif section["kind"] == "list":
            section["texts"].append(line.strip())
            section["weights"].append(1)
        else:
            cells = [[value.strip() for value in cell.split(";")] for cell in line.split("|")]
            if len(cells) != len(section["columns"]):
                raise SystemExit(f"{path}:{number}: {len(cells)} cells under {len(section['columns'])} columns")
            section["rows"].append(dict(zip(section["columns"], cells, strict=True)))
    return grammar


class Document:
    """One document in the making: what its names stand for, and which phrases it has used."""

    def __init__(self, grammar: dict, rng: random.Random):
        self.grammar, self.rng = grammar, rng
        self.names, self.used = {}, {}

    def draw(self, key, values: list, weights: list[int] | None = None):
        """One of `values`, none of them a second time before all had their turn."""
        used = self.used.setdefault(key, set())
        if len(used) == len(values):
            used.clear()
        if weights or used:
            left = [i for i in range(len(values)) if i not in used]
            at = self.rng.choices(left, [weights[i] for i in left] if weights else None)[0]
        else:
            at = self.rng.randrange(len(values))
        used.add(at)
        return values[at]

    def phrase(self, name: str, column: str | None = None) -> str:
        if column:
            return self.expand(self.draw((name, column), self.names[name][column]))
        if isinstance(self.names.get(name), str):
            return self.names[name]
        section = self.grammar[name]
        return self.expand(self.draw(name, section["texts"], section["weights"])).strip()

    def call(self, code: str) -> str:
        if table := re.fullmatch(r"(\w+)=(\w+)", code):
            name, table = table.groups()
            rows = self.grammar[table]["rows"]
            self.names[name] = self.draw(table, rows)
            self.used = {key: used for key, used in self.used.items() if key[0] != name}
            return ""
        if fixed := re.fullmatch(r"=(\w+) (.+)", code):
            name, phrase = fixed.groups()
            self.names[name] = self.call(phrase)
            return ""
        low, high, form, name, column = CALL.match(code).groups()
        if not low:
            return self.phrase(name, column)
        known = self.names[name][column] if column else self.grammar[name]["texts"]
        several = [self.phrase(name, column) for _ in range(min(self.rng.randint(int(low), int(high)), len(known)))]
        if form == ",":
            return ", ".join(several[:-1]) + " and " * (len(several) > 1) + several[-1]
        if form:
            return "\n".join(f"{'-' if form == '-' else f'{i}.'} {one}" for i, one in enumerate(several, 1))
        return " ".join(several)

    def expand(self, text: str) -> str:
        out, at = [], 0
        while at < len(text):
            if text[at] in "[{":
                end = close(text, at)
                inner = text[at + 1 : end]
                out.append(self.call(inner) if text[at] == "{" else self.expand(self.rng.choice(choices(inner))))
                at = end + 1
            else:
                out.append(text[at])
                at += 1
        return "".join(out)


def close(text: str, at: int) -> int:
    """Where the bracket at `at` is closed."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "[{") - (text[i] in "]}")
        if not depth:
            return i
    raise SystemExit(f"a bracket is not closed: {text[at : at + 80]!r}")


def choices(text: str) -> list[str]:
    """The alternatives of "a|b{c}|[d|e]": split at the bars outside of brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "|" and not depth:
            parts.append(text[last:i])
            last = i + 1
    return [*parts, text[last:]]


def tidy(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([.,!?;:])(?![.\w])", r"\1", text)
    text = re.sub(r" *\n *", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = re.sub(r"\b([Aa])\(n\)(?= (\w))", lambda m: m[1] + "n" * (m[2] in "aeiouAEIOU8"), text)
    return re.sub(r"([.!?][\"')]* |(?:^|\n)(?:- |\d+\. )?[\"'(]*)([a-z])", lambda m: m[1] + m[2].upper(), text)


def facts(path: Path) -> dict[str, list[str]]:
    """The tables `fact` and `pair`, as sections of a grammar: plain sentences of texts, JSON objects with a `text`."""
    ones, pairs = {}, {}
    for line in path.open():
        for paragraph in json.loads(line)["text"].splitlines():
            before = None
            for sentence in re.split(r"(?<=[.!?]) +", paragraph.removeprefix("A: ").removeprefix("B: ")):
                first, _, rest = sentence.rstrip(".").partition(" ")
                clause = f"{first.lower() if first in SMALL else first} {rest}"
                fact = [sentence, clause] if PLAIN.fullmatch(sentence) and 4 <= len(sentence.split()) <= 15 else None
                if fact:
                    ones[sentence] = dict(zip(("one", "c1"), ([value] for value in fact), strict=True))
                if fact and before:
                    row = dict(zip(("one", "c1", "two", "c2"), ([value] for value in before + fact), strict=True))
                    pairs[sentence] = row
                before = fact
    return {"fact": {"rows": list(ones.values())}, "pair": {"rows": list(pairs.values())}}


def compose(grammar: dict, rng: random.Random) -> str:
    try:
        text = tidy(Document(grammar, rng).phrase("document"))
        if rng.random() < HASTE:
            first, *rest = text.split("\n", 1)
            text = "\n".join([first.lower().removesuffix("."), *rest])
        return text
    except (KeyError, AttributeError) as error:
        raise SystemExit(f"the grammar has no {error}") from None


def record(text: str) -> dict | None:
    """A document as an instruction and its response, if it is one."""
    instruction, _, response = text.partition("\n\n" if "\n\n" in text else "\n")
    if not response or len(instruction.split()) > 80 or TOLD.search(instruction):
        return None
    if TURNS.search(response) or response.count(response[:24]) > 1:  # it is written a second time
        return None
    return {"instruction": instruction.strip(), "context": "", "response": response.strip()}


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("names", nargs="+", help=", ".join(sorted(p.stem for p in FOLDER.glob("*.txt"))))
    cli.add_argument("--documents", type=int, default=10**9)
    cli.add_argument("--words", type=int, default=10**9, help="stop after so many, shared evenly among the grammars")
    cli.add_argument("--seed", type=int, default=0)
    plain = FOLDER.parent.parent / "plain.jsonl"
    cli.add_argument(
        "--facts", type=Path, default=plain, help="JSON lines with a text, whose sentences `restate` draws"
    )
    cli.add_argument(
        "--records", action="store_true", help="only documents that ask for something, to be fine-tuned on"
    )
    cli.add_argument("--out", type=Path, help='JSON lines {"text": ...}; without it the texts are printed')
    args = cli.parse_args()
    lines = args.out.open("w") if args.out else None
    for name in args.names:
        grammar, rng = read(FOLDER / f"{name}.txt"), random.Random(f"{name} {args.seed}")
        if name == "restate":
            grammar |= facts(args.facts)
        written, words, seen = 0, 0, set()
        while written < args.documents and words < args.words / len(args.names):
            text = compose(grammar, rng)
            row = record(text) if args.records else {"text": text}
            if text in seen or row is None:
                continue
            seen.add(text)
            written, words = written + 1, words + len(text.split())
            row |= {"category": name} if args.records else {}
            print(json.dumps(row, ensure_ascii=False) if lines else text + "\n\n---\n", file=lines)


if __name__ == "__main__":
    main()
