"""Several processes before they know of each other: the first of a machine prepares, the others read what it made.

`torchrun` and `accelerate launch` name the processes in the environment. No process group is needed here, whose time
limits a long preparation would exceed.
"""

import hashlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

Prepared = TypeVar("Prepared")


def is_launched() -> bool:
    return "RANK" in os.environ


def asks_for_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed, with settings that the loop does not know."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether this process is the first of all, on whichever machine."""
    return int(os.environ.get("RANK", 0)) == 0


def leave() -> None:
    """Ends one of several processes at once: taking gloo's threads down aborts it now and then, or never ends."""
    if is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def once(prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` gives: called by the first process of each machine, read from a file by the others.

    When it raises, the others end with the exit code of the first, and leave the message to it.
    """
    rank, local = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = os.getppid()
    launch = (launcher, psutil.Process(launcher).create_time(), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    name = "dolly-" + hashlib.sha256(repr(launch).encode()).hexdigest()[:16]
    places = [Path(tempfile.gettempdir()) / f"{name}-{number}" for number in range(local)]
    if rank > 0:
        return _read(places[rank], launcher)
    outcome = (None, 1)
    try:
        outcome = (prepare(), None)
    except BaseException as error:
        outcome = (None, getattr(error, "exit_code", 1))
        raise
    finally:
        _hand_out(outcome, places[1:])
    return outcome[0]


def _hand_out(outcome: tuple, places: list[Path]) -> None:
    """One file under a name for each process, which removes its own: nobody has to know when all have read it."""
    if places:
        with tempfile.NamedTemporaryFile(dir=places[0].parent) as file:  # readable by this user alone
            pickle.dump(outcome, file, protocol=5)
            file.flush()
            for place in places:
                os.link(file.name, place)


def _read(place: Path, launcher: int):
    while not place.exists():
        if os.getppid() != launcher:
            raise SystemExit(1)  # and the first process is gone with it
        time.sleep(0.05)
    if place.stat().st_uid != os.getuid():
        raise SystemExit(f"{place} belongs to another user: it is not read.")
    with place.open("rb") as file:
        place.unlink()
        value, exit_code = pickle.load(file)
    if exit_code is not None:
        raise SystemExit(exit_code)
    return value
