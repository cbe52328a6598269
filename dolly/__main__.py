"""`python -m dolly COMMAND`: what can be done with a model besides training it and chatting with it."""

import argparse
from pathlib import Path

from dolly.errors import UserError, told_plainly

DESCRIPTION = """\
Works on models that train.py wrote.
To fine-tune one: python train.py --help.  To chat with one: python app.py --help.
"""

EXAMPLES = """\
examples:
  python -m dolly push models/dolly dolly                  to your own account on the Hugging Face Hub
  python -m dolly push models/dolly acme/dolly --private   to an organisation, for its members only
"""

PUSH_EXAMPLES = f"""\
Needs a token that may write: hf auth login, or HF_TOKEN.
What has arrived is not sent again, so a push that broke off is finished by repeating it.

{EXAMPLES}
exit codes: 0 pushed;  2 nothing was sent, the message says what to mend;  3 broke off, repeat it later
"""


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    with told_plainly():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="python -m dolly", description=DESCRIPTION, epilog=EXAMPLES, **layout)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    about = "Uploads a model folder to the Hugging Face Hub."
    command = commands.add_parser("push", help=about, description=about, epilog=PUSH_EXAMPLES, **layout)
    command.add_argument("model", metavar="MODEL", type=Path, help="folder that train.py wrote")
    command.add_argument("name", metavar="NAME", help="NAME or OWNER/NAME on the Hub")
    command.add_argument(
        "--private", action="store_true", help="create the repository for yourself or your organisation only"
    )
    command.set_defaults(run=_push)
    return parser


# Each command imports what it needs itself: --help must not wait seconds for torch.


def _push(options: argparse.Namespace) -> None:
    from dolly.hub import check_write, push

    if not (options.model / "config.json").is_file():
        raise UserError(
            f"{options.model} is not a model folder: it has no config.json. Give the folder that train.py wrote."
        )
    repo_id = check_write(options.name, options.private)
    print(f"pushed to {push(options.model, repo_id, options.private)}")


if __name__ == "__main__":
    main()
