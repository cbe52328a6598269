"""Settings: the command line over the file over the defaults, every mistake told at once."""

from dataclasses import fields
from pathlib import Path

import pytest
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
        ("--seed", "whole number"),
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
