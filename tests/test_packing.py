"""Packing: nothing lost, cut or mixed, hardly any padding, and every answer learns its end."""

import pickle
import random

import numpy as np
import pytest
import torch
from conftest import base_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompt import KINDS

from dolly import packing, prompt
from dolly.packing import Document, collate, pack, tokenize
from dolly.prompt import CONTROL_TOKENS, END, dolly_tokenizer
from dolly.records import Record

TEXT = "Once upon a time, in a town by the sea, there lived 3 bakers.\n\n  They said: é 你好 🙂 and no more. " * 3


def conversation(instruction: str, response: str, line: int = 0) -> Record:
    turns = [("user", instruction), ("assistant", response)]
    return Record([{"role": role, "content": content} for role, content in turns], "x", line)


def text_record(text: str, line: int = 0) -> Record:
    return Record([], "x", line, text)


@pytest.fixture(scope="module", params=KINDS)
def both(request) -> tuple:
    """A base's tokenizer, and Dolly's made of it."""
    base = base_tokenizer(request.param)
    return base, dolly_tokenizer(base)


def test_the_rows_of_instruction_records_are_full():
    choose = random.Random(1)
    lengths = [min(1024, int(60 + choose.lognormvariate(4.5, 0.9))) for _ in range(3000)]
    assert len(pack(lengths, 1024)) * 1024 / sum(lengths) < 1.015


def test_best_fit_decreasing_by_hand():
    assert pack([2, 7, 5, 3, 5, 8], 10) == [[5, 0], [1, 3], [2, 4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_a_document_is_never_cut():
    with pytest.raises(ValueError, match="11"):
        pack([3, 11], 10)


@settings(max_examples=100, deadline=None)
@given(
    marks=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=12),
    capacity=st.integers(12, 20),
    empty=st.integers(0, 2),
)
def test_a_batch_holds_every_document_once_whole_and_apart(marks, capacity, empty):
    ids = iter(range(1000))
    documents = [Document([next(ids) for _ in learned], learned) for learned in marks]
    rows = pack([len(learned) for learned in marks], capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(documents)))
    rows += [[]] * (empty + (not rows))  # with which a process fills up its share

    batch = collate(rows, documents, capacity, pad_id=-1)
    learned = []
    for number, row in enumerate(rows):
        found = batch.input_ids[number].tolist()
        places = batch.position_ids[number].tolist()
        at = 0
        for index in row:
            document = documents[index]
            size = len(document.ids)
            assert found[at : at + size] == document.ids
            assert places[at : at + size] == list(range(size))
            for n in range(1, size):
                if document.learned[n]:
                    learned.append((number * capacity + at + n - 1, document.ids[n], index))
            at += size
        assert found[at:] == [-1] * (capacity - at)
        assert places[at:] == list(range(capacity - at))
    assert list(zip(batch.places.tolist(), batch.targets.tolist(), batch.documents.tolist(), strict=True)) == learned
    assert len(learned) == sum(document.answer_tokens() for document in documents)


def test_a_batch_by_hand_in_all_its_forms():
    documents = [Document([5, 6, 7, 2], [False, False, True, True]), Document([8, 9, 2], [True, True, True])]
    batch = collate([[0, 1], [1]], documents, 8, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 9, 2, 1], [8, 9, 2, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.places.tolist() == [1, 2, 4, 5, 8, 9]
    assert batch.keep.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [7, 2, 9, 2, 9, 2]
    assert batch.documents.tolist() == [0, 0, 1, 1, 1, 1]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    flat = batch.flat()
    assert flat.input_ids.shape == flat.position_ids.shape == (1, 16)
    assert flat.keep.nonzero()[:, 1].tolist() == flat.places.tolist()


def test_documents_of_arrays_are_left_as_they_are_and_travel_as_bytes():
    lists = [Document([5, 60000, 7], [False, True, True], "a", 3), Document([8, 9], [True, True])]
    arrays = [Document(np.array(d.ids, dtype=np.int32), np.array(d.learned), d.category, d.line) for d in lists]
    batches = [collate([[1, 0]], documents, 6, 0) for documents in (lists, arrays, pickle.loads(pickle.dumps(lists)))]
    for name in vars(batches[0]):
        assert all(torch.equal(getattr(batches[0], name), getattr(other, name)) for other in batches[1:])
    assert arrays[1].learned.tolist() == [True, True]
    document = pickle.loads(pickle.dumps(arrays[0]))
    assert (document.ids.dtype, document.learned.dtype, document.category, document.line) == (np.int32, bool, "a", 3)
    many = [Document(np.arange(200, dtype=np.int32), np.ones(200, dtype=bool), "a", n) for n in range(100)]
    assert len(pickle.dumps(many)) < 100 * (5 * 200 + 40)


def test_records_at_the_limit_are_kept_and_longer_ones_are_told():
    tokenizer = dolly_tokenizer(base_tokenizer("gpt_neox"))
    records = [conversation("a", "b" + " c" * n, n) for n in range(8)]
    everything, _ = tokenize(records, tokenizer, 1000)
    limit = len(everything[4].ids)
    kept, problems = tokenize(records, tokenizer, limit)
    assert [len(document.ids) for document in kept] == [limit - 4 + n for n in range(5)]
    assert [problem.line for problem in problems] == [5, 6, 7]
    assert all(document.ids[-1] == tokenizer.eos_token_id and document.learned[-1] for document in kept)


def test_a_prompt_that_fills_the_window_is_told(both):
    base, tokenizer = both
    [short], _ = tokenize([conversation("a", "b")], tokenizer, 1000)
    for longer in range(1, 4):
        kept, problems = tokenize([conversation("a" + " a" * 30 * longer, "b", 7)], tokenizer, len(short.ids))
        assert not kept
        assert [(problem.line, problem.what) for problem in problems] == [(7, f"longer than {len(short.ids)} tokens")]


@pytest.mark.parametrize("padding", ["its own", "the end of an answer"])
def test_every_answer_learns_its_end_whatever_pads(both, padding):
    base, tokenizer = both
    end = tokenizer.convert_tokens_to_ids(END)
    pad_id = end if padding == "the end of an answer" else tokenizer.pad_token_id
    records = [conversation(f"Say {n}.", "A word. " * (n + 1), n) for n in range(6)]
    records[3].messages.extend(conversation("And now?", "1. No more...").messages)
    documents, problems = tokenize(records, tokenizer, 256)
    assert not problems
    batch = collate(pack([len(document.ids) for document in documents], 256), documents, 256, pad_id)
    for index, document in enumerate(documents):
        learned = batch.targets[batch.documents == index].tolist()
        assert learned[-1] == end
        assert learned.count(end) == (2 if index == 3 else 1)
        assert len(learned) == document.answer_tokens() > 2
    assert len(batch.targets) == sum(document.answer_tokens() for document in documents)


def test_a_text_is_framed_as_the_base_has_learned_it(both):
    base, tokenizer = both
    [document], problems = tokenize([text_record(TEXT, 5)], tokenizer, 1000, base)
    assert not problems
    assert document.ids.tolist() == [*base(TEXT).input_ids, base.eos_token_id]
    assert document.learned.all() and document.answer_tokens() == len(document.ids) - 1
    assert (document.category, document.line) == ("x", 5)
    [alone], _ = tokenize([text_record(TEXT, 5)], base, 1000, base)  # a run of texts alone keeps the base's tokenizer
    assert alone.ids.tolist() == document.ids.tolist()


def test_a_long_text_is_cut_and_every_token_learned_once(both):
    base, tokenizer = both
    [whole], _ = tokenize([text_record(TEXT)], tokenizer, 1000, base)
    size = len(whole.ids)
    for length in (16, size // 2, size // 2 + 1, size - 1, size, size + 1):
        pieces, problems = tokenize([text_record(TEXT, 9)], tokenizer, length, base)
        assert not problems
        assert {piece.line for piece in pieces} == {9}
        assert (len(pieces) == 1) == (length >= size)
        assert all(len(piece.ids) == length for piece in pieces[:-1]) and 2 <= len(pieces[-1].ids) <= length
        batch = collate([[n] for n in range(len(pieces))], pieces, length, pad_id=0)
        assert batch.targets.tolist() == whole.ids[1:].tolist()


def test_text_that_spells_a_control_token_or_an_end_stays_text(both):
    base, tokenizer = both
    text = f"Say {END} and {base.eos_token} and {CONTROL_TOKENS[0]} now"
    [document], _ = tokenize([text_record(text)], tokenizer, 1000, base)
    special = {base.eos_token_id, *tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))}
    assert [n for n, i in enumerate(document.ids) if i in special] == [len(document.ids) - 1]


def test_texts_and_conversations_mixed_keep_their_order(both):
    base, tokenizer = both
    records = [conversation("a", "b", 1), text_record("Hello there", 2), conversation("c", "d", 3), text_record("x", 4)]
    documents, _ = tokenize(records, tokenizer, 1000, base)
    assert [document.line for document in documents] == [1, 2, 3, 4]
    ends = [document.ids[-1] for document in documents]
    assert ends == [tokenizer.convert_tokens_to_ids(END), base.eos_token_id] * 2


@pytest.mark.parametrize("name, size", [("PART", 20), ("PART", 150), ("TOGETHER", 1)])
def test_the_ids_do_not_depend_on_how_much_is_tokenised_at_once(both, monkeypatch, name, size):
    base, tokenizer = both
    records = [text_record(TEXT), conversation(TEXT, "b"), conversation("a", TEXT), text_record("x"), text_record(TEXT)]

    def ids() -> list:
        return [document.ids.tolist() for document in tokenize(records, tokenizer, 2000, base)[0]]

    together = ids()
    monkeypatch.setattr(packing if name == "PART" else prompt, name, size)
    assert ids() == together


def test_a_text_of_one_token_that_no_base_frames_is_told():
    base = base_tokenizer("gpt_neox")
    base.eos_token = None
    documents, problems = tokenize([text_record("a", 1), text_record("a b", 2)], base, 1000, base)
    assert [document.line for document in documents] == [2]
    assert [(problem.line, problem.what) for problem in problems] == [(1, "too short to learn anything from")]
