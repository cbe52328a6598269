"""Packing: nothing lost, cut or mixed, hardly any padding."""

import random

import pytest
import torch
from conftest import base_tokenizer

from dolly.packing import IGNORED, Document, collate, pack, tokenize
from dolly.prompt import dolly_tokenizer
from dolly.records import Record


def test_rows_hold_every_document_once_and_fit():
    choose = random.Random(1)
    lengths = [min(512, 1 + int(choose.lognormvariate(4.5, 0.6))) for _ in range(3000)]  # as instruction records
    rows = pack(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(3000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 512
    assert len(rows) * 512 / sum(lengths) < 1.01


def test_best_fit_decreasing_by_hand():
    assert pack([2, 7, 5, 3, 5, 8], 10) == [[5, 0], [1, 3], [2, 4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_a_document_is_never_cut():
    with pytest.raises(ValueError, match="11"):
        pack([3, 11], 10)


def test_records_at_the_limit_are_kept_and_longer_ones_are_told():
    tokenizer = dolly_tokenizer(base_tokenizer("gpt_neox"))
    records = [
        Record([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" + " c" * n}], "x", n)
        for n in range(8)
    ]
    everything, _ = tokenize(records, tokenizer, 1000)
    limit = len(everything[4].ids)
    kept, problems = tokenize(records, tokenizer, limit)
    assert [len(document.ids) for document in kept] == [limit - 4 + n for n in range(5)]
    assert [problem.line for problem in problems] == [5, 6, 7]
    end = tokenizer.convert_tokens_to_ids("### End")
    assert all(document.ids[-1] == end and document.learned[-1] for document in kept)


def test_a_batch_learns_the_answers_and_their_ends_only():
    documents = [Document([5, 6, 7, 2], [False, False, True, True]), Document([8, 9, 2], [True, True, True])]
    batch = collate([[0, 1], [1]], documents, 8, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 9, 2, 1], [8, 9, 2, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.keep.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [7, 2, 9, 2, 9, 2]
    assert batch.documents.tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(batch.keep.sum(), torch.tensor(len(batch.targets)))
    assert IGNORED not in batch.targets
