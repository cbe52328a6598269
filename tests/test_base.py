"""The base's recipe: grammars that compose texts, token files, and a pre-training run that is killed and goes on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import compose
import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

BASE = ROOT / "data" / "base"
GRAMMARS = sorted(path.stem for path in compose.FOLDER.glob("*.txt"))


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True, **options)


@pytest.fixture(autouse=True)
def no_haste(monkeypatch):
    monkeypatch.setattr(compose, "HASTE", 0)


def composed(tmp_path, text: str, seed: int = 0) -> str:
    path = tmp_path / "grammar.txt"
    path.write_text(text)
    return compose.compose(compose.read(path), random.Random(seed))


ANIMALS = """\
# animals and what they have
table animal: name | has
owl | wings; a beak
cat | paws; whiskers

list question
who is that?
what do I see?

"""


def test_a_row_belongs_together_and_nothing_is_said_twice(tmp_path):
    for seed in range(20):
        text = composed(
            tmp_path, ANIMALS + "text document\n{a=animal}{question} A(n) {a.name} with {2-2 , a.has}.", seed
        )
        assert re.fullmatch(
            "(Who is that|What do I see)[?] "
            "(An owl with (wings and a beak|a beak and wings)|A cat with (paws and whiskers|whiskers and paws))[.]",
            text,
        )


def test_choices_are_nested_and_a_phrase_can_be_fixed(tmp_path):
    seen = {composed(tmp_path, ANIMALS + "text document\n{=q question}{q} [Hm[.|!]|] {q}", seed) for seed in range(60)}
    both = "Who is that?", "What do I see?"
    assert seen == {f"{q} {middle}{q}" for q in both for middle in ("", "Hm. ", "Hm! ")}


def test_lists_of_lines(tmp_path):
    text = composed(tmp_path, ANIMALS + "text document\n{2-2 - question}\n\n{2-2 1 question}")
    assert {line[2:] for line in text.splitlines()[:2]} == {"Who is that?", "What do I see?"}
    assert [line[:3] for line in text.splitlines()[3:]] == ["1. ", "2. "]


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("table a: x | y\none | two | three\n", "grammar.txt:2: 3 cells under 2 columns"),
        ("one\n", "grammar.txt:1: a line outside of any table, list or text"),
        ("list a\nx\n\ntext a\ny\n", "grammar.txt:4: a is a list already"),
        ("text document\nHello [you|there.\n", "not closed"),
        ("text document\nHello {you}.\n", "the grammar has no 'you'"),
    ],
)
def test_faults_of_a_grammar_are_told(tmp_path, grammar, said):
    with pytest.raises(SystemExit, match=re.escape(said)):
        composed(tmp_path, grammar)


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_grammar_composes_whole_and_different_texts(name):
    grammar, chance = compose.read(compose.FOLDER / f"{name}.txt"), random.Random(5)
    grammar |= compose.facts(ROOT / "data" / "plain.jsonl") if name == "restate" else {}
    texts = [compose.compose(grammar, chance) for _ in range(300)]
    assert len(set(texts)) > 0.97 * len(texts)
    assert not any(text[0].islower() for text in texts)
    for text in texts:
        assert not re.search(r"[\[\]{}|]|\(n\)|###|<\||  ", text), text
        assert len(text.split()) > 3, text


def test_facts_are_plain_sentences_and_clauses(tmp_path):
    texts = [
        "The cat sat on the mat. Paul, a friend, saw it! It was (nearly) asleep.",
        "A: My dog came home today. I'm glad.",
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text + " It's as I said."}) + "\n" for text in texts)
    )
    found = compose.facts(tmp_path / "texts.jsonl")
    assert [row["one"] + row["c1"] for row in found["fact"]["rows"]] == [
        ["The cat sat on the mat.", "the cat sat on the mat"],
        ["It's as I said.", "it's as I said"],
        ["My dog came home today.", "my dog came home today"],
    ]
    assert found["pair"]["rows"] == []


def test_records_are_requests_with_one_answer():
    assert compose.record("A tweet about rain\n\nIt rains.") == {
        "instruction": "A tweet about rain", "context": "", "response": "It rains.",
    }  # fmt: skip
    for text in (
        "It rains.",
        "Tom wanted a tweet:\n\nIt rains.",
        "A tweet\n\nRain!\nThat is too long.\nRain.",
        "Hi\n\nTom: Ho",
    ):
        assert compose.record(text) is None


def test_documents_become_tokens(tmp_path):
    run(BASE / "compose.py", *GRAMMARS, "--words", 2000, "--out", tmp_path / "texts.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert sum(len(text.split()) for text in texts) >= 2000
    run(BASE / "encode.py", tmp_path / "texts.jsonl", "--out", tmp_path / "main-1.bin")
    ids = np.fromfile(tmp_path / "main-1.bin", dtype=np.uint16)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    documents = [tokenizer.decode(part.tolist()) for part in np.split(ids, (ids == 0).nonzero()[0] + 1)][:-1]
    assert sorted(document.replace("<|endoftext|>", "") for document in documents) == sorted(texts)


def test_a_killed_pretraining_goes_on(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name in ("main-1", "simple", "composed", "restate", "validation-main"):
        np.random.default_rng(0).integers(5, 100, 60_000, dtype=np.uint16).tofile(tokens / f"{name}.bin")
    command = [sys.executable, BASE / "pretrain.py", "--tokens", tokens, "--work", tmp_path / "work"]
    command += ["--hidden", "64", "--layers", "1", "--rows", "2", "--seconds", "600"]
    log, environment = tmp_path / "work" / "log.jsonl", os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run([*command, "--steps", "400", "--out", tmp_path / "out"], env=environment, check=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 400  # no step is lost or done twice
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation"]["main"] < 5
    assert (tmp_path / "out" / "model.safetensors").exists()
