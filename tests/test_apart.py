"""The check that refuses models whose documents see one another, and passes all others."""

import pytest
import torch
from test_attention import BLOOM, FAMILIES, made_from, model_of
from transformers import BertConfig, FalconConfig, GPTNeoConfig, MambaConfig, RwkvConfig, TrOCRConfig

from dolly import attention
from dolly.attention import check_apart
from dolly.errors import UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_pass_the_check(family):
    check_apart(model_of(family), 128)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma3_text"])
def test_the_check_holds_in_sixteen_bits(family):
    with torch.autocast("cpu", torch.bfloat16):
        check_apart(model_of(family), 128)
    check_apart(model_of(family).bfloat16(), 128)


def test_the_check_leaves_mode_and_random_state():
    model = model_of("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.drop.p = 0.5
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    check_apart(model, 16)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


ALIKE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
LEAKING = {
    "bloom": BLOOM,
    "mamba": MambaConfig(**ALIKE, state_size=8),
    "rwkv": RwkvConfig(**ALIKE, attention_hidden_size=32),
    "falcon": FalconConfig(**ALIKE, num_attention_heads=4),
}


@pytest.mark.parametrize("kind", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_documents_see_one_another_are_refused(kind, dtype):
    with pytest.raises(UserError, match=f"of type {kind} cannot be fine-tuned here: .* see one another"):
        check_apart(made_from(LEAKING[kind]).to(dtype), 64)


def test_other_models_that_packing_does_not_suit_are_refused():
    bert = made_from(BertConfig(**ALIKE, num_attention_heads=4, intermediate_size=64))  # each token sees all
    with pytest.raises(UserError, match="bert .* does not get the logits that it gets alone"):
        check_apart(bert, 64)
    trocr = TrOCRConfig(vocab_size=100, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
    with pytest.raises(UserError, match="trocr .* at chosen tokens"):
        check_apart(made_from(trocr), 64)


def test_a_model_outside_the_interface_passes_when_its_own_mask_is_right():
    kinds = [[["global", "local"], 1]]
    model = made_from(GPTNeoConfig(vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, attention_types=kinds))
    check_apart(model, 64)


def test_what_a_device_changes_by_itself_is_no_leak():
    model = model_of("llama")
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out * (1 + 1e-3 * torch.randn_like(out))
    )
    check_apart(model, 64)


def test_the_check_sees_attention_that_is_wrong(monkeypatch):
    model, edges_of, attend = model_of("llama"), attention.edges_of, attention.attend
    rows = torch.arange(64).expand(2, -1)
    monkeypatch.setattr(attention, "edges_of", lambda positions, device: edges_of(rows, device))
    with pytest.raises(UserError, match="see one another"):
        check_apart(model, 64)
    monkeypatch.setattr(attention, "edges_of", edges_of)
    monkeypatch.setattr(attention, "attend", lambda edges, q, *others: attend(edges, q * 2, *others))
    with pytest.raises(UserError, match="that it gets alone"):
        check_apart(model, 64)
