"""Attention inside the documents of packed rows, on the CPU.

A model of transformers describes what its tokens may see as a mask of a whole row, most of it other documents. Where
that mask says documents and nothing more, they are gathered by length into a few batches, multiplied there and put
back: an update of the embedded base takes 0.65 of its time in bfloat16, 0.88 in float32. Any other mask (a sliding
window shorter than a document, one that the model has changed) goes to SDPA as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dolly_documents"
STEP = 64  # a padded length is a multiple of it: 32 makes more products, 128 larger ones; both were slower in bfloat16
TOGETHER = (
    8  # documents in a group are a multiple of it, so that few shapes occur: oneDNN holds a compiled product of each
)
LONGEST = 512  # tokens whose scores are held at once; beyond, SDPA is as fast in float32 and holds none
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")  # options with which a model asks for other scores


@contextmanager
def documents_apart(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model that would use SDPA on the CPU attends document by document, to the same results."""
    usual = model.config._attn_implementation
    if usual == "sdpa" and model.device.type == "cpu" and model.is_backend_compatible():
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


@dataclass
class Layout:
    """How the vectors of a batch, [tokens * heads, size], lie in groups of documents, [slots, size].

    A slot is a place of (document, head, position). vectors: the vector in each slot; slots: the slot of each vector;
    padding: the slots beyond the end of their document, which hold zeros.
    """

    vectors: torch.Tensor
    slots: torch.Tensor
    padding: torch.Tensor

    def gather(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.index_select(0, self.vectors).index_fill_(0, self.padding, 0)

    def put_back(self, slots: torch.Tensor) -> torch.Tensor:
        return slots.index_select(0, self.slots)


class Move(torch.autograd.Function):
    """`there(x)`, with `back` for its gradient: each vector has one slot, so nothing is to be added up."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, there: Callable, back: Callable) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return ctx.back(gradient), None, None


class Documents:
    """The documents of a batch of packed rows, grouped by padded length."""

    def __init__(self, positions: torch.Tensor):
        """positions: [rows, length], counted from 0 in each document."""
        starts = (positions.flatten() == 0).nonzero().flatten()
        lengths = torch.cat([starts, starts.new_tensor([positions.numel()])]).diff()
        padded = (lengths + STEP - 1) // STEP * STEP
        self.groups = [(n, filled(starts[padded == n]), filled(lengths[padded == n])) for n in padded.unique().tolist()]
        self.layouts: dict[int, Layout] = {}

    def layout(self, heads: int) -> Layout:
        if heads not in self.layouts:  # the first layer; the others have as many heads
            vectors, real = [], []
            for padded, starts, lengths in self.groups:
                position, head = torch.arange(padded), torch.arange(heads)[:, None]
                inside = (position < lengths[:, None, None]).expand(-1, heads, -1)
                vector = (starts[:, None, None] + position) * heads + head
                vectors.append(torch.where(inside, vector, 0).flatten())
                real.append(inside.flatten())
            vectors, real = torch.cat(vectors), torch.cat(real)
            slots = real.nonzero().flatten()[vectors[real].argsort()]
            self.layouts[heads] = Layout(vectors, slots, (~real).nonzero().flatten())
        return self.layouts[heads]


def document_mask(**asked) -> torch.Tensor | None:
    """The mask of SDPA; where it is that of documents in every token, they are its attribute `documents`."""
    mask = sdpa_mask(**asked | {"allow_is_causal_skip": False})
    if mask is not None and mask.shape[2] == mask.shape[3]:
        positions = mask[:, 0].sum(-1) - 1  # in a document a token sees itself and all before it
        follows = (positions[:, 1:] == 0) | (positions[:, 1:] == positions[:, :-1] + 1)
        token = torch.arange(mask.shape[3])
        visible = (token >= (token - positions)[:, None, :, None]) & (token <= token[:, None])
        if follows.all() and torch.equal(mask, visible):
            mask.documents = Documents(positions)
    return mask


def document_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """What transformers calls in each layer. query: [rows, heads, length, size]; gives [rows, length, heads, size]."""
    documents = getattr(attention_mask, "documents", None)
    if documents is None or any(options.get(name) is not None for name in CHANGES_SCORES):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    rows, heads, length, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    drop = dropout if module.training else 0.0
    layout = documents.layout(heads)
    slots = [padded * heads * len(starts) for padded, starts, _ in documents.groups]

    def grouped(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = repeat_kv(x, heads // x.shape[1]).to(value.dtype)  # autocast leaves rotated queries and keys in float32
        return Move.apply(x.transpose(1, 2).reshape(-1, x.shape[3]), layout.gather, layout.put_back).split(slots)

    outputs = []
    for (padded, _, _), *parts in zip(documents.groups, *map(grouped, (query, key, value)), strict=True):
        q, k, v = (part.view(-1, padded, part.shape[1]) for part in parts)
        if padded <= LONGEST:
            scores = torch.baddbmm(later(padded, q.dtype), q, k.transpose(1, 2), alpha=scale)
            output = torch.bmm(F.dropout(scores.softmax(-1), drop), v)
        else:
            q, k, v = q[None], k[None], v[None]
            output = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True, scale=scale)
        outputs.append(output.view(-1, value.shape[3]))
    return Move.apply(torch.cat(outputs), layout.put_back, layout.gather).view(rows, length, heads, -1), None


def filled(group: torch.Tensor) -> torch.Tensor:
    """`group` with documents of no tokens up to a multiple of `TOGETHER`."""
    return F.pad(group, (0, -len(group) % TOGETHER))


@cache
def later(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Added to the scores of a document, hides from each token those after it: [length, length]."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)
