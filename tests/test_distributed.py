"""The same `train.py` in two real processes: DDP and ZeRO learn what one process learns, and end and fail together."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, run
from transformers import AutoModelForCausalLM

from dolly import launch
from dolly.distributed import share

ROWS = [{"instruction": f"Count to {n}.", "response": "one two three " * (n % 7 + 1)} for n in range(1, 60)]
SETTINGS = ["--epochs", "2", "--batch-tokens", "640", "--micro-batch-tokens", "128", "--max-length", "128"]
SETTINGS += ["--learning-rate", "3e-3", "--dtype", "float32", "--evaluations", "2"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {"alone": [], "ddp": TWO, "zero2": TWO, "zero3": TWO}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def outputs(bases, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    for way, launcher in WAYS.items():
        sharing = ["--deepspeed", way] if way.startswith("zero") else []
        options = [*launcher, "train.py", "--base", bases["gpt_neox"], "--data", data, "--output", folder / way]
        result = run(*options, *SETTINGS, *sharing, timeout=240)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("is ready") == 1
    return folder


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_two_processes_learn_what_one_learns(outputs, way):
    alone, together = (json.loads((outputs / name / "history.json").read_text()) for name in ("alone", way))
    assert together["steps"] == alone["steps"] > 8
    assert together["tokens"] == alone["tokens"]
    assert together["heldout"] == pytest.approx(alone["heldout"], abs=1e-4)
    assert [row["loss"] for row in together["rows"]] == pytest.approx([row["loss"] for row in alone["rows"]], abs=1e-4)
    assert alone["heldout"][-1] < alone["heldout"][0] - 0.5


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_their_packages_hold_the_same_model(outputs, way):
    ids = torch.arange(10, 60)[None]
    alone, together = (AutoModelForCausalLM.from_pretrained(outputs / name).float() for name in ("alone", way))
    assert all(weight.numel() for weight in together.parameters())
    torch.testing.assert_close(together(ids).logits, alone(ids).logits, rtol=0.02, atol=0.02)  # bfloat16 on the disk
    assert not (outputs / f"{way}.checkpoints").exists()


def test_two_processes_that_are_killed_resume_to_the_same_bits(bases, data, outputs, tmp_path):
    output = tmp_path / "killed"
    options = [*TWO, "train.py", "--base", bases["gpt_neox"], "--data", data, "--output", output, *SETTINGS]
    options += ["--checkpoint-every", "1"]
    command = [sys.executable, *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as runs:
        places = tmp_path / "killed.checkpoints"
        until = time.monotonic() + 120
        while not list(places.glob("step-0000000[3-9]")):
            assert runs.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        for process in psutil.Process(runs.pid).children(recursive=True) + [runs]:
            process.send_signal(signal.SIGKILL)
    assert not output.exists() and places.exists()

    again = run(*options, timeout=120)
    assert again.stderr.count("error: A run that was to write") == 1 and "--resume" in again.stderr
    result = run(*options, "--resume", timeout=240)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stderr
    assert (output / "model.safetensors").read_bytes() == (outputs / "ddp" / "model.safetensors").read_bytes()


def test_a_mistake_is_told_once_and_ends_all_processes(bases, tmp_path):
    result = run(
        *TWO, "train.py", "--base", bases["gpt2"], "--data", tmp_path / "none.jsonl", "--output", tmp_path / "x"
    )
    assert result.returncode == 1  # torchrun's own
    assert result.stderr.count("error: There is no file") == 1
    assert "exitcode  : 2" in result.stderr


def test_sharing_among_processes_needs_some():
    result = run("train.py", "--deepspeed", "zero2", "--output", "models/never")
    assert result.returncode == 2 and "torchrun --nproc-per-node" in result.stderr


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_process_has_as_many_micro_batches_of_the_same_size(rows, processes):
    chosen = [[n] for n in range(rows)]
    shares = [share(chosen, processes, rank, 2) for rank in range(processes)]
    assert len({tuple(map(len, each)) for each in shares}) == 1
    dealt = [row for each in shares for micro in each for row in micro]
    assert sorted(row for row in dealt if row) == chosen
    assert len(dealt) - rows < processes


def test_what_is_prepared_once_is_the_same_for_one_process():
    made = []
    assert launch.once(lambda: made.append(1) or "ready") == "ready"
    assert made == [1]
