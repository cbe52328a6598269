"""Pre-trains the embedded base model (GPT-NeoX, tied embeddings) from token files, on a CPU or one GPU.

    python data/base/pretrain.py --tokens DIR --work DIR --seconds 7200 --out data/base

DIR holds token files as encode.py writes them: for each source of MIXTURE one or several, and for each validation-*.bin
the loss is told. The schedule is a fraction of the time given: constant, then a linear decay over the last 30 %, with a
warm-up at each start. A killed run started again with the same --work goes on from its last checkpoint;
`echo N > WORK/seconds` changes the time given; `--seconds 0 --out DIR` only writes the model of the last checkpoint.

Rows, attention and the loss are those of fine-tuning: whole documents side by side, each by itself. Rows cut out of one
stream of text tear most short documents in two, and what has lost its request teaches to answer without looking at it.
Muon (Jordan et al., 2024) trains the matrices and AdamW the embedding and the vectors.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from dolly.attention import documents_apart
from dolly.config import TrainConfig
from dolly.distributed import Alone
from dolly.head import fused_head
from dolly.packing import Batch, Document, collate, pack
from dolly.trainer import batch_loss, compile_layers, precision

DECAY = 0.7  # where the decay, with a mixture of its own, begins
MIXTURE = {"main": (0.06, 0.03), "simple": (0.06, 0.05), "composed": (0.88, 0.92)}  # before and in the decay
LENGTH = 256  # tokens of a row; longer documents are cut into pieces
POOL = 4096  # documents that are packed together
WARMUP = 100  # steps


def documents_of(paths: list[Path], rng: np.random.Generator) -> Iterator[Document]:
    """The documents of token files, in pieces of at most LENGTH tokens, in a new order in every pass; endless.

    What stands before an id 1 is a request, which is read and not learned: it says little of what answers are like, and
    being hard to foresee it would make up most of the gradient.
    """
    ids = np.concatenate([np.fromfile(path, dtype=np.uint16) for path in paths])
    ends = (ids == 0).nonzero()[0] + 1
    starts = np.concatenate([[0], ends[:-1]])
    cuts = [np.arange(a, b - 1, LENGTH - 1) for a, b in zip(starts, ends, strict=True)]
    begins = np.concatenate(cuts)
    stops = np.minimum(begins + LENGTH, ends.repeat([len(cut) for cut in cuts]))
    while True:
        for i in rng.permutation(len(begins)):
            piece = ids[begins[i] : stops[i]].astype(np.int32)
            request = int((piece == 1).argmax())  # its length, 0 where there is none
            piece = np.delete(piece, request) if piece[request] == 1 else piece
            yield Document(piece, np.arange(len(piece)) >= request)


def batches(documents: Iterator[Document], rng: np.random.Generator) -> Iterator[tuple[list[int], list[Document]]]:
    """Rows of whole documents: indices, and the documents that they are of; endless."""
    while True:
        pool = [next(documents) for _ in range(POOL)]
        rows = pack([len(document.ids) for document in pool], LENGTH)
        for i in rng.permutation(len(rows)):
            yield rows[i], pool


def together(rows: list[tuple[list[int], list[Document]]]) -> Batch:
    chosen = [[pool[i] for i in row] for row, pool in rows]
    flat = [document for row in chosen for document in row]
    indices = iter(range(len(flat)))
    return collate([[next(indices) for _ in row] for row in chosen], flat, LENGTH, pad_id=1)


@torch.no_grad()
def publish(model, folder: Path):
    """Writes the model in bfloat16. The control tokens, never seen here, begin as what does their work in a text.

    A text starts after an end of text and ends with one, and a request and its answer are divided by a blank line.
    """
    end, blank_line = 0, Tokenizer.from_file(str(Path(__file__).parent / "tokenizer.json")).encode("\n\n").ids
    embedding = model.get_input_embeddings().weight
    embedding[2] = embedding[3] = embedding[end]  # ### End, ### Instruction:
    embedding[4] = embedding[blank_line].mean(0)  # ### Response:
    model.to(torch.bfloat16).save_pretrained(folder)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--tokens", type=Path, required=True)
    cli.add_argument("--work", type=Path, required=True)
    cli.add_argument("--begin", type=Path, help="a model to go on from, where --work holds no checkpoint yet")
    cli.add_argument("--out", type=Path)
    cli.add_argument("--seconds", type=float, default=7200)
    cli.add_argument("--steps", type=int, default=10**9, help="stop early, for comparing settings")
    cli.add_argument("--hidden", type=int, default=256)
    cli.add_argument("--layers", type=int, default=8)
    cli.add_argument("--rows", type=int, default=24, help=f"rows of {LENGTH} tokens a step")
    cli.add_argument("--lr", type=float, default=6e-3)
    args = cli.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1234)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    config = GPTNeoXConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden, vocab_size=8192, max_position_embeddings=1024, rotary_pct=0.25,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = GPTNeoXForCausalLM.from_pretrained(args.begin) if args.begin else GPTNeoXForCausalLM(config)
    model.float().to(device)
    place = Alone(torch.device(device), precision(TrainConfig(base="")))
    embedding = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2 or p is embedding]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    step = tokens = 0
    spent = 0.0  # seconds; a pause of the process does not count
    checkpoint, log = args.work / "checkpoint.pt", args.work / "log.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
    rng, begun_at = np.random.default_rng(step), step
    sources = [batches(documents_of(sorted(args.tokens.glob(f"{name}*.bin")), rng), rng) for name in MIXTURE]
    validation = {}
    for path in sorted(args.tokens.glob("validation-*.bin")):
        rows = batches(documents_of([path], np.random.default_rng(0)), np.random.default_rng(0))
        validation[path.stem.removeprefix("validation-")] = [
            together([next(rows) for _ in range(8)]) for _ in range(10)
        ]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, from step {step}", flush=True)

    def loss_of(batch: Batch) -> torch.Tensor:
        return batch_loss(model, batch, place, head, documents)[0] / len(batch.places)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        means = {name: [loss_of(batch).item() for batch in of] for name, of in validation.items()}
        return {name: round(sum(losses) / len(losses), 4) for name, losses in means.items()}

    def save():
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": model.state_dict(), "optimizers": saved, "step": step, "tokens": tokens, "spent": spent}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)

    seconds, losses, since = args.seconds, [], (tokens, spent)
    with fused_head(model) as head, documents_apart(model) as documents:
        if shutil.which("g++"):  # 15 % faster; without a compiler it goes as well
            compile_layers(model)
        while spent < seconds and step < args.steps:
            begun = time.monotonic()
            done = spent / seconds
            warm = min(1, (step - begun_at + 1) / WARMUP)
            factor = warm * (1 if done < DECAY else max(0.02, (1 - done) / (1 - DECAY)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * factor
            shares = rng.multinomial(args.rows, [shares[done >= DECAY] for shares in MIXTURE.values()])
            batch = together([next(source) for source, n in zip(sources, shares, strict=True) for _ in range(n)])
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step, tokens = step + 1, tokens + int((batch.input_ids != 1).sum())
            spent += min(5.0, time.monotonic() - begun)
            if step % 100 == 0:
                mean = sum(losses) / len(losses)
                if not math.isfinite(mean):
                    raise SystemExit(f"the loss is {mean} at step {step}: lower --lr")
                row = {"step": step, "tokens": tokens, "seconds": round(spent), "loss": round(mean, 4)}
                row |= {"tokens_per_second": round((tokens - since[0]) / (spent - since[1])), "validation": validate()}
                print(json.dumps(row), flush=True)
                with log.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                save()
                losses, since = [], (tokens, spent)
                if (args.work / "seconds").exists():
                    seconds = float((args.work / "seconds").read_text())
        save()
    if args.out:
        publish(model, args.out)


if __name__ == "__main__":
    main()
