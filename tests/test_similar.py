"""Near-duplicates: the arithmetic against the definition, in every script, whatever the number of alike texts."""

import itertools
import random
import re

import numpy as np
import pytest
from conftest import texts

from dolly import similar
from dolly.similar import SAME, Sketches, _words, groups


def shingles(text: str) -> set:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[at : at + 4]) for at in range(max(1, len(words) - 3))} if words else set()


def jaccard(a: str, b: str) -> float:
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b) if a and b else 0.0


def pairs(made: list[str]) -> set[tuple[int, int]]:
    sketches = Sketches()
    for at in range(0, len(made), 7):
        sketches.add((text,) for text in made[at : at + 7])
    return {tuple(pair) for pair in sketches.pairs().tolist()}


def changed(text: str, share: float, chance: random.Random) -> str:
    words = text.split(" ")
    return " ".join(chance.choice(["red", "seven", "often"]) if chance.random() < share else word for word in words)


def test_what_is_found_is_alike_and_what_is_alike_is_found():
    chance = random.Random(0)
    made = [text for text in texts() if len(text.split()) > 20]
    made += [changed(text, chance.choice([0.02, 0.05, 0.1, 0.2]), chance) for text in made]
    true = {(a, b) for a, b in itertools.combinations(range(len(made)), 2) if jaccard(made[a], made[b]) > SAME}
    found = pairs(made)
    assert found <= true
    assert len(true) > 60
    roots = groups(len(made), found)
    assert sum(roots[a] == roots[b] for a, b in true) >= 0.98 * len(true)


def test_words_are_told_apart_in_every_script():
    made = ["Don't stop—go “now”, at 7:30!", "猫が好き", "Привет, мир", "", "a\u00a0b", "naïve café"]
    _, owners = _words(made)
    assert [int((owners == at).sum()) for at in range(len(made))] == [8, 4, 2, 0, 2, 2]
    hashes, owners = _words(["The cat, the CAT", "cat the"])
    assert hashes[0] == hashes[2] == hashes[5] and hashes[1] == hashes[3] == hashes[4] != hashes[0]


def test_short_texts_are_alike_only_when_they_say_the_same():
    assert pairs(["Yes.", "yes", "No.", "Yes it is", "", "", "!"]) == {(0, 1)}


def test_many_alike_texts_are_connected_without_comparing_all_of_them():
    made = [f"Our shop at number {n} opens at nine and closes at six every day but Sunday." for n in range(3000)]
    found = pairs(made)
    assert len(found) < 10 * len(made)
    assert set(groups(len(made), found)) == {0}


def test_a_text_longer_than_what_is_worked_on_at_once_is_one_text(monkeypatch):
    text = " ".join(f"word{n}" for n in range(5000))
    whole = Sketches()
    whole.add([(text,), ("short",), (text,)])
    monkeypatch.setattr(similar, "PART", 4000)
    cut = Sketches()
    cut.add([(text,), ("short",), (text,)])
    assert [tuple(pair) for pair in cut.pairs().tolist()] == [(0, 2)]
    assert cut.lengths[0][0] == pytest.approx(whole.lengths[0][0], rel=0.02)
    assert whole.similarities(np.array([[0, 2], [0, 1]])).tolist() == [1.0, 0.0]


def test_texts_have_to_be_alike_in_each_part():
    long = " ".join(f"word{n}" for n in range(60))
    question, other = "Who wrote the old letter that lay in the box?", "How many boats came home after the storm?"
    answer, another = "It was the miller who wrote it, in May.", "Nine boats came home, and one was lost."
    made = [
        (question, long, answer),
        (question, long.replace("word7", "seven"), answer),
        (other, long, another),  # another question about the same text
        (question, long.replace("word", "thing"), answer),  # the same question about another text
        ("Which is it?", long, "A tool"),
        ("Which is it?", long, "A fruit"),
    ]
    sketches = Sketches()
    sketches.add(made)
    assert sketches.pairs().tolist() == [[0, 1]]
    assert sketches.similarities(np.array([[0, 2], [2, 0], [4, 5], [0, 0]])).tolist() == [0, 0, 0, 1]


def test_groups_follow_chains_in_any_order():
    assert groups(6, [(4, 5), (1, 2), (2, 4)]) == [0, 1, 1, 3, 1, 1]
    assert groups(3, []) == [0, 1, 2]
