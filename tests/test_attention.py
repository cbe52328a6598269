"""Attention by documents against each document alone, for every family."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, SMALL
from peft import LoraConfig, get_peft_model
from test_trainer import CONFIG, documents
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from dolly import attention, trainer
from dolly.attention import check_apart, documents_apart
from dolly.packing import collate, pack

SHARED = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = CONFIGS | {
    "opt": (OPTConfig, SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "mistral": (MistralConfig, SHARED),
    "qwen2": (Qwen2Config, SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma": (GemmaConfig, SHARED),
    "gemma2": (Gemma2Config, SHARED | {"sliding_window": 24, "attn_logit_softcapping": 5.0}),
    "gemma3_text": (Gemma3TextConfig, SHARED | {"sliding_window": 24, "sliding_window_pattern": 2}),
    "phi": (PhiConfig, SMALL | {"max_position_embeddings": 256}),
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2)


def made_from(config):
    """Without dropout, and with large enough matrices that attention shows in the logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        if ("attn" in name or "attention" in name) and parameter.dim() == 2:
            parameter.data *= 4
    return model


def model_of(family: str, **changes):
    kind, options = FAMILIES[family]
    return made_from(kind(vocab_size=100, **SPECIAL | options | changes))


def batch_of(rows: int, length: int = 128, longest: int = 60, seed: int = 0):
    """A batch, and the (row, start, end) of each of its documents."""
    made = documents(30, seed, longest)
    packed = pack([len(d.ids) for d in made], length)[:rows]
    spans = []
    for row, chosen in enumerate(packed):
        ends = torch.tensor([len(made[i].ids) for i in chosen]).cumsum(0).tolist()
        spans += [(row, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return collate(packed, made, length, pad_id=0), spans


def logits_of(model, batch, documents=lambda positions: None, use_cache=False) -> torch.Tensor:
    device, mask = model.device, documents(batch.position_ids)
    ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=use_cache).logits


def alone(model, batch, spans) -> list[torch.Tensor]:
    ids = batch.input_ids.to(model.device)
    return [model(input_ids=ids[row, start:end][None], use_cache=False).logits[0] for row, start, end in spans]


def pieces(packed: torch.Tensor, spans) -> list[torch.Tensor]:
    return [packed[row, start:end] for row, start, end in spans]


def gradient(model, logits: list[torch.Tensor], batch, spans) -> torch.Tensor:
    """Of the summed cross-entropy of each token after another."""
    model.zero_grad()
    ids = pieces(batch.input_ids.to(model.device), spans)
    losses = [F.cross_entropy(x[:-1].float(), i[1:], reduction="sum") for x, i in zip(logits, ids, strict=True)]
    sum(losses).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found, expected, gradients, atol=1e-5, share=1e-4) -> None:
    """Logits of each document within `atol`; gradients within a `share` of their norm."""
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=atol, atol=atol)
    assert (gradients[0] - gradients[1]).norm() < share * gradients[1].norm()


@pytest.fixture
def used(monkeypatch) -> list:
    """Grows with each layer that attends by documents."""
    calls, attend = [], attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda edges, *args, **more: calls.append(edges) or attend(edges, *args, **more)
    )
    return calls


def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` in plain words, one document after another."""
    assert q.dtype == k.dtype == v.dtype and cu_seq_q.dtype == torch.int32 and cu_seq_q.is_contiguous()
    assert cu_seq_q is cu_seq_k and max_q == max_k == cu_seq_q.diff().max() and cu_seq_q[-1] == len(q)
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True):
        a, b, c = (x[start:end].transpose(0, 1) for x in (q, k, v))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (back >= 0) & ((window_size[0] < 0) | (back <= window_size[0]))
        parts.append(F.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch) -> list:
    """Lets the CPU take the way of CUDA; grows with each layer that does."""
    calls = []
    monkeypatch.setattr(attention, "flash_takes", lambda q, v: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **more: calls.append(more) or varlen(*args, **more))
    return calls


MODES = {"plain": (False, False), "cache": (True, False), "recomputed": (False, True), "both": (True, True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_each_document_alone(family, rows, mode, used):
    model, (use_cache, recomputed) = model_of(family).train(), MODES[mode]
    batch, spans = batch_of(rows)
    expected = alone(model, batch, spans)
    true = gradient(model, expected, batch, spans)
    if recomputed:
        model.activation_checkpointing_enable()
    with documents_apart(model) as apart:
        found = pieces(logits_of(model, batch, apart, use_cache), spans)
        layers = len(used)
        packed = gradient(model, found, batch, spans)
    assert_same(found, expected, (packed, true))
    assert layers == 2 and len(used) == (4 if recomputed else 2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])  # its soft cap keeps it from flash
def test_flash_attention_is_told_the_documents(family, rows, flash):
    model, (batch, spans) = model_of(family).train(), batch_of(rows)
    expected = alone(model, batch, spans)
    true = gradient(model, expected, batch, spans)
    model.activation_checkpointing_enable()
    with documents_apart(model) as apart:
        mask = apart(batch.position_ids)
        given = batch.flat() if rows == 3 else batch  # as the trainer does on CUDA
        found = pieces(logits_of(model, given, lambda positions: mask).view(rows, 128, -1), spans)
        packed = gradient(model, found, batch, spans)
    assert_same(found, expected, (packed, true))
    assert len(flash) == 4
    assert {more["window_size"] for more in flash} <= {(-1, 0), (23, 0), (4095, 0)}


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_window_shorter_than_a_document_hides_its_beginning(kind, used):
    near, far = (model_of(kind, sliding_window=window).eval() for window in (24, 200))
    batch, spans = batch_of(1, longest=120)
    with torch.no_grad():
        expected = alone(near, batch, spans)
        for model in (near, far):
            with documents_apart(model) as apart:
                logits = logits_of(model, batch, apart)
            found = torch.cat(pieces(logits, spans))
            assert torch.allclose(found, torch.cat(expected), atol=1e-5) == (model is near)
    assert used


def qkv(heads: int, shared: int, rows: int = 2, length: int = 300, size: int = 8):
    torch.manual_seed(0)
    lengths = [(1, 299), (40, 200, 60), (300,), (7, 130, 64, 99)][:rows]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    query, key, value = (torch.randn(rows, n, length, size, requires_grad=True) for n in (heads, shared, shared))
    return attention.edges_of(positions, torch.device("cpu")), positions, (query, key, value)


def dense(positions, query, key, value, scale, window, softcap) -> torch.Tensor:
    """Under a mask of whole rows, in float64."""
    document = (positions == 0).cumsum(1)
    token = torch.arange(positions.shape[1])
    back = token[:, None] - token
    mask = (document[:, None, :, None] == document[:, None, None, :]) & (back >= 0) & (back < (window or len(back)))
    q, k, v = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2).float()


WINDOWS = [(None, None), (50, None), (5000, None)]
CAPPED = [*WINDOWS, (None, 1.0), (50, 1.0)]
LIMITS = [{}, {"BLOCK": 48}, {"LONGEST": 100}, {"STEP": 32, "TOGETHER": 2}]
WAYS = [("by_flash", {}, *asked) for asked in WINDOWS] + [("by_mask", {}, *asked) for asked in CAPPED]
WAYS += [("by_length", limits, *asked) for limits in LIMITS for asked in CAPPED]


@pytest.mark.parametrize("way, limits, window, softcap", WAYS, ids=str)
def test_each_way_attends_as_under_a_mask(way, limits, window, softcap, monkeypatch, flash):
    monkeypatch.setattr(attention, "flash_takes", lambda q, v: way == "by_flash")
    monkeypatch.setattr(attention, "by_length", getattr(attention, way))  # what the CPU takes
    for name, limit in limits.items():
        monkeypatch.setattr(attention, name, limit)
    attention.layout.cache_clear()
    edges, positions, tensors = qkv(heads=4, shared=2, rows=4)
    found = attention.attend(edges, *tensors, scale=0.7, window=window, softcap=softcap)
    expected = dense(positions, *tensors, 0.7, window, softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    back = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(x, tensors, back) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert bool(flash) == (way == "by_flash")


def test_under_autocast_all_ways_get_one_precision(flash):
    edges, _, (query, key, value) = qkv(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attend(edges, query, key, value.bfloat16())
    assert found.dtype == torch.bfloat16 and flash


def test_flash_attention_is_asked_for_neither_dropout_nor_a_soft_cap(flash):
    edges, _, tensors = qkv(2, 2)
    attention.attend(edges, *tensors, dropout=0.5)
    attention.attend(edges, *tensors, softcap=1.0)
    assert not flash
    attention.attend(edges, *tensors)
    assert flash


@pytest.mark.parametrize("way", ["by_length", "by_mask"])
def test_dropout_falls_on_the_weights(way):
    edges, positions, _ = qkv(8, 8)
    even, ones = torch.zeros(600, 8, 4), torch.ones(600, 8, 4)
    output = getattr(attention, way)(edges, even, even, ones, 0.5, 0.25)
    seen = positions.flatten()[:, None, None] + 1
    kept = output * seen * 0.75  # of the tokens seen, each with the weight 1 / seen, kept ones with 1 / 0.75 of it
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert kept.sum() / (seen.sum() * 32) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_dropout_of_a_model_follows_the_seed_and_stops_in_evaluation(family, used):
    model = model_of(family, **{"llama": {"attention_dropout": 0.5}, "gptj": {}}[family]).train()
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.5
    batch, _ = batch_of(1)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with documents_apart(model) as apart:
            return logits_of(model, batch, apart)

    assert torch.equal(logits(0), logits(0))
    assert not torch.allclose(logits(0), logits(1))
    model.eval()
    assert torch.equal(logits(0), logits(1))
    assert used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_cannot_reach_its_neighbours(family, dtype):
    model, (batch, spans) = model_of(family).eval().to(dtype), batch_of(1)
    with documents_apart(model) as apart, torch.no_grad():
        before = logits_of(model, batch, apart)[0]
        _, start, end = spans[1]
        batch.input_ids[0, start:end] = (batch.input_ids[0, start:end] + 1) % 100
        after = logits_of(model, batch, apart)[0]
    changed = ~torch.isclose(before, after).all(-1)
    assert (
        changed[start:end].all()
        and torch.equal(before[:start], after[:start])
        and torch.equal(before[end:], after[end:])
    )


@pytest.mark.parametrize("family", [*CONFIGS, "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_it_is_under_a_mask(family, used):
    model, (batch, spans) = model_of(family).train(), batch_of(2)
    true = gradient(model, alone(model, batch, spans), batch, spans)
    errors = []
    for context in (documents_apart(model), nullcontext(lambda positions: None)):
        with context as apart, torch.autocast("cpu", torch.bfloat16):
            found = gradient(model, pieces(logits_of(model, batch, apart), spans), batch, spans)
        errors.append(((found - true).norm() / true.norm()).item())
    assert used
    assert 0 < errors[0] < 1.5 * errors[1] < 0.2


@pytest.mark.parametrize("reentrant", [False, True])
def test_either_checkpointing_keeps_the_documents(reentrant, used):
    model, (batch, spans) = (
        model_of("gpt2").train(),
        batch_of(3),
    )  # which gives its layers the mask as one of their args
    expected = alone(model, batch, spans)
    true = gradient(model, expected, batch, spans)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with documents_apart(model) as apart:
        found = pieces(logits_of(model, batch, apart), spans)
        packed = gradient(model, found, batch, spans)
    assert_same(found, expected, (packed, true))
    assert len(used) == 4


@pytest.mark.parametrize("family, layers", [("llama", "model.layers"), ("gptj", "transformer.h")])
def test_compiled_layers_take_batches_of_other_documents(family, layers, used):
    model = model_of(family).eval()
    expected = [torch.cat(alone(model, *batch_of(2, seed=seed))) for seed in range(4)]
    torch._dynamo.reset()
    graphs = []
    for layer in model.get_submodule(layers):
        layer.compile(backend=lambda graph, inputs: graphs.append(graph.code) or graph)
    with documents_apart(model) as apart, torch.no_grad():
        for seed in range(4):
            batch, spans = batch_of(2, seed=seed)
            found = torch.cat(pieces(logits_of(model, batch, apart), spans))
            torch.testing.assert_close(found, expected[seed], rtol=0, atol=1e-5)
    assert len(used) == 8 and graphs
    assert not any("bmm" in graph for graph in graphs)  # or it would be compiled for the documents of each batch


@pytest.mark.parametrize("family, target", [("llama", "q_proj"), ("gptj", "q_proj"), ("gpt_neox", "query_key_value")])
def test_adapters_learn_the_same(family, target, used):
    torch.manual_seed(0)
    model = get_peft_model(model_of(family), LoraConfig(target_modules=[target], init_lora_weights=False)).train()
    batch, spans = batch_of(2)
    expected = alone(model, batch, spans)
    true = gradient(model, expected, batch, spans)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    with documents_apart(model) as apart:
        found = pieces(logits_of(model, batch, apart), spans)
        packed = gradient(model, found, batch, spans)
    assert_same(found, expected, (packed, true))
    assert used and model.config._attn_implementation in ("sdpa", "eager")
    check_apart(model, 64)


def test_a_model_that_changes_the_mask_keeps_it():
    narrow = SMALL | {"num_key_value_heads": 2, "num_hidden_layers": 2}
    model, (batch, _) = made_from(DogeConfig(vocab_size=100, **narrow)), batch_of(2)
    with documents_apart(model) as apart:
        assert apart(batch.position_ids) is None
        logits = logits_of(model, batch, apart)
    assert torch.equal(logits, logits_of(model, batch))


def test_without_a_cache_positions_alone_keep_documents_apart():
    for family in ("llama", "gptj"):
        model, (batch, spans) = model_of(family).eval(), batch_of(2)
        with torch.no_grad():
            expected = torch.cat(alone(model, batch, spans))
            with documents_apart(model):
                for use_cache in (False, True):
                    found = torch.cat(pieces(logits_of(model, batch, use_cache=use_cache), spans))
                    assert torch.allclose(found, expected, atol=1e-5) != use_cache


def test_positions_must_be_those_of_documents():
    cpu = torch.device("cpu")
    edges = attention.edges_of(torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]]), cpu)
    assert edges[0, 0, 0].tolist() == [0, 3, 4, 5, 8] and edges.shape == (2, 1, 3, 5)
    for wrong in ([[1, 2]], [[0, 2]], [[0, 1], [2, 3]]):
        with pytest.raises(ValueError, match="count from 0"):
            attention.edges_of(torch.tensor(wrong), cpu)
    edges, _, tensors = qkv(2, 2)
    with pytest.raises(ValueError, match="600 tokens, not of 300"):
        attention.attend(edges, *(x[:1] for x in tensors))


def test_training_attends_by_documents_and_leaves_the_model_as_it_was(used, tmp_path):
    model, made = model_of("llama"), documents(20)
    trainer.train(model, made, made[:5], 32, 0, CONFIG)
    assert used
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    seen = len(used)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert len(used) == seen


@pytest.mark.parametrize("family, usual", [("llama", "sdpa"), ("gptj", "eager"), ("gemma2", "eager")])
def test_a_model_is_set_back_when_training_breaks_off(family, usual):
    model = model_of(family)
    attend = [getattr(module, "_attn", None) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), documents_apart(model):
        assert [getattr(module, "_attn", None) for module in model.modules()] != attend or family != "gptj"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == usual
    assert [getattr(module, "_attn", None) for module in model.modules()] == attend
