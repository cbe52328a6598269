"""Checkpoints: killed for real at many moments, and resumed to the same bits; whole or not taken; of the same run."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run
from test_trainer import CONFIG, documents, model_of

from dolly import checkpoint, trainer
from dolly.errors import UserError

EVERY = replace(CONFIG, checkpoint_every=1, max_steps=4)


def outcomes(folder, kind: str, moments: list[int]) -> list[dict]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    result = run("tests/killed.py", folder, kind, json.dumps(moments), timeout=300, PYTHONPATH=paths)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("kind", ["training", "lora"])
def test_a_run_that_is_killed_at_any_of_ten_updates_and_resumed_ends_in_the_same_bits(tmp_path, kind):
    # Two micro-batches an update and two evaluations of one batch before the kills: after 0 to 9 whole updates, every
    # second time in the middle of an accumulation, in both epochs and at their edge.
    moments = [2 * update + 2 + update % 2 + (update > 5) for update in range(10)]
    made = outcomes(tmp_path, kind, moments)
    assert [outcome["from"] for outcome in made] == [None, *[f"step-{n:08d}" for n in range(1, 10)]]
    assert all(outcome["killed"] and outcome["equal"] for outcome in made), made


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    made = outcomes(tmp_path, "saving", list(range(1, 40, 3)))
    assert all(outcome["killed"] and outcome["equal"] for outcome in made), made
    steps = [outcome["from"] for outcome in made]
    assert steps[0] is None and len(set(steps)) > 2
    assert all(outcome["left"] == ["step-00000009"] for outcome in made)  # neither the old nor the half-written


def trained(place, config=EVERY, made=None):
    made = documents(30) if made is None else made
    return trainer.train(model_of("gpt2"), made, [], 32, 0, config, checkpoints=place)


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    trained(tmp_path)
    good = checkpoint.newest(tmp_path)
    assert good.name == "step-00000003"
    for name, spoil in {
        "step-00000010": lambda folder: (folder / "state.pt").write_bytes(b"short"),
        "step-00000011": lambda folder: (folder / "random-0.pt").unlink(),
        "step-00000012": lambda folder: (folder / "manifest.json").unlink(),
        "step-00000013": lambda folder: (folder / "manifest.json").write_text("{"),
        "step-best": lambda folder: None,
    }.items():
        folder = tmp_path / name
        os.system(f"cp -r {good} {folder}")
        spoil(folder)
    assert checkpoint.newest(tmp_path) == good
    (tmp_path / "step-00000013").rename(tmp_path / "old")
    good.rename(tmp_path / "step-00009999")
    (tmp_path / "step-00009999").rename(tmp_path / "step-10000")  # by number, not by name
    os.system(f"cp -r {tmp_path / 'step-10000'} {tmp_path / 'step-9900'}")
    assert checkpoint.newest(tmp_path).name == "step-10000"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.01 then, 0.5 now"),
        ({"max_steps": 9}, "updates: 4 then, 9 now"),
        ({"seed": 3}, "seed: 0 then, 3 now"),
        ({}, "records: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, changes, said):
    trained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="another run") as told:
        trained(tmp_path, replace(EVERY, resume=True, **changes), documents(30, seed=0 if changes else 1))
    assert said in str(told.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    trained(tmp_path)
    state = checkpoint.newest(tmp_path) / "state.pt"
    state.write_bytes(bytes(state.stat().st_size))
    with pytest.raises(UserError, match=r"step-00000003 cannot be read"):
        trained(tmp_path, replace(EVERY, resume=True))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """As on a full disk."""
    usual = torch.save

    def full(value, path):
        if "00000003" in str(path):
            raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")  # what torch.save raises there
        usual(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"step 3 cannot be written.*--resume"):
        trained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_frozen_weights_are_not_written():
    model = model_of("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_f" in name)
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), model=model)
    assert sorted(checkpoint.trained(run)) == ["transformer.ln_f.bias", "transformer.ln_f.weight"]
