"""Settings: the command line over the file over the defaults, every mistake told at once."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from dolly.config import TrainConfig, parse
from dolly.errors import UserError


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path, tmp_path):
    config = parse(["--config", str(path), "--output", str(tmp_path / "new")])
    assert config.epochs >= 1


def test_the_command_line_wins_over_the_file_over_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 7\nlearning_rate: 2e-4\nprivate: true\n")
    config = parse(["--config", str(tmp_path / "c.yaml"), "--epochs", "2", "--schedule", "linear"])
    assert (config.epochs, config.learning_rate, config.private, config.schedule) == (2, 2e-4, True, "linear")
    assert config.seed == TrainConfig.seed


def test_all_mistakes_are_told_together_with_their_places(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("epoch: 3\ntemperature: hot\n\nvalidation: 7\nprivate: 1\nepochs: 1.5\nbase: [a]\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    options = ["--config", str(path), "--seed", "x", "--schedule", "no", "--learning-rate", "nan"]
    with pytest.raises(UserError) as caught:
        parse([*options, "--output", str(tmp_path / "full")])
    lines = str(caught.value).splitlines()
    for place, what in [
        (f"{path}, line 1", "did you mean epochs?"),
        (f"{path}, line 2", "must be a number, not 'hot'"),
        (f"{path}, line 4", "between 0 and 0.5"),
        (f"{path}, line 5", "true or false"),
        (f"{path}, line 6", "whole number"),
        (f"{path}, line 7", "must be text"),
        ("--seed must", "whole number"),
        ("--schedule", "cosine or linear or constant"),
        ("--learning-rate", "between 0 and 1"),
        ("--output", "not empty"),
    ]:
        assert any(place in line and what in line for line in lines), (place, what, lines)


@pytest.mark.parametrize("text", ["epochs: [", "- a\n- b", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_a_missing_file_is_refused():
    with pytest.raises(UserError, match="cannot be read"):
        parse(["--config", "no/such.yaml"])


def test_the_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in shown
    assert Path("configs/demo.yaml").as_posix() in shown


def mistakes(*argv):
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "bad", "good"),
    [
        ("top-p", ["0", "0.001", "1.1"], ["0.01", "1"]),
        ("seed", ["-1", str(2**63)], [str(2**63 - 1)]),
        ("weight-decay", ["-0.1", "1.5", "inf"], ["0", "1"]),
        ("temperature", ["0.001", "-1", "6", "inf", "nan"], ["0", "0.01", "5"]),
        ("max-grad-norm", ["0", "-1", "inf"], ["0.1"]),
        ("epochs", ["inf", "0"], ["1"]),
    ],
)
def test_numbers_lie_in_their_ranges(option, bad, good, tmp_path):
    for value in good:
        parse([f"--{option}={value}", "--output", str(tmp_path / "new")])
    for value in bad:
        assert f"the settings have a mistake:\n  --{option} must " in mistakes(f"--{option}={value}"), value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("on: 1", "line 1: on is not a setting"),
        ("null: 1", "line 1: null is not a setting"),
        ("0x10: 1", "line 1: 0x10 is not a setting"),
        ("<<: {epochs: 2}", "line 1: << is not a setting"),
        ("? [a]\n: 1", "does not hold `setting: value` lines"),
        ("epochs: 2\nseed: 1\nepochs: 3", "line 3: epochs is given already in line 1"),
        ("epochs: null", "line 1: epochs must be a whole number"),
        ("seed: !!bool x", "is not valid YAML"),
        ("seed: !!timestamp x", "is not valid YAML"),
        ("seed: 2001-99-99", "is not valid YAML"),
    ],
)
def test_strange_keys_and_values_are_told_with_their_line(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert said in mistakes("--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "new"))


def test_the_settings_of_a_package_can_be_run_again(tmp_path):
    config = parse(["--output", str(tmp_path / "new")])
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(asdict(config)))
    assert parse(["--config", str(tmp_path / "train.yaml")]) == config


def test_an_empty_configuration_name_is_no_missing_option():
    assert "--config '' cannot be read" in mistakes("--config", "")


def test_the_default_data_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse([])
    assert (config.base, config.data) == (str(ROOT / "data/base"), str(ROOT / "data/instructions.jsonl"))
    Path("data/base").mkdir(parents=True)
    assert parse([]).base == "data/base"
    assert parse(["--data", "data/mine.jsonl"]).data == "data/mine.jsonl"


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    for output, said in [
        ("file", "file is a file"),
        ("file/x", "cannot be made"),
        ("/proc/x", "cannot be made"),
        ("x" * 300, "cannot be made"),
        ("link", "is a symbolic link"),
    ]:
        assert said in mistakes("--output", output), output
    assert parse(["--output", "empty"]).output == "empty"
    assert parse(["--output", "new/one"]).output == "new/one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]
    monkeypatch.chdir("empty")
    assert "is the current folder" in mistakes("--output", ".")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantize"], "--quantize is about adapters: give --lora-rank"),
        (["--no-merge", "--lora-alpha", "8"], "--lora-alpha is about adapters"),
        (["--lora-rank", "4", "--quantize", "--deepspeed", "zero3"], "zero2 instead"),
        (["--deepspeed", "zero9"], "must be zero1 or zero2 or zero3"),
    ],
)
def test_settings_that_do_not_go_together_are_told(options, said):
    with pytest.raises(UserError, match=said):
        parse(options)
    assert parse(["--lora-rank", "4", "--no-merge"]).merge is False
