"""Pre-trains the embedded base model (GPT-NeoX, tied embeddings) from token files, on a CPU or one GPU.

    python data/base/pretrain.py --tokens DIR --work DIR --seconds 7200 --out data/base

DIR holds token files as encode.py writes them: for each source of MIXTURE one or several, and for each validation-*.bin
the loss is told. The schedule is a fraction of the time given: constant, then a linear decay over the last 30 %, with a
warm-up at each start. A killed run started again with the same --work goes on from its last checkpoint;
`echo N > WORK/seconds` changes the time given; `--seconds 0 --out DIR` only writes the model of the last checkpoint.

Muon (Jordan et al., 2024) trains the matrices and AdamW the embedding and the vectors. Matrix products run in
bfloat16: on a CPU with avx512_bf16 that is 4-7 times the rate of float32 (measured: 850 against 180 GFLOP/s).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

DECAY, LONG_ROWS = 0.7, 0.85  # where the decay with its mixture, and the long rows, begin
MIXTURE = {
    "main": (0.2, 0.1),
    "simple": (0.1, 0.12),
    "composed": (0.5, 0.46),
    "restate": (0.2, 0.32),
}  # before and in the decay
WARMUP = 100  # steps


class Rows:
    """Endless rows of `context + 1` ids; every pass over the tokens has a new offset and order."""

    def __init__(self, paths: list[Path], seed: int):
        self.ids = np.concatenate([np.fromfile(path, dtype=np.uint16) for path in paths])
        self.generator = np.random.default_rng(seed)
        self.order, self.context = [], 0

    def take(self, rows: int, context: int) -> torch.Tensor:
        if len(self.order) < rows or context != self.context:
            self.context, offset = context, self.generator.integers(context)
            starts = offset + context * np.arange((len(self.ids) - offset - 1) // context)
            self.order = self.generator.permutation(starts).tolist()
        starts = np.array([self.order.pop() for _ in range(rows)], dtype=np.int64)
        return torch.from_numpy(self.ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, 512 tokens at a time.

    The gradients are computed with the loss, so the [tokens, vocabulary] logits never exist as a whole: on a CPU
    page faults on that tensor cost more than the product itself (3,500 -> 4,800 tokens/s).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        low, loss = weight.bfloat16(), hidden.new_zeros(())
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for at in range(0, len(hidden), 512):
            part, target = hidden[at : at + 512].bfloat16(), targets[at : at + 512, None]
            logs = torch.log_softmax(part @ low.T, -1, dtype=torch.float32)
            loss -= logs.gather(1, target).sum()
            grad = logs.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            grad = (grad / len(hidden)).bfloat16()
            d_hidden[at : at + 512] = grad @ low
            d_weight += grad.T @ part
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None


def hidden_states(model, ids):
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state.float().flatten(0, 1)


@torch.no_grad()
def validate(model, rows, device):
    losses = []
    for part in rows.to(device).split(8):
        hidden = hidden_states(model, part[:, :-1])
        losses.append(cross_entropy(hidden @ model.get_output_embeddings().weight.T, part[:, 1:].flatten()).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def publish(model, folder: Path):
    """Writes the model in bfloat16. The control tokens, never seen here, get the mean embedding: a fair start."""
    embedding = model.get_input_embeddings().weight
    embedding[2:5] = torch.cat([embedding[:2], embedding[5:]]).mean(0)
    model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--tokens", type=Path, required=True)
    cli.add_argument("--work", type=Path, required=True)
    cli.add_argument("--out", type=Path)
    cli.add_argument("--seconds", type=float, default=7200)
    cli.add_argument("--steps", type=int, default=10**9, help="stop early, for comparing settings")
    cli.add_argument("--hidden", type=int, default=256)
    cli.add_argument("--layers", type=int, default=8)
    cli.add_argument("--rows", type=int, default=16, help="rows of 256 tokens a step")
    cli.add_argument("--lr", type=float, default=6e-3)
    cli.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    args = cli.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1234)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    config = GPTNeoXConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden, vocab_size=8192, max_position_embeddings=1024, rotary_pct=0.25,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        attn_implementation="eager" if device == "cpu" else "sdpa",  # eager is 1.3 times sdpa at 256 tokens here
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).to(device)
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not head]
    others = [p for p in model.parameters() if p.dim() != 2 or p is head]
    if args.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
    else:
        optimizers = [torch.optim.AdamW([*matrices, *others], lr=args.lr, betas=(0.9, 0.95), fused=True)]
    step = tokens = 0
    spent = 0.0  # seconds; a pause of the process does not count
    checkpoint, log = args.work / "checkpoint.pt", args.work / "log.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
    sources = [Rows(sorted(args.tokens.glob(f"{name}*.bin")), seed=step) for name in MIXTURE]
    validation = {
        path.stem.removeprefix("validation-"): Rows([path], seed=0).take(160, 256)
        for path in sorted(args.tokens.glob("validation-*.bin"))
    }
    choose, begun_at = np.random.default_rng(step), step
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, from step {step}", flush=True)

    def save():
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": model.state_dict(), "optimizers": saved, "step": step, "tokens": tokens, "spent": spent}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)

    def report(loss, rate):
        row = {
            "step": step,
            "tokens": tokens,
            "seconds": round(spent),
            "loss": round(loss, 4),
            "tokens_per_second": round(rate),
            "validation": {name: round(validate(model, rows, device), 4) for name, rows in validation.items()},
        }
        print(json.dumps(row), flush=True)
        with log.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    seconds, losses, since = args.seconds, [], (tokens, spent)
    while spent < seconds and step < args.steps:
        begun = time.monotonic()
        done = spent / seconds
        factor = min(1, (step - begun_at + 1) / WARMUP) * (1 if done < DECAY else max(0.02, (1 - done) / (1 - DECAY)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        rows, context = (args.rows, 256) if done < LONG_ROWS else (args.rows // 2, 512)
        shares = choose.multinomial(rows, [shares[done >= DECAY] for shares in MIXTURE.values()])
        ids = torch.cat([source.take(n, context) for source, n in zip(sources, shares, strict=True)]).to(device)
        loss = HeadLoss.apply(hidden_states(model, ids[:, :-1]), head, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step, tokens, spent = step + 1, tokens + rows * context, spent + min(5.0, time.monotonic() - begun)
        if step % 200 == 0:
            mean = sum(losses) / len(losses)
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {step}: lower --lr")
            report(mean, (tokens - since[0]) / (spent - since[1]))
            save()
            losses, since = [], (tokens, spent)
            if (args.work / "seconds").exists():
                seconds = float((args.work / "seconds").read_text())
    save()
    if args.out:
        publish(model, args.out)


if __name__ == "__main__":
    main()
