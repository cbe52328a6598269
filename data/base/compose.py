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
    {s=shop}{=d weekday}
    A post for our {s.name}: fresh {s.sells} on {d}, {2..9} dollars
    =>
    {greeting} On {d} we have {s.sells}, and the whole street smells of {s.smell}.

In a phrase or text: `[a|b|]` is one of a, b or nothing, and may be nested; `{s=shop}` draws a row of a table, called s
in the whole document; `{s.sells}` is one value of its cell, another one each time while they last; `{=x phrase}` fixes
x as the expansion of `phrase` (or of a choice, `{=x [a|b]}`), `{x}` repeats it; `{greeting}` is a phrase of that list
(or a text of that name), again another one each time; `{2-4 tip}` is two to four of them as sentences, `{2-4 , tip}` as
"a, b and c", `{2-4 - tip}` as lines with dashes, `{2-4 1 tip}` as numbered lines; `{2..9}` is a number, `{/}` a new
line. `a(n)` becomes "a" or "an". The first letter of a sentence or line is made a capital, of a list of lines too.

A line `=>` divides a request from its answer; HASTE of the requests are typed in a hurry. Every file's documents are
the texts of the name `document`; the lists of words.txt belong to all.
"""

import argparse
import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "compose"
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem != "words")
HASTE = 0.15  # share of the requests in small letters, without a last full stop and mostly without apostrophes
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
            cells = [[value.strip() for value in cell.split(";")] for cell in choices(line)]
            if len(cells) != len(section["columns"]):
                raise SystemExit(f"{path}:{number}: {len(cells)} cells under {len(section['columns'])} columns")
            section["rows"].append(dict(zip(section["columns"], cells, strict=True)))
    return grammar


def grammar_of(name: str) -> dict:
    return read(FOLDER / "words.txt") | read(FOLDER / f"{name}.txt")


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
        if weights:
            left = [i for i in range(len(values)) if i not in used]
            at = self.rng.choices(left, [weights[i] for i in left])[0]
        else:
            while (at := self.rng.randrange(len(values))) in used:
                pass
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
            self.names[name] = self.expand(phrase) if phrase[0] in "[{" else self.call(phrase)
            return ""
        if code == "/":
            return "\n"
        if number := re.fullmatch(r"(\d+)\.\.(\d+)", code):
            return str(self.rng.randint(*map(int, number.groups())))
        low, high, form, name, column = CALL.match(code).groups()
        if not low:
            return self.phrase(name, column)
        known = self.names[name][column] if column else self.grammar[name]["texts"]
        count = min(self.rng.randint(int(low), int(high)), len(known))
        if column:  # in their order
            several = [self.expand(known[i]) for i in sorted(self.rng.sample(range(len(known)), count))]
        else:
            several = [self.phrase(name) for _ in range(count)]
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


def facts(path: Path) -> list[dict[str, list[str]]]:
    """Plain sentences of texts as clauses, rows of a table `fact`: no full stop, and mostly a small first letter."""
    clauses = {}
    for line in path.open():
        for paragraph in json.loads(line)["text"].splitlines():
            for sentence in re.split(r"(?<=[.!?]) +", paragraph.removeprefix("A: ").removeprefix("B: ")):
                if PLAIN.fullmatch(sentence) and 4 <= len(sentence.split()) <= 15:
                    first, _, rest = sentence.removesuffix(".").partition(" ")
                    clauses[f"{first.lower() if first in SMALL else first} {rest}"] = None
    return [{"c": [clause]} for clause in clauses]


def compose(grammar: dict, rng: random.Random) -> tuple[str, str]:
    """A request and its answer, or "" and a text that answers none."""
    try:
        request, _, text = Document(grammar, rng).phrase("document").rpartition("\n=>\n")
    except (KeyError, AttributeError) as error:
        raise SystemExit(f"the grammar has no {error}") from None
    request = tidy(request)
    if rng.random() < HASTE:
        request = request.lower().removesuffix(".").replace("'", rng.choice(["", "'"]))
    return request, tidy(text)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("names", nargs="+", choices=NAMES)
    cli.add_argument("--documents", type=int, default=10**9)
    cli.add_argument("--words", type=int, default=10**9, help="stop after so many, shared evenly among the grammars")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--facts", type=Path, help="JSON lines with a text, whose sentences `retell` takes up as well")
    cli.add_argument(
        "--records", action="store_true", help="only documents that ask for something, to be fine-tuned on"
    )
    cli.add_argument("--out", type=Path, help="JSON lines; without it the texts are printed")
    args = cli.parse_args()
    lines = args.out.open("w") if args.out else None
    for name in args.names:
        grammar, rng = grammar_of(name), random.Random(f"{name} {args.seed}")
        if name == "retell" and args.facts:
            own, told = grammar["fact"]["rows"], facts(args.facts)
            grammar["fact"]["rows"] = own * max(1, len(told) // len(own)) + told  # half and half
        written, words, seen = 0, 0, set()
        while written < args.documents and words < args.words / len(args.names):
            request, answer = compose(grammar, rng)
            text = f"{request}\n\n{answer}".strip()
            if text in seen or (args.records and not request):
                continue
            seen.add(text)
            written, words = written + 1, words + len(text.split())
            row = {"text": answer} | ({"request": request} if request else {})
            if args.records:
                row = {"instruction": request, "context": "", "response": answer, "category": name}
            print(json.dumps(row, ensure_ascii=False) if lines else text + "\n\n---\n", file=lines)


if __name__ == "__main__":
    main()
