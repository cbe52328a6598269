"""An examination of the data doctor for people and programs: a table for the terminal, JSON, and a page in HTML.

The page is one file without scripts or anything from elsewhere; its plots are bars of CSS.
"""

import html
import statistics
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from dolly.doctor import KINDS, Examination

SHOWN = 3  # lines of a kind in the terminal
BARS, BINS = 30, 24  # at most, of a table and of a histogram


def as_json(found: Examination) -> dict:
    return {
        "source": found.source,
        "records": found.records,
        "conversations": found.conversations,
        "errors": found.count("error"),
        "warnings": found.count("warning"),
        "findings": [
            {
                "kind": kind,
                "severity": KINDS[kind].severity,
                "count": len(lines),
                "lines": lines,
                "examples": [{"line": line, "text": text} for line, text in sorted(found.examples[kind].items())],
            }
            for kind, lines in found.found.items()
            if lines
        ],
        "monotony": found.monotony,
        "categories": dict(found.categories.most_common()),
        "languages": dict(found.languages.most_common()),
        "prompt_words": _spread(found.prompt_words),
        "answer_words": _spread(found.answer_words),
        "length": found.length,
        "records_over": found.over,
    }


def _spread(counts: Sequence[int]) -> dict[str, int]:
    if not counts:
        return {}
    ordered = sorted(counts)
    places = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}


def verdict(found: Examination) -> str:
    errors, warnings = found.count("error"), found.count("warning")
    if not errors and not warnings:
        return "clean: nothing to mend"
    parts = [f"{n:,} {name}{'s' * (n > 1)}" for n, name in ((errors, "error"), (warnings, "warning")) if n]
    return " and ".join(parts)


def print_report(found: Examination, console: Console) -> None:
    conversations = f", {found.conversations:,} of them conversations" if found.conversations else ""
    count = f"{found.records:,} record{'s' * (found.records != 1)}{conversations}"
    console.print(f"\n[bold]{escape(found.source)}[/]: {count}; {verdict(found)}\n")
    for kind, lines in found.found.items():
        if lines:
            about, count = KINDS[kind], f"{len(lines):>7,} record{'s' * (len(lines) > 1)}"
            colour = "red" if about.severity == "error" else "yellow"
            console.print(f"[{colour}]{about.severity:<8}[/]{count}: {kind} ({about.what}). Remedy: {about.remedy}.")
            for line, text in list(found.examples[kind].items())[:SHOWN]:
                console.print(f"{line:>15,}  [dim]{escape(text)}[/]", overflow="ellipsis", no_wrap=True)
    for words, count in found.monotony.items():
        begins = f'begin with "{escape(words)}". Remedy: vary the first words.'
        console.print(f"[yellow]warning [/]{count:>7,} records {begins}")
    if found.count("error") + found.count("warning"):
        console.print()
    for name, counts in (("category", found.categories), ("language", found.languages)):
        if set(counts) - {""}:
            shares = (f"{key or 'none'} {n:,} ({n / counts.total():.1%})" for key, n in counts.most_common(15))
            console.print(f"{name}: " + ", ".join(shares))
    for name, counts in (("prompts", found.prompt_words), ("answers", found.answer_words)):
        if counts:
            spread = ", ".join(f"{key} {n:,}" for key, n in _spread(counts).items())
            console.print(f"words of {name}: {spread}")
    if found.over:
        over = ", ".join(f"{size:,} tokens: {n:,}" for size, n in sorted(found.over.items()))
        console.print(f"records that do not fit a row of {over}")


STYLE = """
:root {color-scheme: light dark; --line: #8884; --bar: #2a9d8f; --error: #c8413b; --warning: #b7791f}
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem}
h1 {font-size: 1.6rem; margin: 0; overflow-wrap: anywhere} h2 {font-size: 1.15rem; margin: 2.2rem 0 .6rem}
.facts {display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0}
.facts div {border: 1px solid var(--line); border-radius: 10px; padding: .5rem 1rem; min-width: 6rem}
.facts b {display: block; font-size: 1.4rem}
details {border-top: 1px solid var(--line); padding: .5rem 0} summary {cursor: pointer}
summary b {display: inline-block; min-width: 4.5rem; text-align: right; margin-right: .8rem}
.error {color: var(--error)} .warning {color: var(--warning)} .remedy {opacity: .7}
table {border-collapse: collapse; width: 100%} td {padding: .15rem .5rem; vertical-align: top; overflow-wrap: anywhere}
td:first-child {text-align: right; white-space: nowrap; width: 1%; font-variant-numeric: tabular-nums}
.bars td {white-space: nowrap} .bars td:last-child {width: 70%}
.bars i {display: block; height: .8rem; background: var(--bar); border-radius: 3px; min-width: 1px}
.plot {display: flex; align-items: flex-end; gap: 2px; height: 120px; border-bottom: 1px solid var(--line)}
.plot i {flex: 1; background: var(--bar); border-radius: 3px 3px 0 0}
.scale {display: flex; justify-content: space-between; font-size: .85rem; opacity: .7}
"""


def as_html(found: Examination) -> str:
    """The whole page. All that comes from the file is escaped."""
    name = html.escape(found.source)
    facts = {
        "records": found.records, "conversations": found.conversations,
        "errors": found.count("error"), "warnings": found.count("warning"),
    }  # fmt: skip
    boxes = "".join(f"<div><b>{count:,}</b>{key}</div>" for key, count in facts.items())
    over = Counter({f"{size:,}": found.over[size] for size in sorted(found.over)})
    sections = [
        _findings(found),
        _bars("Categories", found.categories),
        _bars("Languages", found.languages),
        _bars("Records that do not fit a row of so many tokens", over, ordered=False),
        _histogram("Words of a prompt", found.prompt_words),
        _histogram("Words of an answer", found.answer_words),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1><p>{verdict(found)}</p>"
        f'<div class="facts">{boxes}</div>\n' + "\n".join(sections) + "</html>\n"
    )


def _findings(found: Examination) -> str:
    parts = []
    for kind, lines in found.found.items():
        if lines:
            about, shown = KINDS[kind], found.examples[kind]
            rows = "".join(f"<tr><td>{n}<td>{html.escape(text)}" for n, text in sorted(shown.items()))
            more = f"<p>and {len(lines) - len(shown):,} more</p>" if len(lines) > len(shown) else ""
            parts.append(
                f'<details><summary><b class="{about.severity}">{len(lines):,}</b>{kind}: {about.what}. '
                f'<span class="remedy">Remedy: {about.remedy}.</span></summary><table>{rows}</table>{more}</details>'
            )
    for words, count in found.monotony.items():
        begins = f"begin with &ldquo;{html.escape(words)}&rdquo;"
        parts.append(f'<details><summary><b class="warning">{count:,}</b>{begins}</summary></details>')
    return "<h2>Findings</h2>" + ("".join(parts) or "<p>None.</p>")


def _bars(title: str, counts: Counter, ordered: bool = True) -> str:
    if not set(counts) - {""}:
        return ""
    most = max(counts.values()) or 1
    rows = "".join(
        f'<tr><td>{html.escape(str(key)) or "(none)"}<td>{n:,}<td><i style="width:{100 * n / most:.1f}%"></i>'
        for key, n in (counts.most_common(BARS) if ordered else counts.items())
    )
    return f'<h2>{title}</h2><table class="bars">{rows}</table>'


def _histogram(title: str, counts: Sequence[int]) -> str:
    """Bars of equal width up to the 99th percentile; the last holds all above."""
    if not counts:
        return ""
    top = max(1, sorted(counts)[int(0.99 * (len(counts) - 1))])
    width = -(-(top + 1) // BINS)
    bins = Counter(min(n // width, BINS - 1) for n in counts)
    last = max(bins)
    bars = "".join(
        f'<i style="height:{100 * bins[at] / max(bins.values()):.1f}%" '
        f'title="{at * width} to {at * width + width - 1} words: {bins[at]:,}"></i>'
        for at in range(last + 1)
    )
    median = statistics.median(counts)
    scale = f"<span>0</span><span>median {median:g}</span><span>{(last + 1) * width:,}</span>"
    return f'<h2>{title}</h2><div class="plot">{bars}</div><div class="scale">{scale}</div>'
