"""Attention by documents against each document alone: every family, packed rows, gradients, neighbours, refusals."""

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES
from peft import LoraConfig, get_peft_model
from test_trainer import CONFIG, DRY, documents, model_of, plain_loss
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from dolly import attention, trainer
from dolly.attention import check_apart, documents_apart
from dolly.errors import UserError
from dolly.packing import collate, pack

NARROW = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = NARROW | {"num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 256, "head_dim": 16}
GROUPED |= {"pad_token_id": 0}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
MORE = {
    "opt": OPTConfig(**NARROW, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.0),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral window": MistralConfig(**GROUPED, sliding_window=24),
    "qwen2": Qwen2Config(**{name: value for name, value in GROUPED.items() if name != "head_dim"}),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, **WINDOWS, attn_logit_softcapping=0.5, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**GROUPED, **WINDOWS, query_pre_attn_scalar=16),
    "phi": PhiConfig(**NARROW, intermediate_size=64, max_position_embeddings=256),
}


def made_of(family: str, **changes):
    """A model in float32 and without dropout, so that two passes can be compared."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MORE[family]) if family in MORE else model_of(family, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def used(monkeypatch) -> list:
    """Grows with each layer that attends by documents."""
    calls, usual = [], attention.by_length
    monkeypatch.setattr(attention, "by_length", lambda *args: calls.append(1) or usual(*args))
    return calls


def batch_of(made, length: int, rows: int):
    packed = pack([len(d.ids) for d in made], length)[:rows]
    assert len(packed) == rows
    return collate(packed, made, length, pad_id=0), packed


def packed_logits(model, batch, **options) -> torch.Tensor:
    with documents_apart(model) as documents:
        mask = documents(batch.position_ids)
        return model(batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_logits_are_those_of_each_document_alone(family, rows, cache, recomputed, used):
    model, made = made_of(family), documents(20, longest=100)
    batch, packed = batch_of(made, 128, rows)
    if recomputed:
        model.train().activation_checkpointing_enable()
    else:
        model.eval()
    logits = packed_logits(model, batch, use_cache=cache)
    assert used
    model.eval()
    for row, indices in enumerate(packed):
        start = 0
        for index in indices:
            ids = torch.tensor([made[index].ids])
            inside = logits[row, start : start + ids.shape[1]]
            torch.testing.assert_close(inside, model(ids).logits[0], rtol=1e-5, atol=1e-5)
            start += ids.shape[1]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_gradients_are_those_of_each_document_alone(family, used):
    model, made = made_of(family).train(), documents(20, longest=200)
    batch, packed = batch_of(made, 256, 2)
    with documents_apart(model) as apart:
        total, losses = trainer.batch_loss(model, batch, Accelerator(cpu=True), None, apart)
        total.backward()
    assert used
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen = [index for row in packed for index in row]
    expected = [plain_loss(model, made[index]) for index in chosen]
    sum(expected).backward()
    for index, loss in zip(chosen, expected, strict=True):
        torch.testing.assert_close(losses[batch.documents == index].sum(), loss, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_document_cannot_reach_its_neighbours(family, dtype):
    model, made = made_of(family).eval().to(dtype), documents(8, longest=60)
    batch, packed = batch_of(made, 256, 1)
    own = slice(len(made[packed[0][0]].ids), len(made[packed[0][0]].ids) + len(made[packed[0][1]].ids))
    with torch.no_grad():
        before = packed_logits(model, batch)[0]
        batch.input_ids[0, own] = (batch.input_ids[0, own] + 1) % 100
        after = packed_logits(model, batch)[0]
    same = torch.ones(256, dtype=torch.bool)
    same[own] = False
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[own], after[own]).all()


@pytest.mark.parametrize("longest", [600, 1100])
@pytest.mark.parametrize("family", ["gpt_neox", "gptj"])
def test_long_documents_take_other_products_to_the_same_end(family, longest):
    size = {"n_positions": 2048} if family == "gptj" else {"max_position_embeddings": 2048}
    model, made = made_of(family, **size).eval(), documents(3)
    made[1].ids[:] = [n % 100 for n in range(longest)]
    made[1].learned[:] = [n > 3 for n in range(longest)]
    batch, packed = batch_of(made, 1200, 1)
    with torch.no_grad():
        logits = packed_logits(model, batch)[0]
        assert packed[0][0] == 1
        torch.testing.assert_close(logits[:longest], model(torch.tensor([made[1].ids])).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_each_document_alone_is(family):
    model, made = made_of(family), documents(20, longest=120)
    batch, packed = batch_of(made, 256, 2)
    chosen = [index for row in packed for index in row]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    true = gradient(sum(plain_loss(model, made[index]) for index in chosen))
    with torch.autocast("cpu", torch.bfloat16), documents_apart(model) as apart:
        together = gradient(trainer.batch_loss(model, batch, Accelerator(cpu=True), None, apart)[0])
    with torch.autocast("cpu", torch.bfloat16):
        alone = gradient(sum(plain_loss(model, made[index]) for index in chosen))
    errors = [((each - true).norm() / true.norm()).item() for each in (together, alone)]
    assert 0 < errors[0] < 2 * errors[1] < 0.1


def test_dropout_falls_on_the_weights_and_in_training_alone():
    length = 256
    positions = torch.cat([torch.arange(100), torch.arange(length - 100)])[None]
    edges = attention.edges_of(positions, torch.device("cpu"))
    even, ones = torch.zeros(1, 8, length, 4), torch.ones(1, 8, length, 4)
    torch.manual_seed(0)
    output = attention.attend(edges, even, even, ones, dropout=0.25)
    seen = positions[0, :, None, None] + 1
    kept = output[0] * seen * 0.75  # of the tokens seen, each with the weight 1 / seen, kept ones with 1 / 0.75 of it
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert kept.sum() / (seen.sum() * 32) == pytest.approx(0.75, abs=0.01)

    model = model_of("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    batch, _ = batch_of(documents(8), 64, 1)

    def logits(training: bool, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return packed_logits(model.train(training), batch)

    assert torch.equal(logits(True, 0), logits(True, 0))
    assert not torch.allclose(logits(True, 0), logits(True, 1))
    assert torch.equal(logits(False, 0), logits(False, 1))


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "llama"])
def test_adapters_attend_by_documents(family, used):
    model = get_peft_model(made_of(family), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    made = documents(20)
    batch, packed = batch_of(made, 64, 3)
    logits = packed_logits(model, batch)
    assert used
    first = torch.tensor([made[packed[0][0]].ids])
    torch.testing.assert_close(logits[0, : first.shape[1]], model(first).logits[0], rtol=1e-5, atol=1e-5)


def test_training_attends_by_documents_and_leaves_the_model_as_it_was(used, tmp_path):
    for family in ("llama", "gptj"):
        model, made = model_of(family, **DRY.get(family, {})), documents(20)
        trainer.train(model, made, made[:5], 32, 0, CONFIG)
        assert used
        model.save_pretrained(tmp_path)
        assert attention.NAME not in (tmp_path / "config.json").read_text()
        seen = len(used)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        assert len(used) == seen
    with pytest.raises(KeyboardInterrupt), documents_apart(model):
        raise KeyboardInterrupt
    assert not [module for module in model.modules() if "_attn" in vars(module)]


def test_positions_that_do_not_count_up_are_no_documents():
    for positions in ([[0, 1, 3]], [[1, 2, 3]], [[0, 1, 2], [3, 4, 5]]):
        with pytest.raises(ValueError, match="count from 0"):
            attention.edges_of(torch.tensor(positions), torch.device("cpu"))
    with pytest.raises(ValueError, match="those of 3 tokens"):
        attention.attend(attention.edges_of(torch.arange(3)[None], torch.device("cpu")), *torch.randn(3, 1, 2, 6, 4))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_families_that_keep_documents_apart_are_not_refused(family):
    model = made_of(family).train()
    state = torch.get_rng_state()
    check_apart(model, 256)
    assert model.training and torch.equal(state, torch.get_rng_state())
    check_apart(model.to(torch.bfloat16), 256)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
        BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_cannot_is_refused_by_name(config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"type {config.model_type} cannot be fine-tuned here"):
        check_apart(model, 64)


def test_a_leak_is_found_wherever_it_comes_from(monkeypatch):
    def leaking(edges, query, key, value, *args, **options):
        return attention_of(edges, query, key, value, *args, **options) + value.mean()

    attention_of = attention.attend
    monkeypatch.setattr(attention, "attend", leaking)
    with pytest.raises(UserError, match="see one another"):
        check_apart(made_of("llama"), 64)


def by_documents(q, k, v, starts, _, longest, __, scale, window_size, enable_gqa):
    """What `varlen_attn` computes, written plainly: [tokens, heads, size]."""
    assert starts.dtype == torch.int32 and starts.diff().max() == longest
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)) if enable_gqa else (k, v)
    back = torch.arange(longest)[:, None] - torch.arange(longest)
    seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    outputs = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        weights = scores.masked_fill(~seen[: end - start, : end - start], float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "llama", "mistral window"])
@pytest.mark.parametrize("way", ["by_flash", "by_mask"])
def test_the_ways_of_a_gpu_lay_documents_out_as_the_cpu_does(family, way, monkeypatch):
    """The batch in one row, as on a GPU. FlashAttention itself is replaced here; the tests below use it."""
    monkeypatch.setattr(attention, "varlen_attn", by_documents)
    model, made = made_of(family).eval(), documents(20, longest=60)
    batch, _ = batch_of(made, 128, 3)
    expected = packed_logits(model, batch)

    def other(edges, q, k, v, scale, dropout, window, softcap):
        return getattr(attention, way)(edges, q, k, v, scale, window=window)

    monkeypatch.setattr(attention, "by_length", other)
    torch.testing.assert_close(packed_logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    with documents_apart(model) as apart:
        mask, flat = apart(batch.position_ids), batch.flat()
        if way == "by_flash":
            logits = model(flat.input_ids, position_ids=flat.position_ids, attention_mask=mask).logits
            torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_on_a_gpu_a_model_learns_what_it_learns_on_the_cpu(family):
    made = documents(60, longest=120)
    history, _ = trainer.train(made_of(family), made, made[:10], 128, 0, CONFIG)
    check_apart(made_of(family).cuda(), 128)
    assert history.heldout[-1] < history.heldout[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_gives_the_gradient_of_each_document_alone(family):
    model, made = made_of(family).cuda().train(), documents(20, longest=200)
    batch, packed = batch_of(made, 256, 2)
    accelerator = Accelerator()
    with torch.autocast("cuda", torch.bfloat16), documents_apart(model) as apart:
        total, _ = trainer.batch_loss(model, batch, accelerator, None, apart)
    total.backward()
    together = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    plain = made_of(family).train()
    sum(plain_loss(plain, made[index]) for row in packed for index in row).backward()
    alone = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (together - alone).norm() < 0.03 * alone.norm()
