"""`python -m dolly COMMAND`: what can be done with data and models besides training and chatting."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from dolly.errors import UserError, told_plainly

DATA = Path(__file__).parent.parent / "data"

DESCRIPTION = """\
Works on the records that train.py reads and on the models that it writes.
To fine-tune one: python train.py --help.  To chat with one: python app.py --help.
"""

EXAMPLES = """\
examples:
  python -m dolly check my.jsonl --html report.html        what is wrong with the records of a file
  python -m dolly evaluate models/dolly --base data/base   how good a model is, beside its base
  python -m dolly push models/dolly dolly                  to your own account on the Hugging Face Hub
  python -m dolly space dolly-chat --model you/dolly       a page on the Hub where everybody can chat with it
"""

EVALUATE_EXAMPLES = """\
examples:
  python -m dolly evaluate models/dolly --base data/base --report report.md
  python -m dolly evaluate models/mine --data test.jsonl --whole --per-record --json measures.json
  python -m dolly evaluate models/mine --base EleutherAI/pythia-410m --tasks hellaswag,arc_easy
  python -m dolly evaluate --learning-curve --config configs/demo.yaml --data my.jsonl

With --learning-curve there is no MODEL, and all settings of train.py are taken too.
"""

CHECK_EXAMPLES = """\
examples:
  python -m dolly check my.jsonl
  python -m dolly check my.csv --html report.html --json report.json
  python -m dolly check my.jsonl --against validation.jsonl --base EleutherAI/pythia-410m

exit codes: 0 no errors (there may be warnings);  1 errors;  2 the file cannot be read at all
"""

LLAMA_CPP_EXAMPLES = """\
examples:
  python -m dolly llama-cpp models/mine for-llama.cpp
  python llama.cpp/convert_hf_to_gguf.py for-llama.cpp --outfile dolly.gguf
  ollama create dolly -f Modelfile      # a Modelfile with the line: FROM ./dolly.gguf
"""

PUSH_EXAMPLES = """\
Needs a token that may write: hf auth login, or HF_TOKEN.
What has arrived is not sent again, so a push that broke off is finished by repeating it.

examples:
  python -m dolly push models/dolly dolly                  to your own account
  python -m dolly push models/dolly acme/dolly --private   to an organisation, for its members only

exit codes: 0 pushed;  2 nothing was sent, the message says what to mend;  3 broke off, repeat it later
"""

PUSH_DATA_EXAMPLES = """\
The file is uploaded as it is, with a card that counts what is in it. A README.md beside the file is taken as its card
if its front matter names the file.

examples:
  python -m dolly push-data my.jsonl my-records --license cc-by-4.0
  python -m dolly push-data my.jsonl acme/my-records --private

exit codes: 0 pushed;  2 nothing was sent, the message says what to mend;  3 broke off, repeat it later
"""

SPACE_EXAMPLES = """\
Creates the Space or brings it up to date, and waits until it runs.

examples:
  python -m dolly space dolly-chat --model you/dolly
  python -m dolly space dolly-chat --model you/dolly --hardware zero-a10g
  python -m dolly space dolly-chat --model acme/dolly --private --feedback acme/dolly-feedback

exit codes: 0 it runs;  2 refused, the message says what to mend;  3 the upload broke off, or the Space does not start
"""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal that has no letters beyond ASCII
    curve = "--learning-curve" in argv
    parser = _parser(curve)
    options, settings = parser.parse_known_args(argv)
    if settings and not curve:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    unfit = [name for name in ("tasks", "per_record", "whole", "prompts") if curve and getattr(options, name)]
    if unfit:
        parser.error(f"--learning-curve measures no --{unfit[0].replace('_', '-')}")
    options.settings = settings
    with told_plainly():
        options.run(options)


def _parser(curve: bool) -> argparse.ArgumentParser:
    """curve: `evaluate` takes no MODEL, and what it does not know are settings of train.py."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="python -m dolly", description=DESCRIPTION, epilog=EXAMPLES, **layout)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    about = "Tells what is wrong with a file of records, line by line, and what is in it."
    command = commands.add_parser("check", help=about, description=about, epilog=CHECK_EXAMPLES, **layout)
    command.add_argument("file", metavar="FILE", help="records: .jsonl, .json, .csv, .parquet, .txt or a Hub id")
    command.add_argument("--against", metavar="FILE", help="validation records, none of which may be in FILE")
    command.add_argument(
        "--base", default=str(DATA / "base"), help="whose tokens are counted (default: the embedded base)"
    )
    command.add_argument(
        "--max-length", type=_positive, help="tokens of a row (default: the base's limit, at most 1024)"
    )
    command.add_argument("--json", metavar="PATH", help="write all findings there; - prints nothing else")
    command.add_argument("--html", metavar="PATH", help="write a report with plots there")
    command.set_defaults(run=_check)

    about = "Measures a fine-tuned model beside its base, or tells whether more records would help."
    command = commands.add_parser("evaluate", help=about, description=about, epilog=EVALUATE_EXAMPLES, **layout)
    if not curve:
        command.add_argument("model", metavar="MODEL", help="folder that train.py wrote, or an id on the Hub")
    command.add_argument("--base", help="what it was made of: measured on the same, for comparison")
    command.add_argument("--data", help="records, of which the held-out part is measured (default: the model's own)")
    command.add_argument("--whole", action="store_true", help="measure on all records of --data")
    command.add_argument("--prompts", metavar="FILE", help="a prompt a line to answer (default: the chat's examples)")
    command.add_argument("--per-record", action="store_true", help="the loss of each record of the training part")
    command.add_argument("--tasks", help="of lm-evaluation-harness, with commas between (pip install lm_eval)")
    command.add_argument("--learning-curve", action="store_true", help="fine-tune on 10, 30 and 100 %% of the records")
    command.add_argument("--json", metavar="PATH", help="write the measures there")
    command.add_argument("--report", metavar="PATH", help="write the report there, in Markdown")
    command.set_defaults(run=_learning_curve if curve else _evaluate)

    about = "Shows what visitors of the chat judged, one by one, and adds what you accept to the records."
    command = commands.add_parser("review", help=about, description=about, **layout)
    command.add_argument("--feedback", type=Path, default=DATA / "feedback.jsonl", help="(default: %(default)s)")
    command.add_argument("--data", type=Path, default=DATA / "instructions.jsonl", help="(default: %(default)s)")
    command.set_defaults(run=_review)

    about = "Uploads a model folder to the Hugging Face Hub."
    command = commands.add_parser("push", help=about, description=about, epilog=PUSH_EXAMPLES, **layout)
    command.add_argument("model", metavar="MODEL", type=Path, help="folder that train.py wrote")
    command.add_argument("name", metavar="NAME", help="NAME or OWNER/NAME on the Hub")
    command.add_argument(
        "--private", action="store_true", help="create the repository for yourself or your organisation only"
    )
    command.set_defaults(run=_push)

    about = "Uploads a file of records to the Hugging Face Hub, as a data set with a card."
    command = commands.add_parser("push-data", help=about, description=about, epilog=PUSH_DATA_EXAMPLES, **layout)
    command.add_argument("file", metavar="FILE", type=Path, help="records: .jsonl, .json, .csv, .parquet or .txt")
    command.add_argument("name", metavar="NAME", help="NAME or OWNER/NAME on the Hub")
    command.add_argument("--private", action="store_true", help="for yourself or your organisation only")
    command.add_argument("--license", metavar="ID", help="as the Hub spells it, for the card: cc-by-4.0, for example")
    command.set_defaults(run=_push_data)

    about = "Copies a model in the form that llama.cpp converts to GGUF, for Ollama and others."
    command = commands.add_parser("llama-cpp", help=about, description=about, epilog=LLAMA_CPP_EXAMPLES, **layout)
    command.add_argument("model", metavar="MODEL", type=Path, help="folder that train.py wrote")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    command.set_defaults(run=_llama_cpp)

    about = "Opens a Space on the Hugging Face Hub: a page where everybody can chat with a model."
    command = commands.add_parser("space", help=about, description=about, epilog=SPACE_EXAMPLES, **layout)
    command.add_argument("name", metavar="NAME", help="NAME or OWNER/NAME of the Space")
    command.add_argument("--model", metavar="ID", required=True, help="of the model on the Hub")
    command.add_argument("--hardware", help="cpu-basic, zero-a10g, t4-small ... (default: what the Hub gives)")
    command.add_argument("--private", action="store_true", help="for yourself or your organisation only")
    command.add_argument("--feedback", metavar="NAME", help="private data set that keeps what visitors judge")
    command.set_defaults(run=_space)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


# Each command imports what it needs itself: --help must not wait seconds for torch.


def _check(options: argparse.Namespace) -> None:
    _check_writable(options.json, options.html, read=(options.file, options.against))
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from dolly import doctor, doctor_report
    from dolly.model import load_tokenizer, row_length
    from dolly.prompt import dolly_tokenizer, encode_all

    tokenizer = dolly_tokenizer(load_tokenizer(options.base))
    length = row_length(options.base, options.max_length)

    def tokens_of(records) -> list[int]:
        return [len(ids) for ids, _ in encode_all(tokenizer, [record.messages for record in records])]

    console = Console(stderr=options.json == "-", highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # of a file, or of a pipe, rich takes 80
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")
        found = doctor.examine(
            options.file,
            length,
            tokens_of,
            options.against,
            seen=lambda count: progress.update(task, description=f"{count:,} records read"),
        )
    doctor_report.print_report(found, console)
    _write(options.html, lambda: doctor_report.as_html(found))
    _write(options.json, lambda: json.dumps(doctor_report.as_json(found), indent=1) + "\n")
    if found.count("error"):
        raise SystemExit(1)


def _evaluate(options: argparse.Namespace) -> None:
    _check_writable(options.json, options.report, read=(options.data, options.prompts))
    from transformers.utils import logging

    from dolly import evaluate

    logging.disable_progress_bar()
    prompts = None
    if options.prompts:
        try:
            prompts = [line for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {options.prompts} cannot be read ({error}).") from None
    tasks = options.tasks.split(",") if options.tasks else None
    found = evaluate.evaluate(
        options.model, options.base, options.data, options.whole, prompts, options.per_record, tasks
    )
    text = evaluate.report(found)
    print(text, end="")
    _write(options.report, lambda: text)
    _write(options.json, lambda: json.dumps(found, indent=1) + "\n")


def _learning_curve(options: argparse.Namespace) -> None:
    _check_writable(options.json, options.report, read=(options.data,))
    import tempfile

    from dolly import curve
    from dolly.prepare import prepare, starting_model

    given = [*(["--base", options.base] if options.base else []), *(["--data", options.data] if options.data else [])]
    with tempfile.TemporaryDirectory() as folder:
        ready = prepare([*options.settings, *given, "--output", f"{folder}/none"], push=False)
    pad = ready.tokenizer.pad_token_id or 0
    if not ready.heldout:
        raise UserError(f"{ready.config.data} has too few records to hold some out.")
    verdicts = curve.learning_curve(
        ready.training, ready.heldout, ready.length, pad, ready.config, lambda: starting_model(ready)
    )
    text = curve.report(verdicts)
    print(text, end="")
    _write(options.report, lambda: text)
    _write(options.json, lambda: json.dumps(list(map(dataclasses.asdict, verdicts)), indent=1) + "\n")


def _review(options: argparse.Namespace) -> None:
    from dolly import feedback

    counts = feedback.review(options.feedback, options.data, input, print)
    print("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()))


def _check_writable(*paths: str | None, read: tuple[str | None, ...] = ()) -> None:
    """Raises `UserError` before hours are spent on what cannot be written, or would be written over what is read."""
    taken = {Path(path).resolve() for path in read if path}
    for path in paths:
        if not path or path == "-":
            continue
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder, or its folder does not exist.")
        if Path(path).resolve() in taken:
            raise UserError(f"{path} is given twice: a report would be written over another file.")
        taken.add(Path(path).resolve())


def _write(path: str | None, text: Callable[[], str]) -> None:
    if path == "-":
        sys.stdout.write(text())
    elif path:
        try:
            Path(path).write_text(text(), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}).") from None


def _push(options: argparse.Namespace) -> None:
    from dolly.hub import check_write, push

    if not (options.model / "config.json").is_file():
        raise UserError(
            f"{options.model} is not a model folder: it has no config.json. Give the folder that train.py wrote."
        )
    repo_id = check_write(options.name, options.private)
    print(f"pushed to {push(options.model, repo_id, options.private)}")


def _llama_cpp(options: argparse.Namespace) -> None:
    from dolly.llama_cpp import prepare

    prepare(options.model, options.folder)
    print(f"{options.folder} is ready: python llama.cpp/convert_hf_to_gguf.py {options.folder} --outfile dolly.gguf")


def _push_data(options: argparse.Namespace) -> None:
    from dolly.dataset import push_data

    print(f"pushed to {push_data(options.file, options.name, options.private, options.license)}")


def _space(options: argparse.Namespace) -> None:
    from dolly.space import deploy

    url = deploy(options.name, options.model, options.hardware, options.private, options.feedback)
    print(f"{url} runs")


if __name__ == "__main__":
    main()
