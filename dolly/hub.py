"""Pushing to the Hugging Face Hub: the check beforehand that it will be possible, and the push itself.

A push never costs a run: what fails ends in `PushError`, whose message holds the command that finishes it.
"""

import contextlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from dolly.errors import UserError

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token from https://huggingface.co/settings/tokens"

# Seconds between attempts. huggingface_hub repeats some requests itself (five times over 23 s; Xet for 120 s and more),
# but neither the account's nor the repository's, nor validating the card, nor, without Xet, the commit.
WAITS = (1, 5, 20)
LONGEST_WAIT = 600  # seconds; a Hub that asks for more (Retry-After) is told of instead
Result = TypeVar("Result")

# What huggingface_hub raises while it uploads: its HTTP client's errors, OSError for files and from Xet, RuntimeError
# around a failed LFS transfer, ValueError for a card that the Hub refuses and for an answer that it cannot read.
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)


class PushError(UserError):
    """A push that did not finish. What was to be pushed is whole, and the message says how to go on."""

    exit_code = 3


def check_write(name: str, private: bool, kind: str = "model", **creation) -> str:
    """Makes sure that a later push can succeed: the token may write, and the repository exists or has been created.

    `name` is NAME, which gets the user's namespace, or OWNER/NAME; kind: model, dataset or space; creation: more for
    `HfApi.create_repo`. Returns OWNER/NAME. Raises `UserError` for a malformed name, no token or one that may not write
    there, no network, and for a repository that is public although `private` was asked for.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{name!r} is not a name for a {kind} on the Hub. Use NAME or OWNER/NAME, with letters, digits, "
            "'-', '_' and '.' only, such as dolly or acme/dolly."
        ) from None
    token = get_token()
    if token is None:
        raise UserError(f"Pushing to the Hub needs a token, and there is none on this machine. {LOG_IN}.")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # it would fail inside the HTTP client, which prints it
        raise UserError(f"The Hub token has characters that no token has. {LOG_IN}.")

    api = HfApi(token=token)
    with refusal_as(f"The Hub at {ENDPOINT} does not know this token. {LOG_IN}."):
        user = patiently(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"The Hub token of {user['name']} may only read. {LOG_IN} that has the role `write`.")
    repo_id = name if "/" in name else f"{user['name']}/{name}"
    owners = " or ".join([user["name"], *(organisation["name"] for organisation in user.get("orgs", []))])
    with refusal_as(
        f"The Hub token of {user['name']} may not write to {repo_id}. Push as {owners}, or take another token."
    ):
        # private None: as the organisation prefers
        new = {"private": private or None, "exist_ok": True, "repo_type": kind} | creation
        url = patiently(lambda: api.create_repo(repo_id, **new))
        # create_repo is content with one that is not ours
        patiently(lambda: api.auth_check(repo_id, repo_type=kind, write=True))
        if private and not patiently(lambda: api.repo_info(repo_id, repo_type=kind)).private:
            raise UserError(f"{url} exists and is public. Make it private in its settings, or take another name.")
    return repo_id


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a package and returns its URL. What arrived in an earlier attempt is not sent again.

    Weights of an earlier package that this one does not have are deleted. Raises `PushError`, and `UserError` for
    adapters whose base is a folder, where nobody else has it.
    """
    named = folder / "adapter_config.json"
    if named.exists() and Path(base := json.loads(named.read_text())["base_model_name_or_path"]).is_dir():
        raise UserError(
            f"{folder} holds adapters alone, and their base is the folder {base}. Push that as a model of its own and "
            "train from its id, or train without --no-merge."
        )
    command = ["python", "-m", "dolly", "push", str(folder), repo_id] + ["--private"] * private
    return upload(
        folder,
        repo_id,
        "model",
        private,
        f"The model is safe in {folder}. This sends what has not arrived yet:\n  {shlex.join(command)}",
        ignore_patterns="train.yaml",  # it names folders of this machine
        delete_patterns="*.safetensors*",  # transformers takes an old single file before new shards
    )


def upload(folder: Path, repo_id: str, kind: str, private: bool, remedy: str, **options) -> str:
    """Uploads the files of a folder as one commit, tried again where that may help. Returns the repository's URL.

    remedy: how to go on, for the message of `PushError`; options: more for `HfApi.upload_folder`.
    """
    api, space = HfApi(), {"space_sdk": "gradio"} if kind == "space" else {}

    def attempt() -> str:
        url = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True, **space)
        message = f"Upload the {kind}"
        api.upload_folder(repo_id=repo_id, repo_type=kind, folder_path=folder, commit_message=message, **options)
        return str(url)

    try:
        return patiently(attempt)
    except FAILURES as error:
        raise PushError(f"The push did not finish: {reason(error)}.\n{remedy}") from error


def patiently(attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, tried again after `WAITS`, or what the Hub asks for, while its failures may pass."""
    for pause in WAITS:
        try:
            return attempt()
        except FAILURES as error:
            wait = max(pause, _asked_wait(error))
            if not _may_pass(error) or wait > LONGEST_WAIT:
                raise
            print(f"{reason(error)}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    return attempt()


@contextlib.contextmanager
def refusal_as(message: str):
    """Raises `UserError`: `message` where the Hub answers that one may not, the reason where something else fails."""
    try:
        yield
    except FAILURES as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)
        raise UserError(message if refused else f"{reason(error)}.") from error


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later; 409 and 412: another commit came in between."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 409, 412, 429) or cause.response.status_code >= 500
    return isinstance(cause, (HTTPError, json.JSONDecodeError))


def _asked_wait(error: Exception) -> int:
    """Seconds that the Hub asks to wait (Retry-After, as it sends it); 0 where it says nothing."""
    cause = _cause(error)
    asked = cause.response.headers.get("Retry-After", "") if isinstance(cause, HfHubHTTPError) else ""
    return int(asked) if asked.isdigit() else 0


def reason(error: Exception) -> str:
    """What failed, for a person."""
    cause = _cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the Hub is not asked; unset it to push"
    if isinstance(cause, HfHubHTTPError):
        said = cause.server_message or cause.response.reason_phrase
        later = f" (and to wait {wait} s)" if (wait := _asked_wait(error)) > LONGEST_WAIT else ""
        return f"The Hub at {ENDPOINT} answered {cause.response.status_code}: {said}{later}"
    if isinstance(cause, HTTPError):
        return f"The Hub at {ENDPOINT} cannot be reached ({cause or type(cause).__name__})"
    if isinstance(cause, json.JSONDecodeError):
        return f"The Hub at {ENDPOINT} answered with a page instead of data, as in an outage or behind a proxy"
    return f"{type(cause).__name__}: {cause}"


def _cause(error: Exception) -> BaseException:
    """The error itself, or what huggingface_hub wrapped in a `RuntimeError` "while uploading FILE"."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
