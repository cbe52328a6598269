"""Adapters of every family learn, the control tokens' rows with them; what is merged or saved computes the same."""

import json
import re

import pytest
import torch
from conftest import FAMILIES, save_base
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, pipeline
from transformers.pytorch_utils import Conv1D

from dolly import model as models
from dolly.adapters import add_adapters, merged
from dolly.errors import UserError
from dolly.packing import IGNORED
from dolly.prompt import CONTROL_TOKENS, END, dolly_tokenizer, encode
from dolly.report import CardFacts, model_card

QUESTION, ANSWER = "Which fruit is yellow?", "The banana."
TIED = ["gpt2", "qwen3 tied"]
KINDS = [*FAMILIES, "qwen3 tied"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of bases by kind, size of the hidden states and spare rows; their heads have a bias that counts."""
    folders = {}

    def make(kind: str, spare: int = 20, size: int = 32):
        key = (kind, spare, size)
        if key not in folders:
            family, _, tied = kind.partition(" ")
            changes = {"initializer_range": 0.3} | ({"tie_word_embeddings": True} if tied else {})
            if size != 32:
                wide = {"n_embd": size} if family.startswith("gpt") and family != "gpt_neox" else {"hidden_size": size}
                changes |= wide | ({} if "n_embd" in wide else {"intermediate_size": 2 * size})
            folder = tmp_path_factory.mktemp("base")
            save_base(folder, family, **changes)
            tokens = len(models.load_tokenizer(str(folder)))
            save_base(folder, family, rows=tokens + spare, **changes)
            folders[key] = str(folder)
        return folders[key]

    return make


def adapted(base: str, rank: int = 8, **options):
    """A base with adapters and its tokenizer."""
    known = models.load_tokenizer(base)
    tokenizer = dolly_tokenizer(known)
    tokenizer.model_max_length = 256
    model = models.load_base(base, **options)
    torch.manual_seed(0)
    return add_adapters(model, tokenizer, models.make_room(model, known, tokenizer), rank), tokenizer


def shaken(model):
    """With adapters as large as if they had learned a lot."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def conversation(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, [1, length]; in two turns all three control tokens are read before something is learned."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    ids, learned = map(torch.tensor, encode(tokenizer, turns * 2))
    return ids[None], torch.where(learned, ids, IGNORED)[None]


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=conversation(tokenizer)[0]).logits.float()


def loss_of(model, tokenizer) -> torch.Tensor:
    """As the trainer asks for it: the head at answer tokens only."""
    ids, labels = conversation(tokenizer)
    keep = torch.cat([labels[:, 1:] != IGNORED, torch.tensor([[False]])], 1)
    positions = torch.arange(ids.shape[1])[None]
    out = model(input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False).logits
    return torch.nn.functional.cross_entropy(out.float().view(-1, out.shape[-1]), labels[:, 1:][keep[:, :-1]])


def learn(model, tokenizer, steps: int) -> list[float]:
    """The losses of a fine-tuning on one conversation, without the dropout of the base."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        loss = loss_of(model.eval(), tokenizer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spare", [0, 2, 20])
def test_untrained_adapters_change_nothing_but_the_mean_rows(kind, made, spare):
    model, tokenizer = adapted(made(kind, spare))
    base = models.load_tokenizer(made(kind, spare))
    plain = models.load_base(made(kind, spare))
    models.add_control_tokens(plain, base, tokenizer)
    known = torch.arange(len(base))
    torch.testing.assert_close(
        logits(model.eval(), tokenizer)[..., known], logits(plain.eval(), tokenizer)[..., known], rtol=1e-4, atol=1e-4
    )


def test_every_matrix_of_the_layers_has_an_adapter_and_nothing_else_is_trained(kind, made):
    base = models.load_base(made(kind))
    matrices = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    model, _ = adapted(made(kind), dtype=torch.bfloat16)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    tables = {name for name, layer in layers.items() if layer.r["default"] == 3}
    assert len(tables) == 2
    assert set(layers) == set(matrices) | tables
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * len(layers) - (3 if kind in TIED else 2)
    frozen = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert frozen == {torch.bfloat16}


def test_the_model_learns_to_end_and_its_tables_change_in_the_rows_of_control_tokens_alone(kind, made):
    model, tokenizer = adapted(made(kind))
    before = models.load_base(made(kind))
    losses = learn(model, tokenizer, 50)
    assert losses[-1] < losses[0] / 2
    end = tokenizer.convert_tokens_to_ids(END)
    assert conversation(tokenizer)[0][0, -1] == end
    chances = logits(model, tokenizer)[0, -2].softmax(-1)
    assert chances.argmax() == end and chances[end] > 0.5

    after = merged(model)
    control = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, now = (getattr(m, table)().weight.detach() for m in (before, after))
        kept = [i for i in range(len(old)) if i not in control]
        assert torch.equal(old[kept], now[kept])
        begin = old[control] if kind == "gpt_neox" else old[: min(control)].mean(0)  # its tokenizer knew them
        assert ((now[control] - begin).norm(dim=1) > 0.05).all()
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == (kind in TIED)
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings


@pytest.mark.parametrize("spare", [0, 20])
def test_what_is_merged_computes_what_the_adapters_did(kind, made, spare):
    model, tokenizer = adapted(made(kind, spare))
    if (bias := getattr(model.get_output_embeddings().base_layer, "bias", None)) is not None:
        bias.data.normal_()  # of the head of GPT-J
    expected = logits(shaken(model), tokenizer)
    torch.testing.assert_close(logits(merged(model), tokenizer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TIED)
def test_adapters_made_elsewhere_leave_the_tables_as_they_are(kind, made):
    base = models.load_base(made(kind))
    tokenizer = dolly_tokenizer(models.load_tokenizer(made(kind)))
    table = base.get_input_embeddings().weight.clone()
    model = shaken(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")))
    expected = logits(model, tokenizer)
    plain = merged(model)
    torch.testing.assert_close(logits(plain, tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.get_output_embeddings().weight, table)


@pytest.fixture(scope="module", params=[0, 20])
def package(request, kind, made, tmp_path_factory):
    """A package of adapters, the model and tokenizer that it was saved from, and its spare rows."""
    model, tokenizer = adapted(made(kind, request.param))
    folder = tmp_path_factory.mktemp("packages") / "adapters"
    defaults = models.generation_defaults(tokenizer, shaken(model), do_sample=False, max_new_tokens=5)
    models.save_package(model, tokenizer, folder, defaults, {"README.md": "ours"})
    return folder, model, tokenizer, request.param


def test_the_package_holds_what_was_trained_and_names_its_base(package, kind, made):
    folder, model, _, spare = package
    assert not list(folder.parent.glob("adapters?*"))
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    assert (folder / "README.md").read_text() == "ours"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == made(kind, spare)
    saved = load_file(folder / "adapter_model.safetensors")
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    others = {re.sub(r".*\.", "", name.removesuffix(".weight")) for name in saved.keys() - trained.keys()}
    assert others == {"lora_embedding_A", "lora_B"} | ({"lora_A"} if kind in TIED else set())  # of the two tables
    for name, parameter in trained.items():
        assert saved[name].any() and torch.equal(saved[name], parameter)


def test_the_package_gives_the_same_logits_wherever_it_is_loaded(package):
    folder, model, tokenizer, spare = package
    expected = logits(model, tokenizer)
    ours, known = models.load_package(str(folder))
    torch.testing.assert_close(logits(ours, tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert known.get_vocab() == tokenizer.get_vocab()
    assert ours.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids(END)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    noise = 1e-4 if spare else 1e-2  # it adds missing rows itself, random ones around the mean
    torch.testing.assert_close(logits(by_peft, tokenizer), expected, rtol=noise, atol=noise)
    if spare:
        pipe = pipeline("text-generation", model=str(folder))
        torch.testing.assert_close(logits(pipe.model, tokenizer), expected, rtol=1e-4, atol=1e-4)
        said = pipe(QUESTION, generation_config=GenerationConfig.from_pretrained(folder))
        assert said[0]["generated_text"].startswith(QUESTION)


def test_the_code_in_the_card_of_adapters_alone_answers(package, capsys):
    folder = str(package[0])
    facts = {"data": "my.jsonl", "train_records": 1, "validation_records": 0, "steps": 1, "tokens": 1, "seconds": 1.0}
    settings = {"lora_rank": 4, "merge": False}
    text = model_card(
        CardFacts(
            name=folder, base="me/base", license=None, settings=settings, hardware="CPU", dtype="bfloat16", **facts
        )
    )
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()


def test_a_base_given_by_a_relative_path_is_found_from_anywhere(made, tmp_path, monkeypatch):
    base = made("llama")
    monkeypatch.chdir(base)
    model, tokenizer = adapted(".")
    defaults = models.generation_defaults(tokenizer, model, do_sample=False)
    models.save_package(model, tokenizer, tmp_path / "out", defaults, {})
    monkeypatch.chdir(tmp_path)
    assert models.load_package("out")


def test_a_base_given_by_id_stays_one(made):
    model = models.load_base(made("llama"))
    model.name_or_path = "EleutherAI/pythia-70m"
    adapters = add_adapters(model, dolly_tokenizer(models.load_tokenizer(made("llama"))), [], 4)
    assert adapters.peft_config["default"].base_model_name_or_path == "EleutherAI/pythia-70m"


def test_a_package_of_adapters_that_is_not_whole_is_explained(made, tmp_path):
    model, tokenizer = adapted(made("llama"))
    defaults = models.generation_defaults(tokenizer, model, do_sample=False)
    models.save_package(model, tokenizer, tmp_path / "out", defaults, {})
    weights = tmp_path / "out" / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if "lora_B" not in name}, weights)
    with pytest.raises(UserError, match="lacks 15 of the adapters"):
        models.load_package(str(tmp_path / "out"))
    weights.write_bytes(weights.read_bytes()[:443])
    with pytest.raises(UserError, match="out does not hold a model"):
        models.load_package(str(tmp_path / "out"))
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace(made("llama"), "/gone"))
    with pytest.raises(UserError, match="holds adapters, which need the model .* There is no folder /gone"):
        models.load_package(str(tmp_path / "out"))
    config.write_text("{")
    with pytest.raises(UserError, match="out does not hold a model"):
        models.load_package(str(tmp_path / "out"))


def gradient(model, tokenizer, lowered: bool) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        loss = loss_of(model, tokenizer)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients} == {torch.float32}
    return torch.cat([g.flatten() for g in gradients])


def test_a_base_in_bfloat16_under_autocast_gives_nearly_the_gradient_of_float32(kind, made):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = adapted(made(kind), dtype=dtype)
        learn(model, tokenizer, 3)  # so that both factors have a gradient
        found.append(model.eval())
    found[1].load_state_dict({n: p for n, p in found[0].state_dict().items() if "lora_" in n}, strict=False)
    true, lowered = gradient(found[0], tokenizer, False), gradient(found[1], tokenizer, True)
    assert 0 < (lowered - true).norm() < 0.2 * true.norm()
    assert logits(found[1], tokenizer).isfinite().all()  # without autocast, as the samples are written


def test_four_bits_learn_and_are_merged_into_what_was_trained(kind, made, tmp_path):
    folder = made(kind, 20, 64)
    base = models.load_base(folder)
    model, tokenizer = adapted(folder, quantize=True)
    held = model.config.quantization_config
    assert (held.bnb_4bit_quant_type, held.bnb_4bit_use_double_quant) == ("nf4", True)
    assert held.bnb_4bit_compute_dtype == torch.bfloat16
    packed = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    head = base.get_output_embeddings()
    matrices = [m for m in base.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    assert len(packed) == len(matrices)
    losses = learn(model, tokenizer, 30)
    assert losses[-1] < losses[0] - 0.5

    before = gradient(model, tokenizer, False)
    expected = logits(model, tokenizer)
    assert torch.equal(gradient(model, tokenizer, False), before)  # as it is not if the weights are packed anew

    plain = merged(model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}
    assert (logits(plain, tokenizer) - expected).norm() < 0.05 * expected.norm()
    assert (logits(base, tokenizer) - expected).norm() > 0.2 * expected.norm()
    defaults = models.generation_defaults(tokenizer, plain, do_sample=False)
    models.save_package(plain, tokenizer, tmp_path / "out", defaults, {})
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again, _ = models.load_package(str(tmp_path / "out"))
    assert (logits(again, tokenizer) - expected).norm() < 0.05 * expected.norm()
