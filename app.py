"""The chat with a fine-tuned model: `python app.py --model models/mine`. On a Hugging Face Space this is the entry."""

import argparse
import os
from pathlib import Path

import yaml

from dolly.chat import LOOK, build
from dolly.engine import Engine
from dolly.errors import UserError, told_plainly
from dolly.model import load_package

DEMO = "models/demo"  # the folder that `make model` writes; never looked for on the Hub
EXAMPLES = Path(__file__).parent / "data/examples.yaml"


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
        return build(Engine(*load_package(model)), examples, judged=judged)
    except UserError as error:
        return build(None, examples, str(error))


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
    demo = chat(options.model, check_kept(options.feedback))

if __name__ == "__main__":
    with told_plainly():
        try:
            demo.launch(server_name=options.host, server_port=options.port, **LOOK)
        except OSError:
            taken = f"Port {options.port}" if options.port else "Every port from 7860 to 7959"
            raise UserError(f"{taken} cannot be had; choose another with --port (make: PORT=).") from None
