"""A Space with the chat of a model: the files it needs, its settings, and the wait until it runs."""

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from dolly.errors import UserError
from dolly.hub import FAILURES, PushError, check_write, patiently, reason, refusal_as, upload

ROOT = Path(__file__).parent.parent
FILES = ("app.py", "LICENSE", "data/examples.yaml", "dolly/*.py")  # beside README.md and requirements.txt
TRAINING_ONLY = "# training only"  # marks what a Space leaves out of requirements.txt
NOTICED = 5  # seconds until the Hub has noticed a commit: the Space that ran before is not taken for the new one
LAST = 20  # lines of the logs that are shown
PATIENCE = 3600  # seconds, as the front matter gives the Space to start

PAYMENT = """\
The Hub asks for a subscription (402). A Space that runs on its own hardware needs PRO, for an organisation a Team plan;
a free account may have Spaces on ZeroGPU, which lend a GPU for each answer: --hardware zero-a10g"""
README = """\
---
{front}---

# {title}

A chat with [{model}](https://huggingface.co/{model}), made with Dolly.
"""


def deploy(name: str, model: str, hardware: str | None, private: bool, feedback: str | None) -> str:
    """Creates or updates a Space that talks to `model`, an id on the Hub, and waits until it runs. Returns its URL.

    feedback: NAME or OWNER/NAME of a data set in which the Space keeps what visitors judge. Raises `UserError` for a
    model that is not there, a refusal, and for a Space that does not start; `PushError` for an upload that broke off.
    """
    api = HfApi()
    with refusal_as(f"{model} is not a model on the Hub that you may read. Push it first: python -m dolly push"):
        hidden = patiently(lambda: api.model_info(model)).private
    variables = {"DOLLY_MODEL": model}
    if feedback:
        variables["DOLLY_FEEDBACK"] = check_write(feedback, private=True, kind="dataset")
    try:
        given = [{"key": key, "value": value} for key, value in variables.items()]
        repo_id = check_write(
            name, private, "space", space_sdk="gradio", space_hardware=hardware, space_variables=given
        )
        _set(api, repo_id, variables, hardware)
    except UserError as error:
        if _status(error.__cause__) == 402:
            raise UserError(PAYMENT) from None
        raise
    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder), model)
        again = "Nothing else is needed: the same command goes on where this one stopped."
        url = upload(Path(folder), repo_id, "space", private, again, delete_patterns="*")
    if hidden or feedback:
        print(f"The Space needs a token of yours that may {'write' if feedback else 'read'}: add it as HF_TOKEN under")
        print(f"{url}/settings, Variables and secrets.")
    print(f"{url} is being built ...", flush=True)
    time.sleep(NOTICED)
    _wait(api, repo_id, url)
    return url


def gather(folder: Path, model: str) -> None:
    """Copies what a Space needs, and nothing else, from this repository into an empty folder."""
    for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(ROOT))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if TRAINING_ONLY not in line]
    (folder / "requirements.txt").write_text("".join(kept), encoding="utf-8")
    front = yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    title = model.split("/")[-1]
    front |= {"title": title, "models": [model], "short_description": "Chat with a model fine-tuned with Dolly"}
    front = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(README.format(front=front, title=title, model=model), encoding="utf-8")


def _set(api: HfApi, repo_id: str, variables: dict[str, str], hardware: str | None) -> None:
    """What `create_repo` sets for a new Space only."""
    with refusal_as(f"The Hub does not let you change {repo_id}."):
        known = patiently(lambda: api.get_space_variables(repo_id))
        for key, value in variables.items():
            if key not in known or known[key].value != value:
                patiently(partial(api.add_space_variable, repo_id, key, value))
    with refusal_as(f"The Hub does not give {repo_id} the hardware {hardware}: see https://huggingface.co/pricing."):
        if hardware and hardware not in (patiently(lambda: api.get_space_runtime(repo_id)).requested_hardware or ""):
            patiently(lambda: api.request_space_hardware(repo_id, hardware))


def _wait(api: HfApi, repo_id: str, url: str) -> None:
    try:
        runtime = api.wait_for_space(repo_id, timeout=PATIENCE, poll_interval=NOTICED)
        if runtime.stage == "RUNNING":
            return
        logs = api.fetch_space_logs(repo_id, build=runtime.stage == "BUILD_ERROR")
        said = runtime.raw.get("errorMessage") or "".join(list(logs)[-LAST:])
        told = f"The Space did not start: {runtime.stage}. {said}".strip()
    except TimeoutError:
        told = f"The Space has not started within {PATIENCE // 60} minutes."
    except FAILURES as error:
        told = f"Whether the Space runs is not known: {reason(error)}."
    raise PushError(f"{told}\nThe page of its logs: {url}?logs=container")


def _status(error: BaseException | None) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
