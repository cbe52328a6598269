"""Attention by documents on a GPU."""

import pytest
import torch
from test_attention import FAMILIES, alone, assert_same, batch_of, dense, gradient, logits_of, model_of, pieces, qkv

from dolly import attention
from dolly.attention import check_apart, documents_apart

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_what_each_document_gets_alone(family, rows):
    model, (batch, spans) = model_of(family).train().cuda(), batch_of(rows)
    with torch.autocast("cuda", torch.bfloat16):
        expected = alone(model, batch, spans)
        true = gradient(model, expected, batch, spans)
        model.activation_checkpointing_enable()
        with documents_apart(model) as apart:
            mask = apart(batch.position_ids)
            found = pieces(logits_of(model, batch.flat(), lambda positions: mask).view(rows, 128, -1), spans)
            packed = gradient(model, found, batch, spans)
    assert_same(found, expected, (packed, true), atol=0.05, share=0.05)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("size", [8, 64, 256])
def test_flash_attention_attends_as_under_a_mask(size, window):
    edges, positions, tensors = qkv(heads=4, shared=2, rows=4, size=size)
    found = attention.attend(edges.cuda(), *(x.cuda().bfloat16() for x in tensors), window=window)
    expected = dense(positions, *tensors, size**-0.5, window, None)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.02)
    back = torch.randn_like(expected)
    ours = torch.autograd.grad(found, tensors, back.cuda().bfloat16())
    for one, other in zip(ours, torch.autograd.grad(expected, tensors, back), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_a_gpu_is_never_waited_for(family, precision):
    model, (batch, _) = model_of(family).cuda(), batch_of(3)
    ids, positions = batch.flat().input_ids.cuda(), batch.flat().position_ids.cuda()
    with documents_apart(model) as apart, torch.autocast("cuda", precision, enabled=precision != torch.float32):
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        model(**given, attention_mask=apart(batch.position_ids))  # the first time buffers are moved
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**given, attention_mask=apart(batch.position_ids)).logits.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_pass_the_check_on_a_gpu(family):
    check_apart(model_of(family).cuda(), 128)
    with torch.autocast("cuda", torch.bfloat16):
        check_apart(model_of(family).cuda(), 128)
