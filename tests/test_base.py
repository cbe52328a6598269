"""The base's recipe: grammars that compose texts, token files, and a pre-training run that is killed and goes on."""

import itertools
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
import pretrain
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

BASE = ROOT / "data" / "base"


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True, **options)


@pytest.fixture(autouse=True)
def no_haste(monkeypatch):
    monkeypatch.setattr(compose, "HASTE", 0)


def composed(tmp_path, text: str, seed: int = 0) -> str:
    path = tmp_path / "grammar.txt"
    path.write_text(text)
    return compose.compose(compose.read(path), random.Random(seed))[1]


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


@pytest.mark.parametrize("name", compose.NAMES)
def test_every_grammar_composes_whole_and_different_texts(name):
    grammar, chance = compose.grammar_of(name), random.Random(5)
    pairs = [compose.compose(grammar, chance) for _ in range(300)]
    texts = ["\n\n".join(pair).strip() for pair in pairs]
    assert len(set(texts)) > 0.9 * len(texts)
    for text in [text for pair in pairs for text in pair]:
        assert not re.search(r"[\[\]{}|]|\(n\)|=>|###|<\||  ", text), text
        assert not text[:1].islower(), text
    assert all(answer for _, answer in pairs)


def test_the_answer_takes_up_what_was_asked_for(tmp_path):
    path = tmp_path / "grammar.txt"
    path.write_text(
        ANIMALS + "text document\n{a=animal}{=n [seven|nine]}A post: {n} of my {a.name}s, {2..4}\n=>\nLook, {n}!"
    )
    request, answer = compose.compose(compose.read(path), random.Random(1))
    number = re.fullmatch("A post: (seven|nine) of my (owl|cat)s, [234]", request)[1]
    assert answer == f"Look, {number}!"


def test_a_request_in_haste_has_small_letters_and_its_answer_has_not(tmp_path, monkeypatch):
    monkeypatch.setattr(compose, "HASTE", 1)
    path = tmp_path / "grammar.txt"
    path.write_text("text document\nWhat's this, Tom?\n=>\nA cat, Tom.")
    request, answer = compose.compose(compose.read(path), random.Random(1))
    assert request in ("what's this, tom?", "whats this, tom?") and answer == "A cat, Tom."


def test_several_values_of_a_cell_keep_their_order(tmp_path):
    text = "table a: do\nFirst.; Second.; Third.; Fourth.\n\ntext document\n{r=a}{3-3 1 r.do}"
    lines = composed(tmp_path, text, seed=3).splitlines()
    assert [line[:2] for line in lines] == ["1.", "2.", "3."]
    said = [line[3:] for line in lines]
    assert said == sorted(said, key=["First.", "Second.", "Third.", "Fourth."].index)


def test_facts_are_plain_sentences_as_clauses(tmp_path):
    texts = [
        "The cat sat on the mat. Paul, a friend, saw it! It was (nearly) asleep.",
        "A: My dog came home today. I'm glad.",
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text + " It's as I said."}) + "\n" for text in texts)
    )
    assert compose.facts(tmp_path / "texts.jsonl") == [
        {"c": ["the cat sat on the mat"]},
        {"c": ["it's as I said"]},
        {"c": ["my dog came home today"]},
    ]


def test_documents_become_tokens(tmp_path):
    run(BASE / "compose.py", *compose.NAMES, "--words", 2000, "--out", tmp_path / "texts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert sum(len(row["text"].split()) for row in rows) >= 1000
    run(BASE / "encode.py", tmp_path / "texts.jsonl", "--out", tmp_path / "main-1.bin")
    ids = np.fromfile(tmp_path / "main-1.bin", dtype=np.uint16)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    written = [part.tolist() for part in np.split(ids, (ids == 0).nonzero()[0] + 1)][:-1]
    documents = pretrain.documents_of([tmp_path / "main-1.bin"], np.random.default_rng(0))
    texts = sorted(f"{row['request']}\n\n{row['text']}" if "request" in row else row["text"] for row in rows)
    assert sorted(tokenizer.decode([i for i in ids if i > 1]) for ids in written) == texts
    learned = []
    for document in itertools.islice(documents, len(written)):
        assert document.ids[-1] == 0 or len(document.ids) == pretrain.LENGTH
        assert 1 not in document.ids
        learned.append(tokenizer.decode(document.ids[document.learned]).removesuffix("<|endoftext|>"))
    answers = {row["text"] for row in rows if "request" in row}
    assert len(answers & set(learned)) > 0.9 * len(answers)


def test_perplexity_is_of_documents_that_were_not_read(tmp_path):
    for name, start in (("read", 0), ("unread", 30)):
        passages = (ROOT / "data/plain.jsonl").read_text(encoding="utf-8").splitlines()[start : start + 30]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(passages))
    (tmp_path / "tokens").mkdir()
    run(BASE / "encode.py", tmp_path / "read.jsonl", "--out", tmp_path / "tokens" / "main.bin")
    files = [tmp_path / "read.jsonl", tmp_path / "unread.jsonl"]
    read, unread = run(BASE / "perplexity.py", "--tokens", tmp_path / "tokens", *files).stdout.splitlines()[2:]
    assert read == "| read | 0 | 0 | - |"
    _, name, documents, size, perplexity, _ = unread.split("|")
    assert (name, documents) == (" unread ", " 30 ") and int(size) > 10 and 30 < float(perplexity) < 1000


def test_a_killed_pretraining_goes_on(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name in ("main-1", "simple", "composed", "validation-main"):
        ids = np.random.default_rng(0).integers(5, 100, 60_000, dtype=np.uint16)
        ids[59::60] = 0
        ids.tofile(tokens / f"{name}.bin")
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
    subprocess.run([*command, "--steps", "200", "--out", tmp_path / "out"], env=environment, check=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 200  # no step is lost or done twice
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation"]["main"] < 5
    assert (tmp_path / "out" / "model.safetensors").exists()
