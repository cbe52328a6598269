"""The chat with a fine-tuned model: `python app.py --model models/mine`. On a Hugging Face Space this is the entry."""

import argparse
import os
from pathlib import Path

if ZERO_GPU := os.environ.get("SPACES_ZERO_GPU") == "true":  # a Space that borrows a GPU for each answer
    import spaces  # before torch, for whose CUDA it stands in

import yaml

from dolly.chat import LOOK, build
from dolly.engine import Engine, Sampling
from dolly.errors import UserError, told_plainly
from dolly.feedback import kept_on_hub
from dolly.model import load_package

DEMO = "models/demo"  # the folder that `make model` writes; never looked for on the Hub
EXAMPLES = Path(__file__).parent / "data/examples.yaml"
SLOWEST = 10  # tokens a second that a borrowed GPU writes at least


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=os.environ.get("DOLLY_MODEL", DEMO),
        help=f"a folder, or an id on the Hugging Face Hub (default: DOLLY_MODEL, else {DEMO})",
    )
    parser.add_argument(
        "--feedback",
        metavar="FILE",
        type=Path,
        help="visitors may rate and correct answers, which are added to FILE (for python -m dolly review)",
    )
    parser.add_argument("--host", help="default: 127.0.0.1, this machine alone; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    return parser.parse_args(given)


def chat(model: str, judged: Path | None = None):
    """The page that talks to `model`, or says why it cannot."""
    examples = yaml.safe_load(EXAMPLES.read_text(encoding="utf-8"))["categories"]
    try:
        if model == DEMO and not Path(DEMO).exists():
            raise UserError(f"The folder {DEMO} does not exist.")
        engine = Engine(*load_package(model))
        if ZERO_GPU:  # each answer is written in a process of its own, which ends with the answer or at Stop
            engine.stream = spaces.GPU(duration=gpu_seconds)(engine.stream)
        return build(engine, examples, judged=judged)
    except UserError as error:
        return build(None, examples, str(error))


def gpu_seconds(messages: list, sampling: Sampling) -> int:
    """For how long an answer asks for the GPU, which counts against the visitor's quota of the day."""
    return 10 + sampling.max_new_tokens // SLOWEST


def check_kept(judged: Path | None) -> Path | None:
    """Raises `UserError` when the file for feedback cannot be written, before a visitor finds out."""
    try:
        if judged:
            judged.open("a").close()
    except OSError as error:
        raise UserError(f"--feedback {judged} cannot be written ({error.strerror}).") from None
    return judged


options = arguments(None if __name__ == "__main__" else [])
with told_plainly():
    dataset = os.environ.get("DOLLY_FEEDBACK")
    judged = check_kept(kept_on_hub(dataset) if dataset and not options.feedback else options.feedback)
    demo = chat(options.model, judged)

if __name__ == "__main__":
    with told_plainly():
        try:
            demo.launch(server_name=options.host, server_port=options.port, **LOOK)
        except OSError:
            taken = f"Port {options.port}" if options.port else "Every port from 7860 to 7959"
            raise UserError(f"{taken} cannot be had; choose another with --port (make: PORT=).") from None
