"""Runs that are killed at chosen moments and resumed, each in a process of its own. Used by test_checkpoint.py.

Prints a line of JSON for each: {"moment", "killed", "resumed_from", "equal"}. One process imports and forks all others.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from test_trainer import CONFIG, documents, model_of

from dolly import adapters, checkpoint, trainer
from dolly.prompt import CONTROL_TOKENS

# Two epochs of five updates, each of them two micro-batches; dropout is on (GPT-2's own 0.1).
SETTINGS = replace(CONFIG, epochs=2, batch_tokens=128, micro_batch_tokens=64, checkpoint_every=1, evaluations=2)
MADE = documents(56)


def train(place: Path, lora: bool, resume: bool = False) -> dict:
    model = model_of("gpt2")
    if lora:
        tokenizer = SimpleNamespace(get_vocab=lambda: dict(zip(CONTROL_TOKENS, (97, 98, 99), strict=True)))
        model = adapters.add_adapters(model, tokenizer, [98, 99], rank=2)
    config = replace(SETTINGS, resume=resume)
    history, model = trainer.train(model, MADE[:52], MADE[52:], 32, 0, config, checkpoints=place)
    history.seconds = 0.0
    return {"weights": model.state_dict(), "history": vars(history)}


def die_at(calls: int, *functions: tuple[object, str]) -> None:
    """Kills this process at the given call, counted over all of the functions, before it does anything."""
    count = [0]
    for owner, name in functions:
        usual = getattr(owner, name)

        def counted(*args, usual=usual, **kwargs):
            count[0] += 1
            if count[0] == calls:
                if usual is torch.save:  # half a file
                    Path(args[1]).write_bytes(b"PK" * 1000)
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(*args, **kwargs)

        setattr(owner, name, counted)


def in_a_process(work) -> bool:
    """Whether `work` came to its end, and was not killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:  # the children of this process must not go on as it would
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def main(folder: Path, kind: str, moments: list[int]) -> None:
    place, lora = folder / "run.checkpoints", kind == "lora"
    straight = train(folder / "straight", lora)  # in this process, so that the others have all that it imports
    assert len(straight["history"]["rows"]) == 10
    for moment in moments:
        shutil.rmtree(place, ignore_errors=True)

        def dies(moment=moment):
            if kind == "saving":
                writes = [(checkpoint, "_sync"), (checkpoint, "_write"), (torch, "save"), (Path, "rename")]
                die_at(moment, *writes, (shutil, "rmtree"))
            else:
                die_at(moment, (trainer, "collate"))
            train(place, lora)

        killed = not in_a_process(dies)
        newest = checkpoint.newest(place)
        in_a_process(lambda: torch.save(train(place, lora, resume=True), folder / "resumed.pt"))
        resumed = torch.load(folder / "resumed.pt")
        same = all(torch.equal(resumed["weights"][name], straight["weights"][name]) for name in straight["weights"])
        equal = same and resumed["history"] == straight["history"]
        left = sorted(path.name for path in place.iterdir())
        (folder / "resumed.pt").unlink()
        outcome = {"moment": moment, "killed": killed, "from": newest and newest.name, "equal": equal, "left": left}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
