"""Attention by documents against each document alone, and against what it stands in for: SDPA with a mask."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES
from test_trainer import CONFIG, documents, model_of, plain_loss
from transformers import AutoModelForCausalLM, DogeConfig, MistralConfig

from dolly import attention, trainer
from dolly.attention import documents_apart
from dolly.packing import collate, pack

LONG = {"max_position_embeddings": 1024}
NARROW = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NARROW |= {"num_key_value_heads": 2, "intermediate_size": 64}


@pytest.fixture
def used(monkeypatch) -> list:
    """Grows with each layer that attends by documents."""
    calls, layout = [], attention.Documents.layout
    monkeypatch.setattr(attention.Documents, "layout", lambda self, heads: calls.append(heads) or layout(self, heads))
    return calls


def quiet(model):
    """Without dropout, so that two passes can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def batch_of(made, length: int, rows: int):
    packed = pack([len(d.ids) for d in made], length)[:rows]
    assert len(packed) == rows
    return collate(packed, made, length, pad_id=0), [i for row in packed for i in row]


def losses_and_gradient(model, batch, apart: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    with documents_apart(model) if apart else nullcontext():
        losses = trainer.token_losses(model, batch, Accelerator(cpu=True))
        losses.sum().backward()
    return losses.detach(), gradient(model)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def alone(model, made, chosen) -> tuple[list[torch.Tensor], torch.Tensor]:
    model.zero_grad()
    losses = [plain_loss(model, made[i]) for i in chosen]
    sum(losses).backward()
    return [loss.detach() for loss in losses], gradient(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_are_those_of_each_document_alone(family, rows, training, used):
    model, made = quiet(model_of(family)).train(training), documents(20, longest=200)
    batch, chosen = batch_of(made, 256, rows)
    losses, packed = losses_and_gradient(model, batch)
    expected, apart = alone(model, made, chosen)
    for index, loss in zip(chosen, expected, strict=True):
        torch.testing.assert_close(losses[batch.documents == index].sum(), loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4)
    assert bool(used) == (family != "gptj")  # it builds its attention itself, outside the interface


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_shared_heads_and_another_scale(family, changes, used):
    model, made = quiet(model_of(family, **changes)), documents(20, longest=100)
    for parameter in model.parameters():
        parameter.data *= 4  # large enough scores that heads and scale show in the loss
    batch, chosen = batch_of(made, 256, 2)
    losses, packed = losses_and_gradient(model, batch)
    expected, apart = alone(model, made, chosen)
    torch.testing.assert_close(losses.sum(), sum(expected), rtol=1e-4, atol=1e-4)
    assert (packed - apart).norm() < 1e-3 * apart.norm()
    assert used


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_document_too_long_for_all_its_scores_at_once(family, used):
    model, made = quiet(model_of(family, **LONG)), documents(4, longest=50)
    long = documents(200, seed=1)
    made[2].ids[:] = [i for d in long for i in d.ids][: attention.LONGEST + 40]
    made[2].learned[:] = [n > 3 for n in range(len(made[2].ids))]
    batch, chosen = batch_of(made, 768, 1)
    losses, packed = losses_and_gradient(model, batch)
    expected, apart = alone(model, made, chosen)
    torch.testing.assert_close(losses.sum(), sum(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-3)
    assert used


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gptj"])
def test_bfloat16_is_as_near_to_float32_as_it_is_under_a_mask(family, used):
    model, made = quiet(model_of(family)), documents(20, longest=120)
    batch, chosen = batch_of(made, 256, 2)
    _, true = alone(model, made, chosen)
    errors = []
    for apart in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            _, packed = losses_and_gradient(model, batch, apart)
        errors.append(((packed - true).norm() / true.norm()).item())
    assert used
    assert 0 < errors[0] < 1.5 * errors[1] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_cannot_reach_its_neighbours(family, dtype):
    model, made = model_of(family).eval().to(dtype), documents(8, longest=60)
    batch, chosen = batch_of(made, 256, 1)
    with documents_apart(model), torch.no_grad():
        before = trainer.token_losses(model, batch, Accelerator(cpu=True))
        made[chosen[1]].ids[:] = [(i + 1) % 100 for i in made[chosen[1]].ids]
        changed, _ = batch_of(made, 256, 1)
        after = trainer.token_losses(model, changed, Accelerator(cpu=True))
    own = batch.documents == chosen[1]
    assert torch.equal(before[~own], after[~own])
    assert not torch.isclose(before[own], after[own]).all()


def test_dropout_falls_on_the_weights_and_in_training_alone():
    module, length = torch.nn.Module().train(), 256
    positions = torch.cat([torch.arange(100), torch.arange(length - 100)])[None]
    mask = torch.ones(1, 1, length, length)
    mask.documents = attention.Documents(positions)
    even, ones = torch.zeros(1, 8, length, 4), torch.ones(1, 8, length, 4)
    torch.manual_seed(0)
    output, _ = attention.document_attention(module, even, even, ones, mask, dropout=0.25)
    seen = positions[0, :, None, None] + 1
    kept = output[0] * seen * 0.75  # of the tokens seen, each with the weight 1 / seen, kept ones with 1 / 0.75 of it
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert kept.sum() / (seen.sum() * 32) == pytest.approx(0.75, abs=0.01)
    output, _ = attention.document_attention(module.eval(), even, even, ones, mask, dropout=0.25)
    torch.testing.assert_close(output, torch.ones_like(output))


def test_dropout_of_a_model_follows_the_seed(used):
    model = model_of("llama", attention_dropout=0.5).train()
    batch, _ = batch_of(documents(8), 64, 1)

    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return losses_and_gradient(model, batch)[0]

    assert torch.equal(losses(0), losses(0))
    assert not torch.allclose(losses(0), losses(1))
    assert used


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, reentrant, used):
    model = quiet(model_of(family)).train()
    batch, _ = batch_of(documents(20), 64, 3)
    losses, kept = losses_and_gradient(model, batch)
    layers = len(used)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, recomputed = losses_and_gradient(model, batch)
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-5)
    assert len(used) > layers


@pytest.mark.parametrize("window, by_documents", [(8, False), (64, True)])
def test_a_sliding_window_keeps_its_mask_where_it_hides_part_of_a_document(window, by_documents, used):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MistralConfig(**NARROW, sliding_window=window))
    made = documents(20)
    batch, chosen = batch_of(made, 64, 3)
    losses, packed = losses_and_gradient(model, batch)
    expected, apart = alone(model, made, chosen)
    torch.testing.assert_close(losses.sum(), sum(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4)
    assert bool(used) == by_documents


def test_a_model_that_changes_the_mask_gets_the_changed_one(used):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(DogeConfig(**NARROW))
    batch, _ = batch_of(documents(20), 64, 3)
    losses, packed = losses_and_gradient(model, batch)
    masked, under_mask = losses_and_gradient(model, batch, apart=False)
    assert torch.equal(losses, masked) and torch.equal(packed, under_mask)
    assert not used


def test_scores_that_a_model_wants_changed_are_left_to_sdpa():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask.documents = attention.Documents(torch.arange(6)[None])
    qkv = torch.randn(3, 1, 2, 6, 4)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        attention.document_attention(torch.nn.Module(), *qkv, mask, softcap=30.0)
    bias = torch.randn(1, 2, 6, 6)
    output, _ = attention.document_attention(torch.nn.Module(), *qkv, mask, scaling=0.3, position_bias=bias)
    weights = (qkv[0] @ qkv[1].transpose(2, 3) * 0.3 + bias).masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(output, (weights @ qkv[2]).transpose(1, 2))


def test_a_mask_is_that_of_documents_only_if_every_token_sees_what_they_show():
    def mask(function) -> torch.Tensor:
        return attention.document_mask(batch_size=1, q_length=6, kv_length=6, mask_function=function)

    assert hasattr(mask(lambda row, head, query, key: key <= query), "documents")
    assert not hasattr(mask(lambda row, head, query, key: key >= 5 - query), "documents")  # as many, but other ones


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


def test_a_model_is_set_back_when_training_breaks_off():
    model = model_of("llama")
    with pytest.raises(KeyboardInterrupt), documents_apart(model):
        assert model.config._attn_implementation == attention.NAME
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
