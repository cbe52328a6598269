"""How fast Dolly fine-tunes, beside TRL and the Dolly trainer of 2023: one command, one table.

    make bench-training                                  # three models on one CPU thread, twenty minutes
    make bench-training ARGS="--models embedded --records my.jsonl --json rows.json"
    python -m benchmarks.training --device cuda          # the same, in an environment that has all packages

Every measurement has a process of its own, and the systems take turns. The figures are medians over the rounds. A
token is a real one (padding is not counted) from the second update on.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dolly.errors import UserError, told_plainly

ROOT = Path(__file__).absolute().parent.parent
SYSTEMS = ("dolly", "2023", "trl-padded", "trl-packed")
LENGTHS = ROOT / "benchmarks" / "lengths.json"
HELDOUT = 32  # records
PEAK_FLOPS = 989e12  # of an H100 or H200 in bfloat16, without sparsity
EPOCH = 52_000 * 115  # tokens: the records of Alpaca, with which Dolly began, at their mean length


@dataclass(frozen=True)
class Size:
    updates: int
    records: int  # of an update; a multiple of 8
    learning_rate: float


# On one CPU thread a measurement takes 10 to 40 seconds.
SIZES = {
    "cpu": {"embedded": Size(4, 32, 1e-3), "pythia-70m": Size(2, 16, 1e-3), "gptj-small": Size(2, 16, 1e-3)},
    "cuda": {
        "embedded": Size(16, 256, 1e-3),
        "pythia-70m": Size(16, 256, 1e-3),
        "gptj-small": Size(16, 256, 1e-3),
        "pythia-410m": Size(12, 128, 3e-4),
        "pythia-1.4b": Size(12, 128, 2e-4),
        "gpt-j-6b": Size(8, 64, 1e-5),
    },
}


def main(argv: list[str]) -> None:
    options = parse(argv)
    dtype = products(options)
    results: dict[tuple[str, str], list[dict]] = {}
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = {}
        for model in options.models:
            size = SIZES[options.device][model]
            updates = options.updates or size.updates
            file = Path(folder) / f"{model}.json"
            notes.append(f"{model}: {prepare(options.records, options.length, updates, size.records, file)}")
            tasks[model] = {
                "model": model,
                "device": options.device,
                "threads": options.threads,
                "dtype": dtype,
                "length": options.length,
                "updates": updates,
                "records": size.records,
                "learning_rate": size.learning_rate,
                "documents": str(file),
            }
        print("\n".join(notes), file=sys.stderr)
        for number in range(1, options.repeats + 1):
            for model in options.models:
                for system in options.systems:
                    rounds = results.setdefault((model, system), [])
                    if rounds and "error" in rounds[-1]:
                        continue
                    rounds.append(run(tasks[model] | {"system": system}, Path(folder)))
                    said = rounds[-1].get("error") or "{tokens_per_second:,.0f} tokens/s".format(**rounds[-1])
                    print(f"round {number} of {options.repeats}, {model}, {system}: {said}", file=sys.stderr)
    rows = [
        {"system": system, "model": model, "device": options.device, "threads": options.threads, "dtype": dtype}
        | medians(rounds)
        for (model, system), rounds in results.items()
    ]
    print("\n".join([*conditions(options, dtype), *notes, "", *table(rows), "", *ratios(rows)]))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def parse(argv: list[str]) -> argparse.Namespace:
    cli = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__.split("\n\n")[0])
    cli.add_argument("--device", choices=SIZES, default="cpu")
    cli.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    cli.add_argument("--models", nargs="+", help="on the CPU: " + " ".join(SIZES["cpu"]) + " (default: all)")
    cli.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    cli.add_argument("--records", help="a file (default: this project's texts in the lengths of databricks-dolly-15k)")
    cli.add_argument("--length", type=int, default=1024, help="tokens of a packed row; longer records are left out")
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--updates", type=int, help="of one measurement, at least 2 (default: by model)")
    cli.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    cli.add_argument("--json", metavar="PATH", help="write the rows there too")
    options = cli.parse_args(argv)
    known = SIZES[options.device]
    options.models = options.models or list(known)
    if unknown := [name for name in options.models if name not in known]:
        cli.error(f"no model {', '.join(unknown)} on {options.device}; there are {', '.join(known)}")
    if options.updates is not None and options.updates < 2:
        cli.error("--updates must be at least 2: the first is the warm-up")
    if min(options.repeats, options.threads) < 1:
        cli.error("--repeats and --threads must be at least 1")
    if any(system.startswith("trl") for system in options.systems) and installed("trl") is None:
        cli.error(f"TRL is not installed: pip install -r {ROOT / 'benchmarks' / 'requirements.txt'}")
    return options


def prepare(records: str | None, length: int, updates: int, per_update: int, file: Path) -> str:
    """Writes the documents of one model's measurements; gives a line about them.

    They are as many as make `updates` updates of padded batches of `per_update` records, and also of equal numbers of
    packed rows, of which the last may be fewer.
    """
    from benchmarks.systems import BASE
    from dolly.model import load_tokenizer
    from dolly.packing import pack, tokenize
    from dolly.prompt import RESPONSE, dolly_tokenizer
    from dolly.records import read_records, split

    tokenizer = dolly_tokenizer(load_tokenizer(str(BASE)))
    read, _ = read_records(records or str(ROOT / "data" / "instructions.jsonl"))
    # The collator of 2023 knows one answer a record.
    read = [r for r in read if r.text is None and sum(message["role"] == "assistant" for message in r.messages) == 1]
    parts = split(read, 0.05)
    for part in parts:
        random.Random(0).shuffle(part)
    needed = (updates * per_update, HELDOUT)
    if records:  # twice as many, of which some are too long
        training, heldout = (
            tokenize(part[: 2 * count], tokenizer, length)[0] for part, count in zip(parts, needed, strict=True)
        )
    else:
        response = tokenizer.convert_tokens_to_ids(RESPONSE)
        texts = (tokenize(part, tokenizer, length)[0] for part in parts)
        training, heldout = (strung(text, response, count, length) for text, count in zip(texts, needed, strict=True))
    for count in range(updates * per_update, (updates - 1) * per_update, -1):
        lengths = [len(document.ids) for document in training[:count]]
        rows = sum(len(pack(lengths[at : at + 1000], length)) for at in range(0, count, 1000))  # as TRL packs
        each = -(-rows // updates)
        if len(lengths) == count and -(-rows // each) == updates:
            break
    else:
        raise UserError(
            f"{records} does not make {updates} updates of at least {per_update} records up to {length} tokens for "
            "padded and packed batches alike. Give more records or change --updates."
        )
    training, heldout = training[:count], heldout[:HELDOUT]
    parts = {
        name: [[list(map(int, document.ids)), list(map(int, document.learned))] for document in part]
        for name, part in (("training", training), ("heldout", heldout))
    }
    file.write_text(json.dumps(parts), encoding="utf-8")
    learned = sum(document.answer_tokens() for document in training)
    name = f"records of {Path(records).name}" if records else "records as long as databricks-dolly-15k's"
    return (
        f"{count} {name}, {sum(lengths):,} tokens ({sum(lengths) / count:.0f} a record, "
        f"{max(lengths)} the longest), {learned:,} learned, in {updates} updates"
    )


def strung(documents: list, response: int, count: int, longest: int) -> list:
    """`count` documents of these answers strung together: prompts and answers as long as databricks-dolly-15k's.

    `LENGTHS` holds those of 400 of its records, one from each 400th of the set in the order of their length. Eight
    documents have one length, the mean of their share of them, so that the few of a measurement are what a large set
    is: batches of like lengths need no padding, those at random 2.5 times their tokens (2.1 for 32 documents, 2.4 for
    64, which spares the rivals some).
    """
    from dolly.packing import Document

    lengths = [pair for pair in json.loads(LENGTHS.read_text(encoding="utf-8")) if sum(pair) <= longest]
    shares = [
        lengths[len(lengths) * i // (count // 8) : len(lengths) * (i + 1) // (count // 8)] for i in range(count // 8)
    ]
    means = [[round(statistics.mean(side)) for side in zip(*share, strict=True)] for share in shares]
    chosen = means * 8
    random.Random(0).shuffle(chosen)
    end = int(documents[0].ids[-1])
    answers = (document.ids[document.learned][:-1].tolist() for document in documents)
    text = itertools.cycle(itertools.chain.from_iterable(answers))
    made = []
    for prompt, answer in chosen:
        ids = [*itertools.islice(text, prompt - 1), response, *itertools.islice(text, answer - 1), end]
        made.append(Document(ids, [False] * prompt + [True] * answer))
    return made


def run(task: dict, folder: Path) -> dict:
    """What a process of its own measured, or `error`: what it died of."""
    file = folder / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    threads = {name: str(task["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    alone = threads | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if task["device"] == "cpu" else {})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.systems", str(file)],
        cwd=ROOT,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.M)
        return {"error": raised[-1][:300] if raised else f"ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: list[dict]) -> dict:
    """The median of each figure, and the rounds. After an error the figures are None."""
    if "error" in rounds[-1]:
        none = dict.fromkeys(("tokens_per_second", "peak_gib", "heldout_loss"))
        return none | {"error": rounds[-1]["error"], "rounds": rounds}
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]} | {"rounds": rounds}


def products(options: argparse.Namespace) -> str:
    """The precision of the matrix products; for `auto` what Dolly takes on the device."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: leave --device out to measure on the CPU.")
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if options.device == "cuda" or torch.cpu._is_avx512_bf16_supported() else "float32"


def conditions(options: argparse.Namespace, dtype: str) -> list[str]:
    import torch

    names = re.findall(r"^model name\s*: (.*)$", cpuinfo(), re.M)
    machine = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    if options.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    return [
        f"{machine}; {versions}",
        f"{options.threads} thread{'s' * (options.threads > 1)}, {dtype} products, float32 weights, packed rows of "
        f"{options.length} tokens, medians of {options.repeats}",
    ]


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict]) -> list[str]:
    """In Markdown. `per CPU second` says the same as tokens/s where a thread has its core for itself."""
    gpu = rows[0]["device"] == "cuda"
    more = ["share of peak FLOP/s", "epoch of Alpaca"] if gpu else ["per CPU second"]
    head = ["model", "system", "tokens/s", *more, "peak GiB", "held-out loss"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for row in rows:
        if "error" in row:
            lines.append([row["model"], row["system"], f"failed: {row['error']}"] + [""] * (len(head) - 3))
            continue
        speed = row["tokens_per_second"]
        further = [f"{row['tokens_per_cpu_second']:,.0f}"]
        if gpu:
            further = [f"{speed * row['flops_per_token'] / PEAK_FLOPS:.1%}", f"{EPOCH / speed / 60:,.1f} min"]
        figures = [f"{speed:,.0f}", *further, f"{row['peak_gib']:.2f}", f"{row['heldout_loss']:.4f}"]
        lines.append([row["model"], row["system"], *figures])
    return ["| " + " | ".join(line) + " |" for line in lines]


def ratios(rows: list[dict]) -> list[str]:
    """How many times as fast as the others Dolly is, for each model where it can be said."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        done = {row["system"]: row for row in rows if row["model"] == model and "error" not in row}
        best = max(
            (name for name in done if name.startswith("trl")), key=lambda n: done[n]["tokens_per_second"], default=None
        )
        parts = []
        for rival in ("2023", best):
            if "dolly" in done and rival in done:
                times, by_cpu = (
                    done["dolly"][name] / done[rival][name] for name in ("tokens_per_second", "tokens_per_cpu_second")
                )
                parts.append(f"{times:.2f} times {rival} ({by_cpu:.2f} by CPU time)")
        if parts:
            lines.append(f"{model}: Dolly is {', '.join(parts)}")
    return lines


if __name__ == "__main__":
    with told_plainly():
        main(sys.argv[1:])
