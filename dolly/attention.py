"""Attention inside the documents of packed rows.

A model of transformers sees a packed row under a mask of the whole row, most of it other documents. Here the batch
says where its documents are, in the place of that mask, and each is attended to by itself:

    with documents_apart(model) as documents:
        model(input_ids=..., position_ids=..., attention_mask=documents(position_ids), use_cache=False)

On CUDA that is FlashAttention (`torch.nn.attention.varlen`). On the CPU documents are gathered by length into a few
batches, multiplied there and put back: with rows of 512 tokens the passes of the embedded base take 0.68 of their time
under masks in bfloat16, 0.89 in float32, with 1024 tokens 0.54 and 0.73. `check_apart` tells before a run whether a
model keeps documents apart at all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gptj.modeling_gptj import GPTJAttention

from dolly.errors import UserError

NAME = "dolly_documents"
STEP = 64  # a padded length is a multiple of it: 128 was slower by 8 %, 32 no faster
TOGETHER = 8  # documents multiplied at once, or half, a quarter ...: oneDNN compiles a product for each such shape
BLOCK = 256  # queries multiplied at once, with the keys up to their end: half the time of all keys at 512 tokens
LONGEST = 1024  # tokens whose weights are kept for the gradient; beyond, SDPA is as fast in float32 and keeps none
FLASH_SIZES = range(8, 257, 8)  # of the vectors that FlashAttention takes
PROBED = 2**35  # weights times tokens of a row that `check_apart` takes a few seconds for on the CPU
LEAK = 1e-4  # of the logits' size: other neighbours change nothing at all, in any precision, where documents are apart


@contextmanager
def documents_apart(model: PreTrainedModel) -> Iterator[Callable[[torch.Tensor], torch.Tensor | None]]:
    """Within it, `model` (or the PeftModel around it) attends document by document, to the same results.

    Yields what makes the `attention_mask` of a batch from its positions, [rows, length], on the host and counted from 0
    in each document. For a model that cannot attend so it is None: transformers then masks by the positions, unless a
    cache is used.
    """
    usual = model.config._attn_implementation
    outside = [module for module in model.modules() if type(module) is GPTJAttention]
    if tells_all(model):
        model.set_attn_implementation(NAME)
    for module in outside:
        module._attn = partial(gptj_attention, module)
    able = outside or model.config._attn_implementation == NAME
    try:
        yield lambda positions: edges_of(positions, model.device) if able else None
    finally:
        model.set_attn_implementation(usual)
        for module in outside:
            del module._attn


def tells_all(model: PreTrainedModel) -> bool:
    """Whether its layers tell the attention function what a mask would, a window for one, as for FlashAttention.

    Those that neither SDPA nor a soft cap serves ask for more: attention sinks (GPT-OSS).
    """
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    common = softcap or model.config._attn_implementation == "sdpa"
    return model._supports_attention_backend and model._supports_flash_attn and common


def edges_of(positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where the documents of a batch begin, and where the last one ends: int32, [rows, 1, longest document, edges].

    In transformers a mask of four dimensions reaches the layers as it is, and recomputed ones get it again. Only the
    last dimension holds anything; the sizes of the others are what the host would else have to ask the device for. The
    batch itself may be given to the model as [rows, length] or as one row.
    """
    flat = positions.flatten()
    follows = flat[1:] == flat[:-1] + 1
    if positions[:, 0].any() or not (follows | (flat[1:] == 0)).all():
        raise ValueError("positions must count from 0 in each document, and each row begin with one")
    edges = torch.cat([(flat == 0).nonzero().flatten(), torch.tensor([len(flat)])]).int()
    longest = int(edges.diff().max())
    return edges.to(device, non_blocking=True).expand(len(positions), 1, longest, -1)


def are_edges(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32


def document_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **options
):
    """What transformers calls in each layer. query: [rows, heads, length, size]; gives [rows, length, heads, size]."""
    if are_edges(attention_mask):
        return attend(attention_mask, query, key, value, scaling, dropout, sliding_window, softcap), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, **options
    )


def gptj_attention(module, query, key, value, attention_mask=None):
    """`GPTJAttention._attn`, which takes no part in the attention interface; gives [rows, heads, length, size]."""
    if not are_edges(attention_mask):
        return GPTJAttention._attn(module, query, key, value, attention_mask)
    dropout = module.attn_dropout.p if module.training else 0.0
    return attend(attention_mask, query, key, value, dropout=dropout).transpose(1, 2), None


@torch.compiler.disable  # its shapes are those of the documents, other ones in each batch
def attend(edges, query, key, value, scale=None, dropout=0.0, window=None, softcap=None) -> torch.Tensor:
    """Attention of each token to those before it in its document, at most `window` of them with itself.

    edges: of `edges_of`; query: [rows, heads, length, size]; key, value: the same, or with fewer heads;
    softcap: scores are bent to stay within it (Gemma 2, arXiv:2408.00118). Gives [rows, length, heads, size].
    """
    rows, _, length, size = query.shape
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    # Rotated ones are float32 under autocast. From here on [tokens, heads, size].
    q, k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = size**-0.5 if scale is None else scale
    if not dropout and softcap is None and flash_takes(q, v):
        attended = by_flash(edges, q, k, v, scale, window)
    else:
        attended = (by_length if kind == "cpu" else by_mask)(edges, q, k, v, scale, dropout, window, softcap)
    return attended.unflatten(0, (rows, length))


def flash_takes(q: torch.Tensor, v: torch.Tensor) -> bool:
    able = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return able and half and q.shape[2] == v.shape[2] and q.shape[2] in FLASH_SIZES


def by_flash(edges, q, k, v, scale, window=None) -> torch.Tensor:
    borders, longest = edges[0, 0, 0], edges.shape[2]
    seen = (-1 if window is None else window - 1, 0)  # tokens before and after a token
    more = {"scale": scale, "window_size": seen, "enable_gqa": k.shape[1] != q.shape[1]}
    return varlen_attn(q, k, v, borders, borders, longest, longest, **more)


def by_mask(edges, q, k, v, scale, dropout=0.0, window=None, softcap=None) -> torch.Tensor:
    """What FlashAttention does not take on a GPU, without a word from the device to the host."""
    token = torch.arange(len(q), dtype=torch.int32, device=q.device)
    document = torch.searchsorted(edges[0, 0, 0], token, right=True).view(len(edges), 1, -1)
    length = document.shape[2]
    back = token[:length, None] - token[:length]
    mask = (document[..., None] == document[..., None, :]) & (back >= 0) & (back < (window or length))
    q, k, v = (spread(x, q.shape[1]).unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    if softcap is None:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    else:
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
        attended = F.dropout(scores.masked_fill(~mask, float("-inf")).softmax(-1), dropout) @ v
    return attended.transpose(1, 2).flatten(0, 1)


def spread(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[tokens, heads or fewer, size] for as many heads, in the order of transformers' `repeat_kv`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


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


@lru_cache(maxsize=2)  # the layers of a batch, and their recomputation
def layout(edges: tuple[int, ...], heads: int) -> tuple[list[tuple[int, int]], Layout]:
    """The groups of the documents between `edges`, as (padded length, documents), and how their vectors lie in them."""
    starts, lengths = torch.tensor(edges[:-1]), torch.tensor(edges).diff()
    padded = (lengths + STEP - 1) // STEP * STEP
    groups, vectors, real = [], [], []
    for longest in padded.unique().tolist():
        alike = (padded == longest).nonzero().flatten()
        start, length = starts[alike, None, None], lengths[alike, None, None]
        position, head = torch.arange(longest), torch.arange(heads)[:, None]
        inside = (position < length).expand(-1, heads, -1)
        vectors.append(torch.where(inside, (start + position) * heads + head, 0).flatten())
        real.append(inside.flatten())
        groups += [(longest, documents) for documents in powers_of_two(len(alike))]
    vectors, real = torch.cat(vectors), torch.cat(real)
    slots = real.nonzero().flatten()[vectors[real].argsort()]
    return groups, Layout(vectors, slots, (~real).nonzero().flatten())


def powers_of_two(count: int) -> list[int]:
    """`count` as a sum of as few powers of two as can be, none above `TOGETHER`."""
    whole, rest = divmod(count, TOGETHER)
    return [TOGETHER] * whole + [1 << bit for bit in range(rest.bit_length()) if rest >> bit & 1]


def by_length(edges, q, k, v, scale, dropout=0.0, window=None, softcap=None) -> torch.Tensor:
    heads, borders = q.shape[1], tuple(edges[0, 0, 0].tolist())
    if borders[-1] != len(q):
        raise ValueError(f"the documents are those of {borders[-1]} tokens, not of {len(q)}")
    groups, places = layout(borders, heads)
    slots = [padded * heads * documents for padded, documents in groups]

    def grouped(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return Move.apply(spread(x, heads).reshape(-1, x.shape[2]), places.gather, places.put_back).split(slots)

    outputs = []
    for (padded, _), *parts in zip(groups, *map(grouped, (q, k, v)), strict=True):
        a, b, c = (part.view(-1, padded, part.shape[1]) for part in parts)
        outputs.append(causal(a, b, c, scale, dropout, window, softcap).reshape(-1, c.shape[2]))
    return Move.apply(torch.cat(outputs), places.put_back, places.gather).unflatten(0, (-1, heads))


def causal(q, k, v, scale, dropout, window, softcap) -> torch.Tensor:
    """Attention in documents of one length, [documents * heads, length, size]."""
    length = q.shape[1]
    window = None if window is None or window >= length else window
    if length > LONGEST and window is None and softcap is None:
        q, k, v = q[None], k[None], v[None]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)[0]
    outputs = []
    for start in range(0, length, BLOCK):
        block, first = q[:, start : start + BLOCK], 0 if window is None else max(0, start + 1 - window)
        seen = slice(first, start + block.shape[1])
        keys, hidden = k[:, seen].transpose(1, 2), unseen(block.shape[1], seen.stop - first, window, q.dtype)
        if softcap is None:
            scores = torch.baddbmm(hidden, block, keys, alpha=scale)
        else:
            scores = torch.tanh(torch.bmm(block, keys) * (scale / softcap)) * softcap + hidden
        outputs.append(torch.bmm(F.dropout(scores.softmax(-1), dropout), v[:, seen]))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


@cache
def unseen(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Added to scores [queries, keys], hides what each of the last `queries` tokens does not see."""
    back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill((back < 0) | (back >= (window or keys)), float("-inf"))


@torch.no_grad()
def check_apart(model: PreTrainedModel, length: int) -> None:
    """Raises `UserError` for a model whose logits in packed rows of `length` tokens are not those of a document alone.

    A long random document lies after a short one in one row and before it in another. Another short one must not change
    the logits of the long one, and these must be those of the usual forward pass. The model may be in any precision and
    under autocast; its mode and the random state stay as they are. On the CPU a large model gets shorter rows.
    """
    if model.device.type == "cpu":
        length = min(length, max(64, PROBED // max(1, sum(p.numel() for p in model.parameters()))))
    short = min(64, length // 4)
    long, vocabulary = length - short, model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (length + short,), generator=torch.Generator().manual_seed(0))
    document, one, other = ids.split([long, short, short])
    place = torch.arange(long)
    keep = (place < 16) | (place >= long - 16)  # where a neighbour and a window show most

    def packed(neighbour: torch.Tensor) -> torch.Tensor:
        positions = both_ways(torch.arange(short), place)
        kept = both_ways(torch.zeros(short, dtype=torch.bool), keep)
        with documents_apart(model) as documents:
            given = {"position_ids": positions.to(model.device), "attention_mask": documents(positions)}
            return logits(both_ways(neighbour, document), kept, **given).unflatten(0, (2, -1))

    def logits(ids: torch.Tensor, kept: torch.Tensor, **given) -> torch.Tensor:
        given |= {"input_ids": ids.to(model.device), "logits_to_keep": kept.to(model.device), "use_cache": False}
        found = model(**given).logits
        if found.shape[:-1] != (kept.sum(),):
            raise refused(model, "it does not compute logits at chosen tokens")
        return found.float()

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        alone, first, second = logits(document[None], keep[None]), packed(one), packed(other)
        leak, again = rms(first - second), 0.0
        if not leak <= LEAK * rms(alone):
            again = rms(packed(one) - first)  # what no neighbour has changed
    finally:
        for module, training in modes:
            module.training = training
    coarse = torch.equal(alone, alone.bfloat16().float()) or torch.equal(alone, alone.half().float())
    if not leak <= max(LEAK * rms(alone), 10 * again):
        raise refused(model, "in a packed row its documents see one another")
    if not rms(first - alone) <= (0.05 if coarse else 0.005) * rms(alone):
        raise refused(model, "in a packed row a document does not get the logits that it gets alone")


def both_ways(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.cat([a, b]), torch.cat([b, a])])


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def refused(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"A model of type {model.config.model_type} cannot be fine-tuned here: {reason}. "
        "Take a base of another family, such as GPT-NeoX (Pythia), GPT-J, GPT-2, OPT, Llama, Mistral, Qwen or Gemma."
    )


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
