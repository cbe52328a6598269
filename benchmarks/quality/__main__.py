"""Answers to the 60 prompts of prompts.jsonl, for people to read and score by RUBRIC.md.

    python -m benchmarks.quality models/demo --out benchmarks/quality/answers.jsonl    # regenerates the answers
    python -m benchmarks.quality --scores benchmarks/quality/answers.jsonl             # the table of the scores in it

Each answer is drawn once, with the package's own sampling and seed 0. The score, 0 to 5, is written into its line.
"""

import argparse
import json
from pathlib import Path

from dolly import model as models
from dolly.evaluate import quality

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answer(name: str, out: Path) -> None:
    model, tokenizer = models.load_package(name)
    prompts = read(PROMPTS)
    given = models.answers(model, tokenizer, [row["prompt"] for row in prompts], model.generation_config)
    with out.open("w", encoding="utf-8") as lines:
        for row, one in zip(prompts, given, strict=True):
            row |= {"answer": one.text, "ended": one.ended}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps(quality(given), indent=1))


def table(rows: list[dict]) -> str:
    lines = [
        "| prompts | answers | mean score | 3 or more | end by themselves |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in [*dict.fromkeys(row["category"] for row in rows), "all"]:
        some = [row for row in rows if name in (row["category"], "all")]
        mean = sum(row["score"] for row in some) / len(some)
        good, ended = sum(row["score"] >= 3 for row in some), sum(row["ended"] for row in some)
        lines.append(f"| {name} | {len(some)} | {mean:.2f} | {good / len(some):.0%} | {ended / len(some):.0%} |")
    return "\n".join(lines)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", nargs="?", help="a folder that train.py wrote, or an id on the Hub")
    cli.add_argument("--out", type=Path, help="answers.jsonl to write")
    cli.add_argument("--scores", type=Path, help="answers.jsonl with scores, to print the table of")
    args = cli.parse_args()
    if args.scores:
        print(table(read(args.scores)))
    elif args.model and args.out:
        answer(args.model, args.out)
    else:
        cli.error("give a model and --out, or --scores")


if __name__ == "__main__":
    main()
