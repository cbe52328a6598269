"""The LM head and its cross-entropy as one operation, a chunk of tokens at a time.

The logits of a batch are the largest thing in fine-tuning a small model: those of 2,300 tokens of a vocabulary of
50,304 take 0.4 GiB, and cross-entropy holds three more copies. Here a chunk of them becomes its own gradient and is
multiplied back before the next, in memory that is used again. As in Liger's fused linear cross-entropy (Hsu et al.
2024, arXiv:2410.10989) the gradients are made in the forward pass, where the logits are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from dolly.packing import IGNORED

LOGITS = 2**25  # of a chunk, 64 MiB in bfloat16: half and twice as many are as fast on the CPU
SLICE = 1024  # rows of a product that the CPU casts and adds at a time: the whole at once takes seven times as long
MULTIPLE = 256  # tokens of a chunk: with fewer the CPU spends its time in adding up the gradients of the chunks


class HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of `hidden @ weight.T + bias`, [], and that of each token, [tokens]; both float32.

    hidden: [tokens, size]; weight: [vocabulary, size]; targets: [tokens], `IGNORED` where there is nothing to learn;
    dtype: of the products. Losses and the gradients of weight and bias are added up in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype):
        x, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        learned = (targets != IGNORED)[:, None]
        targets = targets.clamp(min=0)[:, None]
        losses = x.new_empty(targets.shape, dtype=torch.float32)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(x) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        size = max(1, LOGITS // len(w) // MULTIPLE) * MULTIPLE
        added = SLICE if x.device.type == "cpu" else len(w)
        for at in range(0, len(x), size):
            chunk = slice(at, at + size)
            logits = scratch(len(x[chunk]), len(w), dtype, x.device)
            if b is None:
                torch.mm(x[chunk], w.T, out=logits)
            else:
                torch.addmm(b, x[chunk], w.T, out=logits)
            logs = scratch(*logits.shape, torch.float32, x.device, "logs").copy_(logits)
            torch.log_softmax(logs, -1, out=logs)
            losses[chunk] = -logs.gather(1, targets[chunk]) * learned[chunk]
            if not any(ctx.needs_input_grad):
                continue
            d_logits = torch.softmax(logits, -1, out=logits)
            # From the float32 loss: p - 1 in bfloat16 would be 0 for a target that is nearly learned.
            d_logits[torch.arange(len(d_logits), device=x.device), targets[chunk, 0]] = torch.expm1(
                -losses[chunk, 0]
            ).to(dtype)
            if for_hidden:
                torch.mm(d_logits, w, out=d_hidden[chunk])
                d_hidden[chunk] *= learned[chunk]
            if for_weight:
                masked = x[chunk] * learned[chunk]
                product = torch.mm(d_logits.T, masked, out=scratch(*w.shape, dtype, x.device, "product"))
                for rows, more in zip(d_weight.split(added), product.split(added), strict=True):
                    rows += more
            if for_bias:
                d_bias += torch.mv(d_logits.T, learned[chunk, 0].to(dtype))
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses.squeeze(1)

    @staticmethod
    def backward(ctx, gradient, _):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve one backward pass
        return *[None if made is None else made.mul_(gradient) for made in gradients], None, None


class Head:
    """What `fused_head` yields: give it the targets, call the model, read the losses of the tokens."""

    def __init__(self, linear: torch.nn.Linear):
        self.linear, self.targets, self.losses, self.total = linear, None, None, None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Stands for the forward pass of the LM head: what the model takes for its logits is the loss, [1, 1]."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.linear.weight.dtype
        with torch.autocast(kind, enabled=False):
            hidden = hidden.reshape(-1, hidden.shape[-1])
            total, self.losses = HeadLoss.apply(hidden, self.linear.weight, self.linear.bias, self.targets, dtype)
        self.total = total.view(1, 1)
        return self.total


@contextmanager
def fused_head(model: PreTrainedModel) -> Iterator[Head | None]:
    """Within it the LM head gives losses instead of logits; None for a model whose head cannot be replaced so.

    That is one whose head is more than a matrix (an adapter, four bits) or that changes the logits (a soft cap, a
    scale): whether it does is seen from what it returns for a token, and the model then stays as it was.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        yield None
        return
    head = Head(linear)
    linear.forward = head
    try:
        yield head if _untouched(model, head) else None
    finally:
        linear.__dict__.pop("forward", None)


@torch.no_grad()
def _untouched(model: PreTrainedModel, head: Head) -> bool:
    ids, head.targets = torch.zeros((1, 1), dtype=torch.long, device=model.device), None
    head.targets = ids.view(-1)
    training = model.training
    same = model.eval().forward(input_ids=ids, use_cache=False).logits is head.total
    model.train(training)
    if not same:
        del head.linear.forward
    return same


@lru_cache(maxsize=6)
def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device, use: str = "logits") -> torch.Tensor:
    """Memory that is used again: the system would map the pages of such large pieces anew every time."""
    return torch.empty(rows, columns, dtype=dtype, device=device)
