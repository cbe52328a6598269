"""The training loop: packed rows in, a fine-tuned model and its history out.

The loss of an update is the summed cross-entropy at its answer tokens divided by their number, over all micro-batches
and processes, so neither accumulation nor the number of processes changes the gradient. The LM head runs at answer
tokens only (`logits_to_keep`): at the other positions its output would be thrown away.
"""

import math
import platform
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel

from dolly.attention import documents_apart
from dolly.config import TrainConfig
from dolly.errors import UserError
from dolly.packing import IGNORED, Batch, Document, collate, pack
from dolly.progress import TrainingProgress

ROUND = 256  # the LM head sees a multiple of so many tokens


@dataclass
class History:
    """What happened. Losses are means in nats over answer tokens."""

    # {step, loss since the row before, learning_rate, heldout if it was measured there}
    rows: list[dict] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)  # before the first update, then as often as asked
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    heldout_by_category: dict[str, float] = field(default_factory=dict)


def precision(dtype: str) -> str:
    """The precision of the matrix products; `auto` is bfloat16 where the hardware is fast at it.

    On a CPU that is avx512_bf16 (measured: 4-7 times the rate of float32 products); others emulate it slowly.
    """
    if dtype == "auto":
        cuda = torch.cuda.is_available()
        fast = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported()
        return "bfloat16" if fast else "float32"
    return dtype


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def train(
    model: PreTrainedModel,
    training: list[Document],
    heldout: list[Document],
    length: int,
    pad_id: int,
    config: TrainConfig,
) -> History:
    """Fine-tunes `model` in place on rows of `length` tokens.

    Raises `UserError` when the loss is not finite; the step is named.
    """
    products = precision(config.dtype)
    mixed = "bf16" if products == "bfloat16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    rows = pack([len(document.ids) for document in training], length)
    updates = round(len(rows) * length / config.batch_tokens)  # in one epoch, of as equal a size as can be
    updates = min(max(1, updates), len(rows))
    micro_rows = max(1, config.micro_batch_tokens // length)
    total = updates * config.epochs if config.max_steps is None else min(updates * config.epochs, config.max_steps)
    evaluate_at = {round(total * i / config.evaluations) for i in range(1, config.evaluations + 1)}
    real = sum(len(document.ids) for document in training)
    history, evaluating = History(), 0.0

    def evaluate() -> None:
        if heldout:
            losses = heldout_loss(model, heldout, length, micro_rows, pad_id, accelerator)
            check_finite(losses[None], history.steps, config)
            history.heldout_by_category = {name: loss for name, loss in losses.items() if name is not None}
            history.heldout.append(losses[None])
            if history.rows:
                history.rows[-1]["heldout"] = losses[None]
            progress.note(f"held-out loss {losses[None]:.4f} after {history.steps} of {total} updates")

    torch.manual_seed(config.seed)
    with TrainingProgress(total) as progress, documents_apart(accelerator.unwrap_model(model)):
        progress.note(
            f"{len(training):,} records, {real:,} tokens in {len(rows):,} rows of {length} "
            f"({1 - real / (len(rows) * length):.1%} padding); "
            f"{total:,} updates with {products} products on {hardware()}"
        )
        evaluate()
        begun, summed, learned = time.monotonic(), torch.zeros((), device=accelerator.device), 0
        while history.steps < total:
            epoch, position = divmod(history.steps, updates)
            if position == 0:
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
            chosen = [rows[i] for i in order[len(rows) * position // updates : len(rows) * (position + 1) // updates]]
            answer_tokens = sum(training[i].answer_tokens() for row in chosen for i in row)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(history.steps, total, config)

            model.train()
            for at in range(0, len(chosen), micro_rows):
                batch = collate(chosen[at : at + micro_rows], training, length, pad_id).to(accelerator.device)
                loss = token_losses(model, batch, accelerator).sum()
                accelerator.backward(loss / answer_tokens)
                summed += loss.detach()
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            history.steps += 1
            history.tokens += sum(len(training[i].ids) for row in chosen for i in row)
            learned += answer_tokens
            if history.steps % 5 == 0 or history.steps in evaluate_at:  # reading the loss waits for the device
                loss = summed.item() / learned
                check_finite(loss, history.steps, config)
                history.rows.append(
                    {"step": history.steps, "loss": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
                )
                progress.update(history.steps, loss, history.tokens / (time.monotonic() - begun - evaluating))
                summed.zero_()
                learned = 0
            if history.steps in evaluate_at:
                paused = time.monotonic()
                evaluate()
                evaluating += time.monotonic() - paused
    history.seconds = time.monotonic() - begun
    return history


def check_finite(loss: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} at step {step}: nothing was written. "
            f"Lower --learning-rate (now {config.learning_rate}) or use --dtype float32."
        )


def token_losses(model: PreTrainedModel, batch: Batch, accelerator: Accelerator) -> torch.Tensor:
    """Cross-entropy at each learned token of a batch: [learned tokens], float32."""
    keep, learned = rounded(batch.keep)
    targets = torch.full(learned.shape, IGNORED, device=learned.device)
    targets[learned] = batch.targets
    with accelerator.autocast():
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,  # without an attention mask they keep the documents apart
            logits_to_keep=keep,
            use_cache=False,  # a cache would turn the document mask off
        ).logits
    losses = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets, reduction="none", ignore_index=IGNORED)
    return losses[learned]


def rounded(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask that keeps up to `ROUND` - 1 more tokens, and which of the kept ones [kept tokens] were asked for.

    oneDNN compiles a product for every shape and holds on to it: with a new number of answer tokens in every batch a
    run on the CPU grew by 5 MiB an update, to 5.2 GiB after 504.
    """
    more = torch.zeros_like(keep).flatten()
    more[(~keep).flatten().nonzero().flatten()[: -int(keep.sum()) % ROUND]] = True
    wider = keep | more.view_as(keep)
    return wider, keep[wider]


@torch.no_grad()
def heldout_loss(model, documents: list[Document], length: int, micro_rows: int, pad_id: int, accelerator) -> dict:
    """Mean loss of an answer token by category; `None` is the key of all of them together."""
    model.eval()
    rows = pack([len(document.ids) for document in documents], length)
    sums, counts = Counter(), Counter()
    for at in range(0, len(rows), micro_rows):
        batch = collate(rows[at : at + micro_rows], documents, length, pad_id).to(accelerator.device)
        for owner, loss in zip(batch.documents.tolist(), token_losses(model, batch, accelerator).tolist(), strict=True):
            for name in (None, documents[owner].category):
                sums[name] += loss
                counts[name] += 1
    return {name: sums[name] / counts[name] for name in sums}


def rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of the highest; cosine and linear end at a tenth of it."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return 0.1 + 0.9 * shape
