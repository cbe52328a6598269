"""Checkpoints that are whole or absent, and an exact resume from the newest.

A checkpoint is a folder `step-00000200`. Each process writes its part into a folder beside it; when every file is on
the disk, the first adds a manifest of their sizes and renames the folder. A kill at any moment leaves the one before.

    state.pt           weights that are trained, optimizer, gradient scaler (DeepSpeed: its own folder instead)
    history.json       the counters and the curve; the step is the place in the data and in the learning rate's schedule
    random-0.pt        the state of the random numbers of process 0, and so on
    manifest.json      the run that it belongs to, and the size of each file
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from dolly.errors import UserError

MANIFEST = "manifest.json"
# What torch, DeepSpeed and json raise for a file that cannot be written or read.
FILES = (OSError, RuntimeError, ValueError, KeyError)


def place_of(output: str | Path) -> Path:
    """Where the checkpoints of a run are kept that is to write `output`."""
    return Path(f"{Path(output).absolute()}.checkpoints")


def newest(place: Path) -> Path | None:
    """The checkpoint of the highest step that is whole."""
    found = [folder for folder in place.glob("step-*") if re.fullmatch(r"step-\d+", folder.name) and _whole(folder)]
    return max(found, key=lambda folder: int(folder.name[5:]), default=None)


def save(run, place: Path, belongs: dict) -> None:
    """Writes the state of `run` (`dolly.trainer.Run`) and removes the checkpoints before it. Called by every process.

    belongs: what a run that resumes from it has to share. Raises `UserError` when it cannot be written; the checkpoint
    before is then untouched.
    """
    accelerator: Accelerator = run.accelerator
    folder = place / f"step-{run.history.steps:08d}"
    beside = place / f".{folder.name}"
    first = accelerator.is_main_process
    try:
        if first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if run.sharded:
            run.model.save_checkpoint(beside, tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        elif first:
            torch.save({"weights": trained(run), "optimizer": run.optimizer.state_dict(), "scaler": _scaler(run)},
                       beside / "state.pt")  # fmt: skip
        torch.save(_random_state(accelerator), beside / f"random-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if first:
            _write(beside / "history.json", dataclasses.asdict(run.history))
            sizes = {str(file.relative_to(beside)): file.stat().st_size for file in _files(beside)}
            _write(beside / MANIFEST, {"belongs": belongs, "files": sizes})
            for path in [*_files(beside), *(p for p in beside.rglob("*") if p.is_dir()), beside]:
                _sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            _sync(place)
            for old in {*place.glob("step-*"), *place.glob(".step-*")} - {folder}:
                shutil.rmtree(old)
    except FILES as error:
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {run.history.steps} cannot be written to {place}: {error}. Make room there, and "
            "go on from the one before with --resume."
        ) from error
    accelerator.wait_for_everyone()


def load(run, folder: Path, belongs: dict) -> None:
    """Makes `run` what it was at the checkpoint in `folder`. Called by every process, before its first update.

    Raises `UserError` when the checkpoint is of another run or cannot be read.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    then, now = manifest["belongs"], json.loads(json.dumps(belongs))
    if changed := [key for key in now | then if then.get(key) != now.get(key)]:
        listed = "\n".join(f"  {key}: {then.get(key)} then, {now.get(key)} now" for key in changed)
        raise UserError(
            f"{folder} is a checkpoint of another run; these differ:\n{listed}\n"
            f"Start with the same, or delete {folder.parent} to begin anew."
        )
    try:
        if run.sharded:
            run.model.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        else:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            run.accelerator.unwrap_model(run.model).load_state_dict(state["weights"], strict=False)
            run.optimizer.load_state_dict(state["optimizer"])
            if run.accelerator.scaler is not None:
                run.accelerator.scaler.load_state_dict(state["scaler"])
        _set_random_state(torch.load(folder / f"random-{run.accelerator.process_index}.pt", weights_only=True))
        run.history.__dict__.update(json.loads((folder / "history.json").read_text(encoding="utf-8")))
    except FILES as error:
        raise UserError(f"The checkpoint {folder} cannot be read: {error}.") from error


def trained(run) -> dict[str, torch.Tensor]:
    """The weights that training changes: the others come from the base again."""
    model = run.accelerator.unwrap_model(run.model)
    changing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in changing}


def _scaler(run) -> dict | None:
    return None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()


def _random_state(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(accelerator.device)} if accelerator.device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _whole(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    """Has the system put a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
