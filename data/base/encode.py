"""Turns texts into the token files of pretrain.py: ids of tokenizer.json as uint16, every document ended by id 0.

    python data/base/encode.py texts.jsonl more.jsonl --out tokens/main-1.bin

The files hold a JSON object with the key "text" on each line; documents are shuffled.
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
    texts = [json.loads(line)["text"] for path in args.files for line in path.open(encoding="utf-8")]
    random.Random(0).shuffle(texts)
    with args.out.open("wb") as out:
        for at in range(0, len(texts), 10_000):
            for document in tokenizer.encode_batch(texts[at : at + 10_000]):
                np.array([*document.ids, 0], dtype=np.uint16).tofile(out)


if __name__ == "__main__":
    main()
