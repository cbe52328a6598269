"""Pushes of a real package to a hub on this machine, each in a process of its own as a user starts it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakehub import CUT_OFF, READ_TOKEN, TOKEN, Fault, Hub
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from dolly.errors import UserError
from dolly.faults import SECRET
from dolly.hub import push
from dolly.model import generation_defaults, load_tokenizer, save_package
from dolly.prompt import dolly_tokenizer
from dolly.report import CardFacts, model_card

ROOT = Path(__file__).parent.parent
MODULE = ["-m", "dolly"]
AT_ONCE = ["-c", "import dolly.hub as h; h.WAITS = (0, 0, 0); from dolly.__main__ import main; main()"]  # no waiting
OLD_SHARDS = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = dolly_tokenizer(load_tokenizer(str(ROOT / "data/base")))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    card = model_card(
        CardFacts(
            name="alice/dolly",
            base="EleutherAI/pythia-70m",
            license="apache-2.0",
            data="instructions.jsonl",
            train_records=9,
            validation_records=1,
            settings={},
            steps=1,
            tokens=100,
            seconds=1.0,
            hardware="CPU",
            dtype="float32",
        )
    )
    defaults = generation_defaults(tokenizer, model, do_sample=False, max_new_tokens=8)
    folder = tmp_path_factory.mktemp("models") / "my dolly"  # the space must survive in the command that is printed
    save_package(model, tokenizer, folder, defaults, {"README.md": card})
    return folder


def python(arguments, home: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with its own Hugging Face home. Whatever happens, no token is printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | variables
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    for secret in (TOKEN, READ_TOKEN, variables.get("HF_TOKEN") or TOKEN):
        assert secret not in run.stdout + run.stderr
    return run


def code_of(readme: Path) -> str:
    return re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1]


def test_the_code_in_the_card_gets_answers_from_the_pushed_model(package, tmp_path):
    with Hub() as hub:
        pushed = python([*MODULE, "push", package, "dolly"], tmp_path / "a", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert (pushed.returncode, pushed.stdout) == (0, f"pushed to {hub.url}/alice/dolly\n"), pushed.stderr

        script = f"import json; said = []; exec({code_of(package / 'README.md')!r}, {{'print': said.append}}); "
        visitor = python(["-c", script + "print(json.dumps(said))"], tmp_path / "b", HF_ENDPOINT=hub.url)
        assert visitor.returncode == 0, visitor.stderr
        of_text, of_messages = json.loads(visitor.stdout)
        assert of_text == of_messages != ""


@pytest.mark.parametrize("xet", [False, True])
def test_a_push_replaces_the_weights_and_a_second_one_sends_nothing(package, tmp_path, xet):
    with Hub(lfs=not xet) as hub:
        repo = hub.create("model", "alice/dolly")
        repo.commit(repo.at()[1] | OLD_SHARDS)
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": str(int(not xet))}
        first = python([*MODULE, "push", package, "alice/dolly"], tmp_path, **variables)
        assert first.returncode == 0, first.stderr
        sha, files = repo.at()
        assert files == {path.name: path.read_bytes() for path in package.iterdir()} | {
            ".gitattributes": files[".gitattributes"]
        }

        sent = len(hub.asked("PUT |/commit/"))
        second = python([*MODULE, "push", package, "alice/dolly"], tmp_path, **variables)
        assert second.returncode == 0, second.stderr
        assert (repo.at()[0], len(hub.asked("PUT |/commit/"))) == (sha, sent)


def test_passing_faults_are_waited_for(package, tmp_path):
    with Hub() as hub:
        hub.fail = [
            Fault("validate-yaml", 503, b"<html>down</html>"),
            Fault("/_lfs/", CUT_OFF),
            Fault("/commit/", 503),
        ]
        run = python([*AT_ONCE, "push", package, "dolly"], tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert run.returncode == 0, run.stderr
        assert not hub.fail
        assert "answered with a page instead of data" in run.stderr
        assert "answered 503" in run.stderr
        assert "config.json" in hub.repos["model", "alice/dolly"].at()[1]


def test_a_push_that_broke_off_is_finished_by_the_command_it_prints(package, tmp_path):
    with Hub() as hub:
        hub.fail = [Fault("/commit/", 503, times=4)]
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        broken = python([*AT_ONCE, "push", package, "acme/dolly", "--private"], tmp_path, **variables)
        assert broken.returncode == 3
        assert "Traceback" not in broken.stderr
        assert f"The model is safe in {package}" in broken.stderr

        interpreter, *command = shlex.split(broken.stderr.splitlines()[-1])
        assert (interpreter, command[-1]) == ("python", "--private")
        arrived = len(hub.asked("PUT /_lfs/"))
        finished = python(command, tmp_path, **variables)
        assert finished.returncode == 0, finished.stderr
        assert len(hub.asked("PUT /_lfs/")) == arrived == 1
        repo = hub.repos["model", "acme/dolly"]
        assert repo.private
        assert "model.safetensors" in repo.at()[1]


def test_every_fault_at_every_request_ends_in_a_whole_repository_or_can_be_gone_on_with(package, tmp_path):
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    run = python(["tests/every_fault.py", package], tmp_path, PYTHONPATH=".")
    assert run.returncode == 0, run.stderr
    tries = [json.loads(line) for line in run.stdout.splitlines()]
    requests = list(dict.fromkeys(one["at"] for one in tries))
    assert len(requests) >= 10
    assert len(tries) == 8 * len(requests)
    first_sent = next(one["at"] for one in tries if "tree" in one["request"]) - 1  # it creates the repository again
    weights = next(one["at"] for one in tries if "/_lfs/" in one["request"])
    for one in tries:
        assert one["whole"], one
        assert "Traceback" not in one["said"]
        assert one["code"] == (0 if not one["lasting"] else 2 if one["at"] < first_sent else 3), one
        if one["code"] == 3:
            assert one["said"].splitlines()[-1] == f"  python -m dolly push '{package}' alice/dolly"
        if one["at"] != weights:
            assert one["sent"] == 1, one
    assert {path.name: path.read_bytes() for path in package.iterdir()} == before


def test_a_card_that_the_hub_refuses_is_not_tried_again(package, tmp_path):
    shutil.copytree(package, tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mine"))
    with Hub() as hub:
        run = python([*MODULE, "push", tmp_path / "model", "dolly"], tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert run.returncode == 3
        assert "license" in run.stderr and "is not valid: 'mine'" in run.stderr
        assert len(hub.asked("validate-yaml")) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"HF_TOKEN": ""}, "hf auth login"),
        ([], {"HF_TOKEN": "hf_unknown"}, "does not know this token"),
        ([], {"HF_TOKEN": "hf_café"}, "characters that no token has"),
        ([], {"HF_TOKEN": READ_TOKEN}, "may only read"),
        (["bob/new"], {}, "alice may not write to bob/new. Push as alice or acme"),
        (["bob/model"], {}, "alice may not write to bob/model. Push as alice or acme"),
        (["--private", "alice/public"], {}, "exists and is public"),
        (["my model"], {}, "'my model' is not a name for a model"),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ([], {"HF_HUB_OFFLINE": "1"}, "unset it to push"),
    ],
)
def test_what_makes_a_push_impossible_is_told_before_anything_is_sent(package, tmp_path, arguments, variables, message):
    with Hub() as hub:
        hub.create("model", "bob/model")
        hub.create("model", "alice/public")
        command = [*MODULE, "push", package, *(arguments or ["dolly"])]
        run = python(command, tmp_path, **{"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN} | variables)
        assert (run.returncode, run.stdout) == (2, "")
        assert message in run.stderr
        assert "Traceback" not in run.stderr
        assert not hub.asked("preupload|commit|PUT")


def test_a_folder_without_a_model_is_refused(tmp_path):
    run = python([*MODULE, "push", tmp_path, "dolly"], tmp_path)
    assert run.returncode == 2
    assert f"{tmp_path} is not a model folder" in run.stderr


def test_help_shows_examples_without_loading_libraries(tmp_path):
    watch = "import sys, atexit; atexit.register(lambda: print(*sys.modules)); from dolly.__main__ import main; main()"
    run = python(["-c", watch, "push", "--help"], tmp_path)
    assert run.returncode == 0
    assert "python -m dolly push models/dolly acme/dolly --private" in run.stdout
    assert not {"torch", "transformers", "huggingface_hub", "gradio"} & set(run.stdout.split())


def test_adapters_of_a_base_that_nobody_else_has_are_not_pushed(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"adapters alone.*without --no-merge"):
        push(tmp_path, "alice/dolly", private=True)


LOAD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from dolly.errors import told_plainly
with told_plainly():
    from dolly.model import load_package
    load_package("alice/dolly")
"""


def test_a_disk_that_is_full_while_a_model_is_fetched_is_told(package, tmp_path):
    with Hub() as hub:
        repo = hub.create("model", "alice/dolly")
        repo.commit({path.name: path.read_bytes() for path in package.iterdir()})
        full = python(["-c", LOAD, 200_000], tmp_path, HF_ENDPOINT=hub.url)
        assert full.returncode == 2
        assert f"alice/dolly finds no room in {tmp_path}" in full.stderr
        assert "Traceback" not in full.stderr
        assert python(["-c", LOAD, 10_000_000], tmp_path, HF_ENDPOINT=hub.url).returncode == 0


TRAIN = """
import sys, train
for family, base in zip(sys.argv[2::2], sys.argv[3::2]):
    train.main(f"--base {base} --data {sys.argv[1]}/fruit.jsonl --output {sys.argv[1]}/{family} --max-steps 2 "
               f"--validation 0 --max-length 128 --temperature 0 --max-new-tokens 8 --push-to-hub {family}".split())
"""
ASK = """
import json, sys
from transformers import pipeline
said = {}
for family in sys.argv[1:]:
    dolly = pipeline("text-generation", model=f"alice/{family}")
    answer = dolly("Name a fruit.", return_full_text=False)[0]["generated_text"]
    turns = dolly([{"role": "user", "content": "Name a fruit."}])[0]["generated_text"]
    said[family] = [answer, turns[-1]["content"]]
print(json.dumps(said))
"""


def test_models_of_every_family_are_trained_pushed_and_answer_from_the_hub(bases, tmp_path):
    record = {"instruction": "Name a fruit.", "response": "The apple."}
    (tmp_path / "fruit.jsonl").write_text(json.dumps(record) + "\n")
    families = [part for family, base in bases.items() for part in (family, base)]
    with Hub() as hub:
        trained = python(["-c", TRAIN, tmp_path, *families], tmp_path / "a", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert trained.returncode == 0, trained.stderr
        visitor = python(["-c", ASK, *bases], tmp_path / "b", HF_ENDPOINT=hub.url)
        assert visitor.returncode == 0, visitor.stderr
        for family, (of_text, of_messages) in json.loads(visitor.stdout).items():
            assert of_text == of_messages != "", family
            pushed = hub.repos["model", f"alice/{family}"].at()[1]
            assert pushed["training-curve.png"].startswith(b"\x89PNG")
            texts = [data.decode() for name, data in pushed.items() if name.endswith((".md", ".json", ".jinja"))]
            assert not [text for text in texts if str(tmp_path) in text]
            logs = (trained.stdout, trained.stderr)
            assert not [text for text in (*texts, *logs) if SECRET.search(text) or TOKEN in text]
            assert not [name for name in pushed if name.endswith((".py", ".bin", ".pt", ".yaml"))]
