"""Spaces and data sets on a hub on this machine: what is uploaded, and that the upload alone runs."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import yaml
from browser import app
from conftest import ROOT, save_base
from fakehub import TOKEN, Fault, Hub
from gradio_client import Client

from dolly.model import add_control_tokens, generation_defaults, load_base, load_tokenizer, save_package
from dolly.prompt import dolly_tokenizer
from dolly.records import read_records

AT_ONCE = "import dolly.space as s, dolly.hub as h; s.NOTICED = 0.01; h.WAITS = (0,); "
UPLOADED = {"app.py", "LICENSE", "README.md", "requirements.txt", "data/examples.yaml", ".gitattributes"}


def dolly(hub: Hub, home, *words, **variables) -> subprocess.CompletedProcess:
    """`python -m dolly` without the waits, with its own Hugging Face home. Whatever happens, no token is printed."""
    code = AT_ONCE + "from dolly.__main__ import main; main()"
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, env=os.environ | env | variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    base = str(save_base(folder / "base", "gpt_neox", max_position_embeddings=512))
    known, model = load_tokenizer(base), load_base(base)
    add_control_tokens(model, known, tokenizer := dolly_tokenizer(known))
    defaults = generation_defaults(tokenizer, model, max_new_tokens=8, do_sample=True)
    save_package(model, tokenizer, folder / "dolly", defaults, {})
    return folder / "dolly"


@contextmanager
def hub_with(package, private: bool = False):
    with Hub() as hub:
        repo = hub.create("model", "alice/dolly", private)
        repo.commit({path.name: path.read_bytes() for path in package.iterdir()})
        yield hub


def test_a_space_gets_what_it_needs_and_waits_until_it_runs(package, tmp_path):
    with hub_with(package) as hub:
        hub.stages = ["BUILDING", "BUILDING", "APP_STARTING"]
        done = dolly(hub, tmp_path, "space", "chat", "--model", "alice/dolly", "--hardware", "zero-a10g")
        assert done.returncode == 0 and done.stdout.endswith(f"{hub.url}/spaces/alice/chat runs\n"), done.stderr
        space = hub.repos["space", "alice/chat"]
        sha, files = space.at()
        assert set(files) == UPLOADED | {f"dolly/{path.name}" for path in (ROOT / "dolly").glob("*.py")}
        assert space.space["variables"]["DOLLY_MODEL"]["value"] == "alice/dolly"
        assert space.space["hardware"] == "zero-a10g" and len(hub.asked("GET .*/runtime")) >= 4
        front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert front["models"] == ["alice/dolly"] and front["sdk"] == "gradio" and front["app_file"] == "app.py"
        assert "python_version" in front and len(front["short_description"]) <= 60
        assert b"deepspeed" not in files["requirements.txt"] and b"gradio" in files["requirements.txt"]

        again = dolly(hub, tmp_path, "space", "chat", "--model", "alice/dolly", "--hardware", "zero-a10g")
        assert again.returncode == 0 and space.at()[0] == sha and len(hub.asked("POST .*/hardware")) == 0

        space.commit(files | {"old.py": b"left over"})
        hub.create("model", "acme/other")
        other = dolly(hub, tmp_path, "space", "chat", "--model", "acme/other", "--hardware", "t4-small")
        assert other.returncode == 0, other.stderr
        assert "old.py" not in space.at()[1] and space.space["hardware"] == "t4-small"
        assert space.space["variables"]["DOLLY_MODEL"]["value"] == "acme/other"


@pytest.mark.parametrize(
    ("words", "fault", "code", "told"),
    [
        (["--model", "alice/none"], None, 2, "alice/none is not a model on the Hub"),
        (["--model", "models/demo"], None, 2, "models/demo is not a model on the Hub"),
        ([], Fault("repos/create", 402, b'{"error": "PRO needed"}', 9), 2, "needs PRO"),
        ([], Fault("/commit/", 503, times=9), 3, "the same command goes on"),
        (["--hardware", "h200"], Fault("/hardware", 403), 2, "does not give alice/chat the hardware h200"),
        ([], Fault("/variables", 400, times=9), 2, "answered 400"),
    ],
)
def test_refusals_are_told(package, tmp_path, words, fault, code, told):
    with hub_with(package) as hub:
        if "--hardware" in words:
            hub.create("space", "alice/chat")
        hub.fail += [fault] if fault else []
        given = [] if "--model" in words else ["--model", "alice/dolly"]
        done = dolly(hub, tmp_path, "space", "chat", *given, *words)
        assert done.returncode == code and told in done.stderr, done.stderr


def test_a_space_that_does_not_start_shows_its_logs(package, tmp_path):
    with hub_with(package, private=True) as hub:
        space = hub.create("space", "alice/chat")
        space.stages, space.logs = ["BUILDING", "BUILD_ERROR"], ["no such package\n"]
        done = dolly(hub, tmp_path, "space", "chat", "--model", "alice/dolly", "--private")
        assert done.returncode == 2 and "exists and is public" in done.stderr
        space.private = True
        done = dolly(hub, tmp_path, "space", "chat", "--model", "alice/dolly", "--private")
        assert done.returncode == 3 and "BUILD_ERROR" in done.stderr and "no such package" in done.stderr
        assert "needs a token of yours that may read" in done.stdout  # the model is private


def test_the_upload_alone_answers(package, tmp_path):
    """In an empty folder, without what only training needs, as on ZeroGPU: a stand-in for `spaces` lends the GPU."""
    folder, blocked = tmp_path / "space", tmp_path / "blocked"
    blocked.mkdir()
    for name in ("datasets", "deepspeed"):
        (blocked / f"{name}.py").write_text("raise ImportError('not on a Space')")
    (blocked / "spaces.py").write_text(
        "import sys\nassert 'torch' not in sys.modules\n"
        "def GPU(duration):\n"
        "    def lent(function):\n"
        "        def run(*given):\n"
        "            print('lent for', duration(*given), flush=True)\n"
        "            yield from function(*given)\n"
        "        return run\n"
        "    return lent\n"
    )
    with hub_with(package) as hub:
        assert dolly(hub, tmp_path / "a", "space", "chat", "--model", "alice/dolly").returncode == 0
        for name, data in hub.repos["space", "alice/chat"].at()[1].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "b"), "DOLLY_MODEL": "alice/dolly"}
        env |= {"PYTHONPATH": str(blocked), "HF_HUB_OFFLINE": "0", "SPACES_ZERO_GPU": "true"}
        with app(folder=folder, said=tmp_path / "log", **env) as address:
            said = Client(address, verbose=False).predict("Name a fruit.", api_name="/chat")
    assert said.strip()
    assert "lent for 10" in (tmp_path / "log").read_text()


def test_feedback_of_a_space_is_kept_in_a_private_data_set(package, tmp_path):
    code = (
        "from dolly.feedback import *; path = kept_on_hub('alice/judged'); "
        "turns = [{'role': 'user', 'content': 'A fruit?'}, {'role': 'assistant', 'content': 'Pear.'}]; "
        "add(path, Feedback(turns, rating='good'))"
    )
    with Hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        env |= {"HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repos["dataset", "alice/judged"]
        (line,) = [data for name, data in repo.at()[1].items() if name.endswith(".jsonl")]
        assert repo.private and json.loads(line)["messages"][1]["content"] == "Pear."
        env["HF_TOKEN"] = ""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True
        )
        assert "needs a token that may write" in done.stderr


def test_a_data_set_is_pushed_with_a_card(tmp_path):
    rows = [{"instruction": f"Say {n}.", "response": f"{n}", "category": "ab"[n % 2]} for n in range(4)]
    file = tmp_path / "my records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Hub() as hub:
        done = dolly(hub, tmp_path, "push-data", file, "records", "--license", "cc-by-4.0", "--private")
        assert done.returncode == 0 and done.stdout == f"pushed to {hub.url}/datasets/alice/records\n", done.stderr
        repo = hub.repos["dataset", "alice/records"]
        card, front = repo.at()[1]["README.md"].decode(), None
        front = yaml.safe_load(card.split("---\n")[1])
        assert repo.private and repo.at()[1][file.name] == file.read_bytes()
        assert front["license"] == "cc-by-4.0" and front["configs"][0]["data_files"] == file.name
        assert "| a | 2 |" in card and "4 records" in card

        own = dolly(hub, tmp_path, "push-data", ROOT / "data" / "instructions.jsonl", "acme/instructions")
        assert own.returncode == 0, own.stderr
        card = hub.repos["dataset", "acme/instructions"].at()[1]["README.md"].decode()
        assert card == (ROOT / "data" / "README.md").read_text()

        code = "from dolly.records import read_records; print(len(read_records('alice/records')[0]))"
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "b"), "HF_HUB_DISABLE_XET": "1"}
        read = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
        )
        assert read.stdout.strip() == "4", read.stderr

        file.write_text('{"instruction": ""}\n')
        broken = dolly(hub, tmp_path, "push-data", file, "records")
        assert broken.returncode == 2 and "line 1" in broken.stderr
    assert read_records(str(ROOT / "data" / "instructions.jsonl"))[1] == []
