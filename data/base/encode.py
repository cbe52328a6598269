"""Turns texts into the token files of pretrain.py: ids of tokenizer.json as uint16, every document ended by id 0.

    python data/base/encode.py texts.jsonl more.jsonl --out tokens/main-1.bin

The files hold a JSON object with the key "text" on each line; documents are shuffled. Before the text stands a
"request", if there is one, and between the two id 1: the base learns to write the text, and only reads the request.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("files", nargs="+", type=Path)
    cli.add_argument("--out", type=Path, required=True)
    args = cli.parse_args()
    tokenizer = Tokenizer.from_file(str(Path(__file__).parent / "tokenizer.json"))
    rows = [json.loads(line) for path in args.files for line in path.open(encoding="utf-8")]
    random.Random(0).shuffle(rows)
    with args.out.open("wb") as out:
        for at in range(0, len(rows), 10_000):
            some = rows[at : at + 10_000]
            requests = tokenizer.encode_batch([row["request"] + "\n\n" if "request" in row else "" for row in some])
            for request, text in zip(requests, tokenizer.encode_batch([row["text"] for row in some]), strict=True):
                np.array([*request.ids, *([1] if request.ids else []), *text.ids, 0], dtype=np.uint16).tofile(out)


if __name__ == "__main__":
    main()
