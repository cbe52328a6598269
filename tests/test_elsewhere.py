"""The package where Dolly's own code is not: in `transformers serve`, and in transformers 4."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from conftest import ANSWER, QUESTION, ROOT, run
from transformers import AutoTokenizer

TRANSFORMERS_4 = ROOT / ".venv" / "transformers-4"  # of the Makefile
ASK = """
import json, sys, transformers
said = {"version": transformers.__version__}
for name in sys.argv[1:]:
    dolly = transformers.pipeline("text-generation", model=name)
    turns = dolly([{"role": "user", "content": "QUESTION"}])[0]["generated_text"]
    said[name] = [dolly("QUESTION", return_full_text=False)[0]["generated_text"], turns[-1]["content"]]
print(json.dumps(said))
""".replace("QUESTION", QUESTION)


@contextlib.contextmanager
def served(package: Path, log: Path):
    """`transformers serve` on a package, as the card tells; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", package, "--port", str(port), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def test_transformers_serve_streams_an_answer_to_an_openai_client(packages, tmp_path):
    package = packages["gpt_neox"]
    with served(package, tmp_path / "log") as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        asked = {"model": str(package), "messages": [{"role": "user", "content": QUESTION}]}
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked) if chunk.choices]
        pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
        assert "".join(pieces) == ANSWER
        assert len(pieces) > 1
        assert chunks[-1].finish_reason == "stop"
        whole = client.chat.completions.create(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (ANSWER, "stop")


def test_packages_answer_in_transformers_4_as_in_5(packages):
    if not TRANSFORMERS_4.exists():
        pytest.skip(f"no {TRANSFORMERS_4}: `make test` installs transformers 4 there")
    env = os.environ | {"PYTHONPATH": str(TRANSFORMERS_4), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ASK, *map(str, packages.values())]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said.pop("version").startswith("4.57")
    for package in packages.values():  # version 4 leaves the space before the first word of Llama's tokenizer
        assert [answer.lstrip() for answer in said[str(package)]] == [ANSWER, ANSWER]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_the_copy_for_llama_cpp_has_the_ids_that_were_trained(family, bases, packages, tmp_path):
    """llama.cpp tells tokenizers apart by the ids of a text, and keeps white space beside control tokens."""
    copy = tmp_path / "copy"
    done = run("-m", "dolly", "llama-cpp", packages[family], copy)
    assert done.returncode == 0, done.stderr
    base, trained, copied = map(AutoTokenizer.from_pretrained, (bases[family], packages[family], copy))
    text = "\n \n\n \t 🚀 (normal) 3 33 333 ------====== I've been 'told he's there, 'RE you sure?"
    assert copied.encode(text) == base.encode(text)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    for messages, more in ((turns[:1], True), (turns, False), ([*turns, turns[0]], True)):
        wanted = trained.apply_chat_template(messages, add_generation_prompt=more).input_ids
        rendered = copied.apply_chat_template(messages, add_generation_prompt=more, tokenize=False)
        assert copied(rendered, add_special_tokens=False).input_ids == wanted
    if family == "gpt_neox":
        assert json.loads((copy / "config.json").read_text())["rotary_pct"] == 0.25
    assert not (copy / "train.yaml").exists()


def test_what_llama_cpp_does_not_take_is_refused(packages, bases, tmp_path):
    for model, said in (
        (packages["gptj"], "models of the type gptj"),
        (bases["gpt2"], "not the folder of a model that"),
    ):
        done = run("-m", "dolly", "llama-cpp", model, tmp_path / "copy")
        assert (done.returncode, (tmp_path / "copy").exists()) == (2, False)
        assert said in done.stderr and "Traceback" not in done.stderr
