"""The perplexity of the base on texts that it has not read: a table, a row for each file.

    python data/base/perplexity.py --tokens tokens news.jsonl books.jsonl

The files hold a JSON object a line, with a text or the parts of a record. Of each about 200 kB of documents are taken,
in an order of chance that is always the same: those of which less than 5 % of the passages of 16 tokens occur in the
token files of training (all but validation-*.bin). A document is read in pieces of 512 tokens.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from dolly.config import TrainConfig
from dolly.evaluate import losses
from dolly.packing import Document
from dolly.trainer import precision

PASSAGE, PIECE, SIZE = 16, 512, 200_000  # tokens, tokens, characters
PARTS = ("instruction", "context", "response", "text")


def passages(ids: np.ndarray) -> np.ndarray:
    """A number for each run of PASSAGE ids, uint64."""
    found = np.zeros(max(0, len(ids) - PASSAGE + 1), dtype=np.uint64)
    for at in range(PASSAGE):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[at : at + len(found)].astype(np.uint64) + np.uint64(1)
    return found


def unread(texts: list[str], tokenizer: Tokenizer, read: np.ndarray) -> list[np.ndarray]:
    """Documents that are hardly in the sorted passages `read`, up to SIZE characters of them."""
    chosen, size = [], 0
    for text in texts:
        ids = np.array([*tokenizer.encode(text).ids, 0])
        own = passages(ids)
        at = np.searchsorted(read, own).clip(max=len(read) - 1)
        if len(own) and (read[at] == own).mean() < 0.05:
            chosen.append(ids)
            size += len(text)
        if size >= SIZE:
            break
    return chosen


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("files", nargs="+", type=Path)
    cli.add_argument("--tokens", type=Path, required=True, help="the token files of training")
    cli.add_argument("--model", type=Path, default=Path(__file__).parent)
    args = cli.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = GPTNeoXForCausalLM.from_pretrained(args.model).float()
    training = [path for path in args.tokens.glob("*.bin") if not path.stem.startswith("validation-")]
    read = np.unique(np.concatenate([passages(np.fromfile(path, dtype=np.uint16)) for path in training]))
    print("| held-out texts | documents | kB | perplexity |\n|---|---:|---:|---:|")
    for path in args.files:
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        texts = ["\n\n".join(row[part] for part in PARTS if row.get(part)) for row in rows]
        random.Random(0).shuffle(texts)
        chosen = unread(texts, tokenizer, read)
        pieces = [ids[at : at + PIECE] for ids in chosen for at in range(0, len(ids) - 1, PIECE - 1)]
        documents = [Document(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]
        size = sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in chosen)
        told = (
            f"{math.exp(losses(model, documents, PIECE, precision(TrainConfig(base='')))['all']):.1f}"
            if documents
            else "-"
        )
        print(f"| {path.stem} | {len(chosen)} | {size // 1000} | {told} |", flush=True)


if __name__ == "__main__":
    main()
