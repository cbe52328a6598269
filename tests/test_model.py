"""The package of every family: the pipeline answers strings and messages alike and stops by itself."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ANSWER, CONFIGS, FAMILIES, QUESTION, base_tokenizer, save_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dolly import model as models
from dolly.errors import UserError
from dolly.prompt import CONTROL_TOKENS, END, dolly_tokenizer, encode


@pytest.fixture(params=FAMILIES)
def package(request, packages):
    return packages[request.param]


def test_the_pipeline_answers_a_string_and_messages_alike_and_stops(package):
    pipe = pipeline("text-generation", model=str(package))
    messages = [{"role": "user", "content": QUESTION}]
    said = pipe(QUESTION, return_full_text=False)[0]["generated_text"]
    assert said == ANSWER
    assert pipe(messages)[0]["generated_text"][-1] == {"role": "assistant", "content": ANSWER}
    assert pipe([QUESTION, "Which is red?"], batch_size=2, return_full_text=False)[0][0]["generated_text"] == ANSWER

    end = pipe.tokenizer.convert_tokens_to_ids(END)
    ids = [pipe(x, return_tensors=True)[0]["generated_token_ids"] for x in (QUESTION, messages)]
    assert ids[0] == ids[1]
    assert ids[0][-1] == end and ids[0].count(end) == 1


def test_the_package_holds_no_code_and_loads_in_both_major_versions(package):
    names = {path.name for path in package.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "train.yaml"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    config, tokenizer = (json.loads((package / n).read_text()) for n in ("config.json", "tokenizer_config.json"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == list(CONTROL_TOKENS)
    assert "extra_special_tokens" not in tokenizer and "auto_map" not in config
    assert config["dtype"] == "bfloat16"
    generation = json.loads((package / "generation_config.json").read_text())
    loaded = AutoTokenizer.from_pretrained(package)
    assert generation["eos_token_id"][0] == config["eos_token_id"] == loaded.convert_tokens_to_ids(END)
    assert generation["pad_token_id"] == config["pad_token_id"] == loaded.pad_token_id


def test_a_package_can_be_fine_tuned_again_without_losing_its_control_tokens(package):
    base = models.load_tokenizer(str(package))
    again = dolly_tokenizer(base)
    model = models.load_base(str(package))
    kept = model.get_input_embeddings().weight.detach().clone()
    models.add_control_tokens(model, base, again)
    assert len(again) == len(base)
    assert torch.equal(model.get_input_embeddings().weight, kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spare", [0, 2, 60])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_and_a_padded_table_never_shrinks(family, spare, tied):
    base = base_tokenizer({"gptj": "gpt2", "gpt_neox": "llama"}.get(family, family))
    kind, options = CONFIGS[family]
    config = kind(vocab_size=len(base) + spare, tie_word_embeddings=tied, **options)
    model = AutoModelForCausalLM.from_config(config)
    old = model.get_input_embeddings().weight.detach().clone()
    tokenizer = dolly_tokenizer(base)
    models.add_control_tokens(model, base, tokenizer)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape[0] == head.shape[0] == max(len(old), len(base) + 3)
    assert torch.equal(table[: len(base)], old[: len(base)])
    assert (table is head) == tied
    new = [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS]
    assert min(new) >= len(base)
    torch.testing.assert_close(table[new], old[: len(base)].mean(0).expand(3, -1))
    torch.testing.assert_close(head[new], head[: len(base)].mean(0).expand(3, -1))


def test_a_failed_save_leaves_nothing_behind(bases, tmp_path):
    model = models.load_base(str(bases["gpt2"]))
    base = models.load_tokenizer(str(bases["gpt2"]))
    tokenizer = dolly_tokenizer(base)
    models.add_control_tokens(model, base, tokenizer)
    defaults = models.generation_defaults(tokenizer, model, do_sample=False)
    with pytest.raises(UserError, match="cannot be saved"):
        models.save_package(model, tokenizer, tmp_path / "out", defaults, {"no/such/folder/README.md": "x"})
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "late").touch()  # appeared while the model trained
    with pytest.raises(UserError, match="is whole in") as told:
        models.save_package(model, tokenizer, tmp_path / "out", defaults, {})
    rescued = re.search(r"whole in (\S+),", str(told.value))[1]
    assert models.load_package(rescued)


def test_weights_that_find_no_room_are_explained_and_leave_nothing(bases, tmp_path):
    base = models.load_tokenizer(str(bases["gpt2"]))
    tokenizer, model = dolly_tokenizer(base), models.load_base(str(bases["gpt2"]))
    models.add_control_tokens(model, base, tokenizer)
    defaults = models.generation_defaults(tokenizer, model, do_sample=False)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, allowed[1]))  # the weights are larger
    try:
        with pytest.raises(UserError, match="cannot be saved"):
            models.save_package(model, tokenizer, tmp_path / "out", defaults, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy_of(bases, tmp_path):
    """A base of a family that a test may damage."""
    return lambda family: Path(shutil.copytree(bases[family], tmp_path / "base"))


def test_a_configuration_without_weights_starts_at_random_by_the_seed(copy_of, capsys):
    base = copy_of("llama")
    trained = models.load_base(str(base)).state_dict()
    assert "random" not in capsys.readouterr().out
    (base / "model.safetensors").unlink()
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(models.load_base(str(base)))
    assert capsys.readouterr().out == f"{base} holds a configuration and no weights: they start at random.\n" * 3
    weights = [model.state_dict() for model in made]
    assert weights[0].keys() == trained.keys()
    assert all(p.dtype == torch.float32 for p in made[0].parameters())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in trained)
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert models.load_base(str(base), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="no weights to quantize"):
        models.load_base(str(base), quantize=True)


def test_weights_that_are_not_whole_are_no_random_start(bases, copy_of):
    base = copy_of("llama")
    whole = (base / "model.safetensors").read_bytes()
    models.load_base(str(bases["llama"])).save_pretrained(base, max_shard_size="60KB")
    (base / "model.safetensors").unlink()
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    for gone in shards[1:]:
        gone.unlink(missing_ok=True)
        with pytest.raises(UserError, match="base does not hold a model"):
            models.load_base(str(base))
    shards[0].unlink()  # the index alone
    with pytest.raises(UserError, match="base does not hold a model"):
        models.load_base(str(base))
    (base / "model.safetensors.index.json").unlink()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="base does not hold a model"):
        models.load_base(str(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_missing_are_named(copy_of, family):
    base = copy_of(family)
    weights = load_file(base / "model.safetensors")
    del weights[min(weights)]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    dolly_tokenizer(models.load_tokenizer(str(base))).save_pretrained(base)
    for load in (models.load_base, models.load_package):
        with pytest.raises(UserError, match=r"base lacks weights of .*: [\w.]+\. They would be random"):
            load(str(base))


def test_four_bits_need_bitsandbytes_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        models.load_base("no/such-model", quantize=True)


def test_models_that_overflow_in_float16_are_known(bases, copy_of):
    assert [family for family in FAMILIES if models.overflows_in_float16(str(bases[family]))] == ["gptj"]
    base = copy_of("qwen3")
    models.load_base(str(base)).to(torch.bfloat16).save_pretrained(base)
    assert models.overflows_in_float16(str(base))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}"])
def test_a_damaged_package_is_explained(bases, tmp_path, name, content):
    shutil.copytree(bases["qwen3"], tmp_path / "base")
    (tmp_path / "base" / name).write_bytes(content)
    with pytest.raises(UserError, match="does not hold a model"):
        models.load_tokenizer(str(tmp_path / "base"))
        models.load_base(str(tmp_path / "base"))


def test_a_base_whose_card_is_broken_has_no_known_licence(bases, tmp_path):
    assert models.license_of(str(bases["gpt2"])) is None
    for card, licence in [("---\nlicense: [a\n---\n", None), ("---\nlicense: mit\n---\n", "mit")]:
        (tmp_path / "README.md").write_text(card)
        assert models.license_of(str(tmp_path)) == licence


def test_sample_answers_end_at_the_window(bases):
    base = models.load_tokenizer(str(bases["gpt2"]))
    tokenizer, model = dolly_tokenizer(base), models.load_base(str(bases["gpt2"]))
    tokenizer.model_max_length = 256
    models.add_control_tokens(model, base, tokenizer)
    defaults = models.generation_defaults(tokenizer, model, do_sample=False, max_new_tokens=5000)
    assert len(models.answers(model, tokenizer, ["Hello " * 30, "Hi"], defaults)) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such-model", "no folder no/such-model, and the Hugging Face Hub cannot be asked"),
        ("data/none", "There is no folder data/none"),
        ("a b", "There is no folder a b"),
        ("data", "data does not hold a model that transformers can load"),
    ],
)
def test_an_unknown_model_is_explained(name, said):
    with pytest.raises(UserError, match=said):
        models.load_package(name)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_what_was_fetched_before_needs_no_network(tmp_path, monkeypatch, file):
    fetched = tmp_path / "models--someone--tuned"
    (fetched / "refs").mkdir(parents=True)
    (fetched / "refs" / "main").write_text("0" * 40)
    (fetched / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (fetched / "snapshots" / ("0" * 40) / file).write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    models._check_there("someone/tuned")
    with pytest.raises(UserError, match="cannot be asked"):
        models._check_there("someone/other")


def test_a_model_without_the_prompt_is_no_package(tmp_path):
    save_base(tmp_path, "gpt2")
    with pytest.raises(UserError, match="Fine-tune it first"):
        models.load_package(str(tmp_path))


@pytest.fixture
def dolly_v2(tmp_path):
    """A package in the form of databricks/dolly-v2-3b: its prompt is in code beside it, its weights are a pickle."""
    folder = tmp_path / "dolly-v2-3b"
    tokenizer = base_tokenizer("gpt_neox")
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    kind, options = CONFIGS["gpt_neox"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **options | {"initializer_range": 0.5}))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"impl": "instruct_pipeline.InstructionTextGenerationPipeline", "pt": ["AutoModelForCausalLM"], "tf": []}
    (folder / "config.json").write_text(json.dumps(config | {"custom_pipelines": {"text-generation": code}}))
    (folder / "instruct_pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return folder


def test_a_package_like_dolly_v2_gets_the_prompt_that_it_was_trained_with(dolly_v2):
    plain = AutoTokenizer.from_pretrained(dolly_v2)
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    wanted = plain(f"{intro}\n\n### Instruction:\n{QUESTION}\n\n### Response:\n", add_special_tokens=False).input_ids
    model, tokenizer = models.load_package(str(dolly_v2))
    assert encode(tokenizer, [{"role": "user", "content": QUESTION}])[0] == wanted
    assert tokenizer(QUESTION).input_ids == wanted
    asked = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids == wanted
    turns = [*asked, {"role": "assistant", "content": ANSWER}, *asked]
    after = plain(f"{ANSWER}\n\n### End\n\n### Instruction:\n{QUESTION}\n\n### Response:\n", add_special_tokens=False)
    assert encode(tokenizer, turns)[0] == wanted + after.input_ids
    assert model.generation_config.eos_token_id[0] == plain.convert_tokens_to_ids(END)
    assert tokenizer.model_max_length == 256
    assert not (dolly_v2.parent / "ran").exists()


def test_a_pickle_that_would_run_a_program_is_refused(dolly_v2, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Program()}, dolly_v2 / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run any program"):
        models.load_package(str(dolly_v2))
    assert not (tmp_path / "ran").exists()


def test_sample_answers_may_repeat_the_prompt_but_not_themselves(bases):
    base = models.load_tokenizer(str(bases["gpt_neox"]))
    tokenizer, model = dolly_tokenizer(base), models.load_base(str(bases["gpt_neox"]))
    models.add_control_tokens(model, base, tokenizer)
    model.generation_config = models.generation_defaults(
        tokenizer, model, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=1
    )
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    with torch.no_grad():
        model.get_output_embeddings().weight[ids[0, -2]] *= 1000  # a token of the prompt has the highest score, or
        model.get_output_embeddings().weight[ids[0, -3]] *= -1000  # another, where the hidden state points away
    answer = models.answers(model, tokenizer, [QUESTION], model.generation_config)[0].text
    said = tokenizer(answer, add_special_tokens=False).input_ids
    assert set(said) & {ids[0, -2].item(), ids[0, -3].item()}
    whole = model.generate(ids)[0, ids.shape[1] :].tolist()
    assert not set(whole) & set(ids[0].tolist())  # transformers counts the prompt too
