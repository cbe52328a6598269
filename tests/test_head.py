"""The head that gives losses instead of logits, against logits and `F.cross_entropy`."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import FAMILIES
from test_trainer import documents, model_of
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from dolly import head, trainer
from dolly.head import HeadLoss, fused_head
from dolly.packing import IGNORED, collate, pack


def inputs(tokens: int, size: int = 16, vocabulary: int = 100, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) / 2
    bias = torch.randn(vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::5] = IGNORED
    return *[x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], targets


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss * 0.3, leaves))


@pytest.mark.parametrize("tokens", [1, 255, 256, 600])
@pytest.mark.parametrize("biased", [True, False])
def test_losses_and_gradients_are_those_of_logits(tokens, biased, monkeypatch):
    monkeypatch.setattr(head, "LOGITS", 100 * head.MULTIPLE)  # so that 600 tokens are three chunks
    hidden, weight, bias, targets = inputs(tokens)
    leaves = (hidden, weight, bias)[: 2 + biased]
    each = F.cross_entropy(F.linear(*leaves), targets, reduction="none", ignore_index=IGNORED)
    total, losses = HeadLoss.apply(hidden, weight, bias if biased else None, targets, torch.float32)
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(total, each.sum())
    made, expected = gradients(total, *leaves), gradients(each.sum(), *leaves)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_logits_are():
    hidden, weight, bias, targets = inputs(600, size=64, vocabulary=2000)
    true = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight, bias)
    plain = F.cross_entropy(logits.float(), targets, reduction="sum")
    total, losses = HeadLoss.apply(hidden, weight, bias, targets, torch.bfloat16)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(total, plain, rtol=1e-3, atol=0)
    leaves = (hidden, weight, bias)
    for made, usual, exact in zip(*(gradients(x, *leaves) for x in (total, plain, true)), strict=True):
        assert made.dtype == torch.float32
        assert (made - exact).norm() < 1.2 * (usual - exact).norm() < 0.05 * exact.norm()


def test_a_target_that_is_nearly_learned_still_has_its_gradient():
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[7.0], [0.0]], requires_grad=True)
    total, _ = HeadLoss.apply(hidden, weight, None, torch.tensor([0]), torch.bfloat16)
    (gradient,) = torch.autograd.grad(total, weight)
    assert gradient[0, 0].item() == pytest.approx(-0.000911, rel=0.01)  # 1 - 0.999 is 0 in bfloat16


def test_frozen_weights_cost_no_gradient():
    hidden, weight, bias, targets = inputs(10)
    total, _ = HeadLoss.apply(hidden, weight.detach(), bias.detach(), targets, torch.float32)
    total.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert torch.equal(HeadLoss.apply(hidden, weight, bias, targets, torch.float32)[0], total)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_the_same_with_it(family):
    made, outcomes = documents(20), []
    batch = collate(pack([len(d.ids) for d in made], 64), made, 64, 0)
    for context in (nullcontext, fused_head):
        model = model_of(family).eval()
        with context(model) if context is fused_head else nullcontext() as found:
            total, each = trainer.batch_loss(model, batch, Accelerator(cpu=True), found)
        assert (found is None) == (context is nullcontext)
        total.backward()
        outcomes.append((total.detach(), each.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [Gemma2Config, CohereConfig])
def test_a_model_that_changes_its_logits_keeps_them(changed):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = changed(vocab_size=100, intermediate_size=32, head_dim=16, pad_token_id=0, **small)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(5)[None]
    before = model(ids).logits
    with fused_head(model) as found:
        assert found is None
        assert torch.equal(model(ids).logits, before)


def test_the_model_has_its_logits_again_afterwards():
    model = model_of("llama")
    ids = torch.arange(5)[None]
    before, training = model(ids).logits, model.training
    with pytest.raises(KeyboardInterrupt), fused_head(model):
        raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, before)
    assert model.training == training
