"""train.py as a user runs it: what it writes, and what it says when something is wrong."""

import json
import shutil

import pytest
import yaml
from conftest import ROOT, run, save_base
from transformers import AutoTokenizer, pipeline

import train
from dolly.errors import UserError, told_plainly
from dolly.model import answers, load_package
from dolly.prepare import prepare

ROWS = [{"instruction": f"Count to {n}.", "response": " ".join(map(str, range(1, n + 1)))} for n in range(2, 40)]


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_a_run_from_a_file_and_the_command_line(bases, tmp_path):
    private = [row | {"instruction": row["instruction"] + " Ask jo@mailbox.net."} for row in ROWS[::2]]
    rows = [*private, *ROWS[1::2], "{broken", {"instruction": "Long", "response": "word " * 500}]
    write(tmp_path / "data.jsonl", rows)
    settings = {"base": str(bases["gpt_neox"]), "data": str(tmp_path / "data.jsonl"), "epochs": 9, "max_length": 200}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    options = ["--output", tmp_path / "out", "--epochs", 2, "--bad-records", "drop", "--validation", 0.2]
    result = run("train.py", "--config", tmp_path / "run.yaml", *options)
    assert result.returncode == 0, result.stderr
    assert "38 records kept, 2 dropped" in result.stdout
    assert "line 39: not valid JSON" in result.stdout and "line 40: longer than 200 tokens" in result.stdout
    assert "held-out loss" in result.stderr and "tokens/s" in result.stderr
    assert "python app.py --model" in result.stdout
    stored = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert (stored["epochs"], stored["max_length"], stored["validation"]) == (2, 200, 0.2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "longer than 200 tokens" in card and str(tmp_path) not in card
    assert "**Prompt**" in card and "mailbox" not in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--data": "no/such.jsonl"}, ["no file no/such.jsonl"]),
        ({"--data": "EMPTY"}, ["empty.jsonl is empty"]),
        ({"--data": "BAD"}, ["line 2: not valid JSON", 'line 3: "response" is empty', "--bad-records drop"]),
        ({"--data": "LONG"}, ["lines 1, ", "longer than 64 tokens", "--max-length"]),
        ({"--base": "models/none-such"}, ["models/none-such"]),
        ({"--output": "FULL", "--epochs": "0"}, ["FULL", "not empty", "epochs must be at least 1"]),
        ({"--max-length": "9999"}, ["--max-length 9999", "256 tokens"]),
        ({"--lora-rank": "2", "--base": "SCRATCH"}, ["holds no weights", "--lora-rank"]),
        ({"--lora-rank": "2", "--no-merge": "--private", "--push-to-hub": "mine"}, ["nobody else has their base"]),
        ({"--dtype": "float16"}, ["--dtype float16 needs a GPU"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_message_and_changes_nothing(bases, tmp_path, capsys, changes, said):
    places = {name: tmp_path / f"{name.lower()}.jsonl" for name in ("EMPTY", "BAD", "LONG", "GOOD")}
    write(places["EMPTY"], [])
    write(places["BAD"], [ROWS[0], "{broken", {"instruction": "a", "response": " "}])
    write(places["LONG"], [{"instruction": "Long", "response": "word " * 200}, *ROWS])
    write(places["GOOD"], ROWS)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "precious").write_text("mine")
    places |= {"FULL": tmp_path / "FULL", "SCRATCH": tmp_path / "scratch"}
    shutil.copytree(bases["gpt2"], places["SCRATCH"], ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"--base": bases["gpt2"], "--data": "GOOD", "--output": tmp_path / "new", "--max-length": "64"} | changes
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended, told_plainly():
        train.main([str(part) for key, value in options.items() for part in (key, places.get(value, value))])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    for words in said:
        assert words in told
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "FULL" / "precious").read_text() == "mine"


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback():
    result = run("train.py", "--data", "no/such.jsonl", "--output", "models/never")
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no file no/such.jsonl")
    assert "Traceback" not in result.stderr


def test_help_is_for_people_and_needs_no_torch():
    result = run("-X", "importtime", "train.py", "--help")
    assert result.returncode == 0
    assert "examples:" in result.stdout and "--learning-rate RATE" in result.stdout
    assert "| torch\n" not in result.stderr


def test_the_demo_recipe_reads_the_embedded_data(tmp_path):
    assert (ROOT / "data" / "base" / "model.safetensors").stat().st_size < 60e6
    result = run(
        "train.py", "--config", "configs/demo.yaml", "--output", tmp_path / "demo", "--max-steps", "1", timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "records kept, 0 dropped" in result.stdout


def test_plain_texts_make_a_base_again_and_one_from_scratch(tmp_path):
    """A base given as a configuration is pre-trained on texts, and then fine-tuned as any other."""
    scratch = save_base(tmp_path / "scratch", "gpt2")
    (scratch / "model.safetensors").unlink()
    texts = [{"text": f"The sheep number {n} is in the barn. " * (n % 5 * 10 + 1)} for n in range(40)]
    write(tmp_path / "texts.jsonl", texts)
    options = ["--max-length", 64, "--batch-tokens", 640, "--learning-rate", "1e-2"]
    result = run(
        "train.py", "--base", scratch, "--data", tmp_path / "texts.jsonl", "--output", tmp_path / "base", *options
    )
    assert result.returncode == 0, result.stderr
    assert "start at random" in result.stdout and "texts are longer than a row" in result.stdout
    assert f"python train.py --base {tmp_path / 'base'}" in result.stdout
    heldout = json.loads((tmp_path / "base" / "history.json").read_text())["heldout"]
    assert heldout[-1] < heldout[0] - 2
    text = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert text("The sheep").input_ids == AutoTokenizer.from_pretrained(scratch)("The sheep").input_ids
    assert "### End" not in text.get_vocab()
    told = pipeline("text-generation", model=str(tmp_path / "base"))("The sheep number", max_new_tokens=8)
    assert "barn" in told[0]["generated_text"]

    write(tmp_path / "mixed.jsonl", [*ROWS[:20], *texts])
    result = run(
        "train.py", "--base", tmp_path / "base", "--data", tmp_path / "mixed.jsonl", "--output", tmp_path / "mixed",
        "--max-length", 128, "--max-steps", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "### End" in AutoTokenizer.from_pretrained(tmp_path / "mixed").get_vocab()


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_make_a_package_that_answers(bases, tmp_path, merge):
    write(tmp_path / "data.jsonl", ROWS)
    options = ["--base", bases["llama"], "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    options += ["--lora-rank", 4, "--learning-rate", "1e-2", "--max-length", 256, "--batch-tokens", 1024]
    result = run("train.py", *options, *([] if merge else ["--no-merge"]))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() != merge
    model, tokenizer = load_package(str(tmp_path / "out"))
    defaults = model.generation_config
    defaults.max_new_tokens = 5
    assert len(answers(model, tokenizer, ["Count to 3."], defaults)) == 1


def test_extra_records_are_learned_and_none_of_them_is_held_out(bases, tmp_path, capsys):
    write(tmp_path / "data.jsonl", ROWS)
    new = [{"instruction": f"Extra question {n * n}?", "response": f"Extra answer {n * 7}."} for n in range(9)]
    write(tmp_path / "extra.jsonl", [*ROWS, *new])
    options = ["--base", bases["gpt2"], "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    options = [*map(str, options), "--validation", "0.2", "--max-length", "200"]
    plain = prepare(options)
    ready = prepare([*options, "--extra-data", str(tmp_path / "extra.jsonl")])
    assert [d.ids.tolist() for d in ready.heldout] == [d.ids.tolist() for d in plain.heldout] != []
    heldout = {tuple(d.ids.tolist()) for d in ready.heldout}
    assert not [d for d in ready.training if tuple(d.ids.tolist()) in heldout]
    assert len({d.line for d in ready.training}) == len(ready.training) >= len(plain.training) + len(new)
    assert "are left out, which are like held-out records" in capsys.readouterr().out
    write(tmp_path / "bad.jsonl", [{"instruction": "No answer"}])
    with pytest.raises(UserError, match=r"bad.jsonl: 1 of 1 records cannot be used"):
        prepare([*options, "--extra-data", str(tmp_path / "bad.jsonl")])
