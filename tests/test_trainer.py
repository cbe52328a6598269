"""The loop against the plain forward: documents apart, the same gradient however it is cut, a loss that is true."""

import itertools
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import CONFIGS, FAMILIES
from transformers import AutoModelForCausalLM

from dolly import trainer
from dolly.config import TrainConfig
from dolly.distributed import Alone
from dolly.errors import UserError
from dolly.packing import Document, collate, pack

CONFIG = TrainConfig(dtype="float32", batch_tokens=64, micro_batch_tokens=64, learning_rate=1e-2, epochs=2)

DRY = {"gptj": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}  # without dropout


def model_of(family: str, **changes):
    kind, options = CONFIGS[family]
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(kind(vocab_size=100, **options | changes))


def documents(count: int, seed: int = 0, longest: int = 20) -> list[Document]:
    choose = random.Random(seed)
    ids = [choose.choices(range(100), k=choose.randint(4, longest)) for _ in range(count)]
    return [Document(i, [n > choose.randint(1, 3) for n in range(len(i))], choose.choice("ab")) for i in ids]


def plain_loss(model, document: Document) -> torch.Tensor:
    """Summed over the answer tokens of one document alone, the way any textbook writes it."""
    ids = torch.tensor([document.ids])
    logits = model(ids).logits[0, :-1]
    learned = torch.tensor(document.learned[1:])
    return F.cross_entropy(logits[learned].float(), ids[0, 1:][learned], reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_packed_losses_are_those_of_each_document_alone(family, rows, training):
    model = model_of(family, **({"hidden_dropout": 0.0} if family == "gpt_neox" else {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(training)
    made = documents(20)
    packed = pack([len(d.ids) for d in made], 64)[:rows]
    assert len(packed) == rows
    batch = collate(packed, made, 64, pad_id=0)
    _, losses = trainer.batch_loss(model, batch, Accelerator(cpu=True))
    for index in {i for row in packed for i in row}:
        alone = plain_loss(model, made[index])
        torch.testing.assert_close(losses[batch.documents == index].sum(), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_does_not_depend_on_the_micro_batches(family):
    made = documents(20)

    def trained(micro: int) -> dict:
        model = model_of(family)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = replace(CONFIG, batch_tokens=128, micro_batch_tokens=micro, max_steps=3)
        trainer.train(model, made, [], 32, 0, config)
        return model.state_dict()

    whole, cut = trained(128), trained(32)
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-3, atol=2e-4, msg=name)


def test_the_heldout_loss_is_the_mean_over_answer_tokens_by_category():
    model, made = model_of("llama").eval(), documents(15)
    alone = Alone(torch.device("cpu"), "float32")
    sums = trainer.document_losses(lambda batch: trainer.batch_loss(model, batch, alone), made, 32, 2, 0, alone)
    losses = trainer.by_category(sums, made)
    for category in (None, "a", "b"):
        chosen = [d for d in made if category in (None, d.category)]
        mean = sum(plain_loss(model, d).item() for d in chosen) / sum(d.answer_tokens() for d in chosen)
        assert losses[category] == pytest.approx(mean, rel=1e-4)


def test_training_lowers_the_loss_and_keeps_its_history():
    made = documents(40)
    history, _ = trainer.train(model_of("gpt_neox"), made[:30], made[:30], 32, 0, replace(CONFIG, epochs=20))
    assert history.heldout[-1] < history.heldout[0] - 0.5
    assert len(history.heldout) == 1 + CONFIG.evaluations
    assert history.tokens == 20 * sum(len(d.ids) for d in made[:30])
    assert {name: len(losses) for name, losses in history.heldout_by_category.items()} == dict.fromkeys("ab", 5)
    steps = [row["step"] for row in history.rows]
    assert steps == sorted(steps) and steps[-1] == history.steps


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    made, weights = documents(30), []
    for seed in (0, 0, 1):
        model = model_of("gpt2")
        trainer.train(model, made, [], 32, 0, replace(CONFIG, max_steps=4, seed=seed))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(UserError, match=r"loss is nan at step 5"):
        trainer.train(model, documents(60), [], 32, 0, CONFIG)


def test_a_heldout_loss_that_is_not_finite_stops_the_run_too():
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("inf")
    with pytest.raises(UserError, match=r"at step 0"):
        trainer.train(model, documents(60), documents(5), 32, 0, CONFIG)


def test_an_update_is_never_less_than_a_row():
    history, _ = trainer.train(model_of("gpt2"), documents(9), [], 32, 0, replace(CONFIG, batch_tokens=1, epochs=1))
    assert history.steps == len(pack([len(d.ids) for d in documents(9)], 32))


def test_the_head_sees_few_shapes():
    made = documents(40, longest=60)
    for rows in (1, 2, 5):
        batch = collate(pack([len(d.ids) for d in made], 64)[:rows], made, 64, 0)
        keep, targets, learned = trainer.kept(batch)
        assert len(targets) == keep.sum() and (len(targets) % trainer.ROUND == 0 or keep.all())
        assert torch.equal(targets[learned], batch.targets)
        assert torch.equal(keep.flatten().nonzero().flatten()[learned], batch.places)


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    rates = [trainer.rate(step, 100, replace(CONFIG, warmup=0.1)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert {trainer.rate(s, 9, replace(CONFIG, schedule="constant", warmup=0.0)) for s in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_neox", {"gradient_checkpointing": "on"}),
        ("gptj", {"gradient_checkpointing": "on"}),
        pytest.param(
            *("gpt_neox", {"compile": True}),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++"),
        ),
    ],
)
def test_what_saves_memory_or_time_does_not_change_what_is_learned(family, change):
    made, outcomes = documents(30), []
    for config in (CONFIG, replace(CONFIG, **change)):
        config = replace(
            config, max_steps=3, gradient_checkpointing=config.gradient_checkpointing.replace("auto", "off")
        )
        history, model = trainer.train(model_of(family, **DRY.get(family, {})), made, made[:5], 32, 0, config)
        outcomes.append((history.heldout, model.state_dict()))
        assert not model.is_activation_checkpointing
    (plain, weights), (changed, same) = outcomes
    assert changed == pytest.approx(plain, abs=1e-4)
    for name, weight in same.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4, msg=name)


def test_adamw_in_8_bits_learns_and_keeps_the_embedding_in_32():
    model, made = model_of("llama", hidden_size=128), documents(30)
    config = replace(CONFIG, optimizer="adamw-8bit", epochs=10)
    optimizer = trainer.optimizer_of(model, config)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    kinds = {name: optimizer.state[weight]["state1"].dtype for name, weight in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    history, _ = trainer.train(model_of("llama", hidden_size=128), made, made, 32, 0, config)
    assert history.heldout[-1] < history.heldout[0] - 1


def test_layers_are_computed_again_where_memory_asks_for_it(monkeypatch):
    model = model_of("llama")
    free = SimpleNamespace(available=2**30)
    monkeypatch.setattr(trainer.psutil, "virtual_memory", lambda: free)
    auto = replace(CONFIG, gradient_checkpointing="auto")
    assert not trainer.recomputes(model, 4096, "float32", auto)
    free.available = 4096 * 34 * 2 * 32 * 2  # what the layers keep alone
    assert trainer.recomputes(model, 4096, "float32", auto)
    assert not trainer.recomputes(model, 4096, "bfloat16", auto)
    assert not trainer.recomputes(model, 4096, "float32", replace(CONFIG, gradient_checkpointing="off"))


def test_float16_is_refused_where_it_would_overflow_and_taken_by_the_hardware(bases, monkeypatch):
    base = str(bases["gptj"])
    with pytest.raises(UserError, match="needs a GPU"):
        trainer.precision(replace(CONFIG, dtype="float16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="exceeds the range"):
        trainer.precision(replace(CONFIG, base=base, dtype="float16"))
    assert trainer.precision(replace(CONFIG, base=base, dtype="auto")) == "float32"
    assert trainer.precision(replace(CONFIG, base=str(bases["llama"]), dtype="auto")) == "float16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert trainer.precision(replace(CONFIG, base=base, dtype="auto")) == "bfloat16"


@pytest.mark.parametrize(
    ("instructions", "seconds", "taken"), [(True, 3, "float32"), (True, 1, "bfloat16"), (False, 1, "float32")]
)
def test_bfloat16_is_taken_where_the_processor_is_faster_at_it(monkeypatch, instructions, seconds, taken):
    """seconds: of a product in bfloat16; one in float32 takes 2."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    clock = itertools.cycle([0, 2, 0, seconds])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))
    trainer.bfloat16_pays.cache_clear()
    assert trainer.precision(replace(CONFIG, dtype="auto")) == taken
    trainer.bfloat16_pays.cache_clear()
