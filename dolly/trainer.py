"""The training loop: packed rows in, a fine-tuned model and its history out.

The loss of an update is the summed cross-entropy at its answer tokens divided by their number, over all micro-batches
and processes, so neither accumulation nor the number of processes changes the gradient. The LM head runs at answer
tokens only (`logits_to_keep`): at the other positions its output would be thrown away. Everything that a run is, is in
`Run`: the step tells the place in the data and in the schedule, so a checkpoint of it resumes exactly.
"""

import contextlib
import hashlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel

from dolly import checkpoint
from dolly.attention import documents_apart
from dolly.config import TrainConfig
from dolly.distributed import accelerator_of, accumulating, share, whole
from dolly.errors import UserError
from dolly.head import Head, fused_head
from dolly.model import overflows_in_float16
from dolly.packing import IGNORED, Batch, Document, collate, pack
from dolly.progress import TrainingProgress

LOG_EVERY = 5  # updates between two looks at the loss, each of which waits for the device
# Settings that must be the same when a run resumes.
OF_A_RUN = (
    "base", "batch_tokens", "micro_batch_tokens", "learning_rate", "schedule", "warmup", "weight_decay",
    "max_grad_norm", "optimizer", "seed", "evaluations", "lora_rank", "lora_alpha", "quantize", "deepspeed",
)  # fmt: skip
ROUND = 256  # on the CPU the LM head sees a multiple of so many tokens


@dataclass
class History:
    """What happened. Losses are means in nats over answer tokens."""

    # {step, loss since the row before, learning_rate, heldout if it was measured there}
    rows: list[dict] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)  # before the first update, then as often as asked
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without the evaluations
    heldout_by_category: dict[str, list[float]] = field(default_factory=dict)  # as `heldout`


@dataclass
class Run:
    """A run at the end of an update. Model and optimizer are as `accelerator` prepared them."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sharded: bool  # by DeepSpeed, which then keeps the state of both
    history: History = field(default_factory=History)


def train(
    model: PreTrainedModel,
    training: list[Document],
    heldout: list[Document],
    length: int,
    pad_id: int,
    config: TrainConfig,
    checkpoints: Path | None = None,
) -> tuple[History, PreTrainedModel | None]:
    """Fine-tunes `model` in place on rows of `length` tokens; gives the history and, in the first process, the model.

    checkpoints: the folder to keep them in, and to resume from when `config.resume` is set. Raises `UserError` when the
    loss is not finite, naming the step, and when a checkpoint cannot be written or read.
    """
    products = precision(config)
    accelerator = accelerator_of(config, products)
    rows = pack([len(document.ids) for document in training], length)
    updates = round(len(rows) * length / config.batch_tokens)  # in one epoch, of as equal a size as can be
    updates = min(max(1, updates), len(rows))
    total = updates * config.epochs if config.max_steps is None else min(updates * config.epochs, config.max_steps)
    micro_rows = max(1, config.micro_batch_tokens // length)
    evaluate_at = {round(total * i / config.evaluations) for i in range(1, config.evaluations + 1)}
    save_at = set(range(config.checkpoint_every, total, config.checkpoint_every)) if config.checkpoint_every else set()
    save_at = save_at if checkpoints else set()
    belongs = {
        "records": fingerprint(training), "rows": len(rows), "length": length, "updates": total, "products": products,
        "processes": accelerator.num_processes, **{name: getattr(config, name) for name in OF_A_RUN},
    }  # fmt: skip
    real = sum(len(document.ids) for document in training)
    recompute = recomputes(model, length * micro_rows, products, config)

    with contextlib.ExitStack() as during:
        head = during.enter_context(fused_head(model))
        documents = during.enter_context(documents_apart(model))
        if recompute:
            model.activation_checkpointing_enable()
            during.callback(model.activation_checkpointing_disable)
        if config.compile:
            compile_layers(model)
        prepared, optimizer = accelerator.prepare(model, optimizer_of(model, config))
        run = Run(accelerator, prepared, optimizer, config.deepspeed is not None)
        history = run.history
        losses_of = partial(batch_loss, prepared, accelerator=accelerator, head=head, documents=documents)
        progress = during.enter_context(TrainingProgress(total, quiet=not accelerator.is_main_process))

        def evaluate() -> None:
            if heldout:
                prepared.eval()
                sums = document_losses(losses_of, heldout, length, micro_rows, pad_id, accelerator)
                measured = by_category(sums, heldout)
                check_finite(measured[None], history.steps, config)
                history.heldout.append(measured.pop(None))
                for name, loss in measured.items():
                    history.heldout_by_category.setdefault(name, []).append(loss)
                if history.rows:
                    history.rows[-1]["heldout"] = history.heldout[-1]
                progress.note(f"held-out loss {history.heldout[-1]:.4f} after {history.steps} of {total} updates")

        torch.manual_seed(config.seed + accelerator.process_index)
        progress.note(
            f"{len(training):,} records, {real:,} tokens in {len(rows):,} rows of {length} "
            f"({1 - real / (len(rows) * length):.1%} padding); "
            f"{total:,} updates with {products} products on {hardware()}"
            + (f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else "")
            + (", layers computed again for the gradient" if recompute else "")
        )
        if config.resume and checkpoints and (folder := checkpoint.newest(checkpoints)):
            checkpoint.load(run, folder, belongs)
            progress.note(f"resumed from {folder}")
        else:
            evaluate()
        begun, summed, learned = time.monotonic() - history.seconds, torch.zeros((), device=accelerator.device), 0

        while history.steps < total:
            epoch, position = divmod(history.steps, updates)
            order = shuffled(len(rows), config.seed + epoch)
            chosen = [rows[i] for i in order[len(rows) * position // updates : len(rows) * (position + 1) // updates]]
            answer_tokens = sum(training[i].answer_tokens() for row in chosen for i in row)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(history.steps, total, config)

            prepared.train()
            mine = share(chosen, accelerator.num_processes, accelerator.process_index, micro_rows)
            for number, micro in enumerate(mine, 1):
                with accumulating(accelerator, prepared, last=number == len(mine)):
                    loss, _ = losses_of(collate(micro, training, length, pad_id))
                    # Processes average their gradients: the sum that is wanted is so many times the average.
                    accelerator.backward(loss * (accelerator.num_processes / answer_tokens))
                summed += loss.detach()
            accelerator.clip_grad_norm_(prepared.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            history.steps += 1
            history.tokens += sum(len(training[i].ids) for row in chosen for i in row)
            learned += answer_tokens
            if history.steps % LOG_EVERY == 0 or history.steps in evaluate_at | save_at:
                loss = accelerator.reduce(summed).item() / learned
                check_finite(loss, history.steps, config)
                history.rows.append(
                    {"step": history.steps, "loss": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
                )
                history.seconds = time.monotonic() - begun
                progress.update(history.steps, loss, history.tokens / history.seconds)
                summed.zero_()
                learned = 0
            if history.steps in evaluate_at | save_at:
                paused = time.monotonic()
                if history.steps in evaluate_at:
                    evaluate()
                if history.steps in save_at:
                    checkpoint.save(run, checkpoints, belongs)
                begun += time.monotonic() - paused
        return history, whole(accelerator, prepared, model)


def batch_loss(
    model: torch.nn.Module,
    batch: Batch,
    accelerator: Accelerator,
    head: Head | None = None,
    documents: Callable[[torch.Tensor], torch.Tensor | None] = lambda positions: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy at the learned tokens of a batch: their sum, which backward starts from, and each, float32.

    head: of `fused_head`; documents: of `documents_apart`; without them the model computes logits, and masks by the
    positions.
    """
    mask = documents(batch.position_ids)
    batch = batch.to(accelerator.device)
    if mask is not None and accelerator.device.type == "cuda":
        batch = batch.flat()
    keep, targets, learned = kept(batch)
    if head is not None:
        head.targets = targets
    with accelerator.autocast():
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=mask,
            logits_to_keep=keep,
            use_cache=False,  # a cache would turn the masking by positions off
        ).logits
    if head is not None:
        return logits.squeeze(), head.losses[learned]
    logits = logits.view(-1, logits.shape[-1])
    losses = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORED)
    return losses.sum(), losses[learned]


def kept(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | slice]:
    """The tokens that the LM head sees, their targets or `IGNORED`, and which of them are learned.

    One row says it in numbers, which no one has to wait for. On the CPU up to `ROUND` - 1 more tokens are seen: oneDNN
    compiles a product for every shape and holds on to it. With a new number in every batch a run grew by 5 MiB an
    update, to 5.2 GiB after 504.
    """
    device = batch.input_ids.device
    if device.type == "cuda" and len(batch.input_ids) == 1:
        return batch.places, batch.targets, slice(None)
    keep = batch.keep.flatten()
    if device.type == "cpu":
        keep[(~keep).nonzero().flatten()[: -len(batch.places) % ROUND]] = True
    targets = torch.full_like(keep, IGNORED, dtype=torch.long).index_copy(0, batch.places, batch.targets)[keep]
    return keep.view_as(batch.input_ids), targets, targets != IGNORED


@torch.no_grad()
def document_losses(
    losses_of: Callable, documents: list[Document], length: int, micro_rows: int, pad_id: int, accelerator: Accelerator
) -> torch.Tensor:
    """The summed loss of the learned tokens of each document and their number, [documents, 2], float64 on the CPU.

    losses_of: `batch_loss` with its model, which is in eval mode.
    """
    sums = torch.zeros(len(documents), 2, dtype=torch.float64)
    rows = pack([len(document.ids) for document in documents], length)
    for micro in share(rows, accelerator.num_processes, accelerator.process_index, micro_rows):
        batch = collate(micro, documents, length, pad_id)
        _, losses = losses_of(batch)
        each = torch.stack([losses.double().cpu(), torch.ones(len(losses), dtype=torch.float64)], 1)
        sums.index_add_(0, batch.documents, each)
    return accelerator.reduce(sums.to(accelerator.device)).cpu()


def by_category(sums: torch.Tensor, documents: list[Document]) -> dict[str | None, float]:
    """Mean loss of a token by category; `None` is the key of all of them together. sums: of `document_losses`."""
    names = sorted({document.category for document in documents})
    number = torch.tensor([names.index(document.category) for document in documents])
    each = torch.zeros(len(names), 2, dtype=sums.dtype).index_add_(0, number, sums)
    loss, count = sums.sum(0).tolist()
    return {None: loss / count} | {name: loss / n for name, (loss, n) in zip(names, each.tolist(), strict=True) if n}


def optimizer_of(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": config.learning_rate, "betas": (0.9, 0.95)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in model.modules():  # whose gradients are too uneven for 8 bits (Dettmers et al. 2022, section 2.3)
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW8bit(groups, **options)


def recomputes(model: PreTrainedModel, tokens: int, products: str, config: TrainConfig) -> bool:
    """Whether the layers are computed again for the gradient: as configured, else where memory asks for it.

    A layer keeps 34 bytes of each of its values a token in 16 bits (Korthikanti et al. 2022, arXiv:2205.05198, without
    the scores of attention, which are not kept); gradient, optimizer and a copy in 16 bits take 14 bytes a weight.
    """
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing == "on"
    shape = model.config.get_text_config()
    layers = 34 * tokens * shape.hidden_size * shape.num_hidden_layers * (2 if products == "float32" else 1)
    state = 14 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return layers + state > 0.9 * free and model.supports_gradient_checkpointing


def compile_layers(model: torch.nn.Module) -> None:
    """Compiles each layer in place: all share one compilation, which the whole model in one piece would not."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            for layer in module:
                layer.compile()


@lru_cache(maxsize=1)
def shuffled(count: int, seed: int) -> list[int]:
    """The order of the rows in an epoch: the same in every process."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def fingerprint(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.asarray(document.ids, dtype=np.int32).tobytes())
        digest.update(np.asarray(document.learned, dtype=bool).tobytes())
    return digest.hexdigest()[:16]


def rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of the highest; cosine and linear end at a tenth of it."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return 0.1 + 0.9 * shape


def check_finite(loss: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} at step {step}: nothing was written. "
            f"Lower --learning-rate (now {config.learning_rate}) or use --dtype float32."
        )


def precision(config: TrainConfig) -> str:
    """The precision of the matrix products; `auto` is bfloat16 where the hardware is fast at it.

    Raises `UserError` for a float16 that the base would exceed, or that the machine has no gradient scaler for.
    """
    cuda = torch.cuda.is_available()
    if config.dtype == "float16" and not cuda:
        raise UserError("--dtype float16 needs a GPU: use auto, bfloat16 or float32.")
    if config.dtype == "float16" and overflows_in_float16(config.base):
        raise UserError(f"{config.base} exceeds the range of float16 (65,504): use --dtype auto, bfloat16 or float32.")
    if config.dtype != "auto":
        return config.dtype
    if torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bfloat16_pays():
        return "bfloat16"
    return "float16" if cuda and not overflows_in_float16(config.base) else "float32"


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 at more than 1.25 times the rate of float32.

    That is measured, in 10 ms, for the instructions alone do not tell: among CPUs with avx512_bf16 an AMD EPYC has 4-7
    times the rate, an Intel Xeon without AMX 0.55 times; others emulate it slowly.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    took = {torch.float32: [], torch.bfloat16: []}
    for dtype in [*took] * 5:
        matrix = torch.ones(512, 512, dtype=dtype)
        begun = time.perf_counter()
        matrix @ matrix
        took[dtype].append(time.perf_counter() - begun)
    return min(took[torch.float32]) > 1.25 * min(took[torch.bfloat16])


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
