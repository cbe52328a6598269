"""Measures of a model: losses of the plain forward, shares that can be counted by hand, the command, its report."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

from benchmarks.quality.__main__ import table
from dolly import curve, evaluate
from dolly import model as models
from dolly.errors import UserError
from dolly.model import Answer
from dolly.packing import tokenize
from dolly.records import read_records


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory) -> Path:
    """A package made from 60 records with two categories, and the file of its data."""
    folder = tmp_path_factory.mktemp("evaluate")
    lines = (ROOT / "data" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["category"] in ("open_qa", "classification")]
    rows = [row for row in rows[:: len(rows) // 70] if len(str(row)) < 500][:60]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--max-length", 256, "--bad-records", "drop", "--validation", 0.2, "--dtype", "float32"]
    done = run(
        "train.py", "--base", bases["llama"], "--data", folder / "my.jsonl", "--output", folder / "model",
        "--learning-rate", 1e-2, "--max-steps", 4, "--max-new-tokens", 12, *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_losses_are_those_of_the_plain_forward(trained):
    model, tokenizer = models.load_package(str(trained / "model"))
    records, _ = read_records(str(trained / "my.jsonl"))
    documents, _ = tokenize(records, tokenizer, 256)
    plain = []
    for document in documents:
        ids, learned = torch.tensor(document.ids)[None], torch.tensor(document.learned)
        with torch.no_grad():
            each = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:].long(), reduction="none")[learned[1:]]
        plain.append((each.sum().item(), len(each)))
    measured = evaluate.losses(model, documents, 256, "float32")
    for name in ("all", "open_qa", "classification"):
        chosen = [p for p, d in zip(plain, documents, strict=True) if name in ("all", d.category)]
        assert measured[name] == pytest.approx(sum(p[0] for p in chosen) / sum(p[1] for p in chosen), rel=1e-4)
    found = evaluate.highest(model, tokenizer, records, 256, "float32")
    order = sorted(range(len(plain)), key=lambda at: -plain[at][0] / plain[at][1])
    assert [row["line"] for row in found][:10] == [documents[at].line for at in order][:10]
    assert found[0]["prompt"] and found[0]["answer"]


def test_the_command_measures_a_model_beside_its_base(trained, bases, tmp_path):
    (tmp_path / "prompts.txt").write_text("Name a fruit.\n\nIs water wet?\n", encoding="utf-8")
    done = run(
        "-m", "dolly", "evaluate", trained / "model", "--base", bases["llama"], "--per-record",
        "--prompts", tmp_path / "prompts.txt", "--json", tmp_path / "m.json", "--report", tmp_path / "m.md",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["data"] == str(trained / "my.jsonl") and 3 <= found["records"] <= 25  # the part that was held out
    assert found["records"] + len(found["highest_losses"]) == 60
    assert found["loss"]["model"]["all"] < found["loss"]["base"]["all"] - 0.1
    assert set(found["plain_text"]) == {"model", "base"}
    assert [sample["prompt"] for sample in found["samples"]] == ["Name a fruit.", "Is water wet?"]
    assert 2 < found["answers"]["model"]["answers"] <= 2 + found["records"]
    text = (tmp_path / "m.md").read_text()
    assert text == done.stdout
    for told in ("| open_qa |", "Plain English", "end by themselves", "Is water wet?", "highest loss"):
        assert told in text


def test_a_whole_file_can_be_measured_and_a_base_need_not_be_there(trained):
    found = evaluate.evaluate(str(trained / "model"), data=str(trained / "my.jsonl"), whole=True, prompts=["Hi"])
    assert found["records"] == 60 and "plain_text" not in found
    assert evaluate.report(found).count("Before:") == 0


def test_what_cannot_be_measured_is_told(trained, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    with pytest.raises(UserError, match="--whole"):
        evaluate.evaluate(str(trained / "model"), data=str(tmp_path / "one.jsonl"))
    for arguments, told in (
        ([], "required: MODEL"), (["models/nowhere"], "There is no folder"), (["m", "--epochs", "1"], "unrecognized"),
        ([trained / "model", "--prompts", "none.txt"], "none.txt cannot be read"),
    ):  # fmt: skip
        done = run("-m", "dolly", "evaluate", *arguments)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_adapters_alone_and_a_package_that_learned_all_are_measured_too(trained, bases, tmp_path):
    lora = ["--lora-rank", 4, "--no-merge", "--validation", 0]
    done = run(
        "train.py", "--base", bases["llama"], "--data", trained / "my.jsonl", "--output", tmp_path / "lora", *lora,
        "--max-steps", 1, "--max-length", 256, "--bad-records", "drop", "--max-new-tokens", 12,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="trained on all of its records"):
        evaluate.evaluate(str(tmp_path / "lora"))
    found = evaluate.evaluate(str(tmp_path / "lora"), data=str(trained / "my.jsonl"), whole=True, prompts=["Hi"])
    assert found["records"] == 60
    assert "60 records of" in evaluate.report(found)


def test_a_base_of_other_tokens_and_a_package_that_tells_no_data_are_refused(trained, bases, tmp_path):
    with pytest.raises(UserError, match="tokenizers differ"):
        evaluate.evaluate(str(trained / "model"), base=str(bases["qwen3"]), prompts=["Hi"])
    shutil.copytree(trained / "model", tmp_path / "bare")
    (tmp_path / "bare" / "train.yaml").unlink()
    with pytest.raises(UserError, match="does not tell what it was trained on"):
        evaluate.evaluate(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="more than half"):
        evaluate.evaluate(str(trained / "model"), prompts=["word " * 300])


def test_the_card_tells_the_measures(trained):
    card = (trained / "model" / "README.md").read_text(encoding="utf-8")
    for told in ("| category | loss before | after |", "What it forgot", "end by themselves"):
        assert told in card


def test_shares_of_answers():
    loop = "the cat sat down and the cat sat down and the cat sat down"
    answers = [Answer("red green", True), Answer(loop, False), Answer("", True), Answer("a a a a", True)]
    found = evaluate.quality(answers)
    assert (found["end_by_themselves"], found["loop"], found["empty"]) == (0.75, 0.25, 0.25)
    assert found["distinct_1"] == pytest.approx((1 + 5 / 14 + 1 / 4) / 3)
    assert found["words"] == (2 + 14 + 0 + 4) / 4


# ---- the learning curve ----------------------------------------------------------------------------------------------


def sums(*losses: float, tokens: int = 50, noise: float = 0.05) -> list[torch.Tensor]:
    """Of three shares: 100 held-out records with these mean losses."""
    spread = torch.Generator().manual_seed(0)
    own = torch.randn(100, generator=spread, dtype=torch.float64)
    made = []
    for loss in losses:
        each = loss + own + noise * torch.randn(100, generator=spread, dtype=torch.float64)
        made.append(torch.stack([each * tokens, torch.full((100,), float(tokens), dtype=torch.float64)], 1))
    return made


@pytest.mark.parametrize(
    ("losses", "helps"),
    [
        ((4.0, 3.5, 3.0), "yes"), ((3.2, 3.1, 3.05), "a little"), ((3.0, 3.0, 3.0), "unclear"),
        ((3.0, 3.0, 3.4), "no"),
    ],
)  # fmt: skip
def test_a_verdict_is_given_when_the_records_agree(losses, helps):
    found = curve.verdict("a", 60, sums(*losses), torch.ones(100, dtype=torch.bool))
    assert found.helps == helps
    assert found.error == pytest.approx(0.05 * 2**0.5 / 10, rel=0.3)
    assert (found.doubled < found.losses[-1]) == (losses[1] > losses[2])
    few = torch.arange(100) < curve.FEW - 1
    assert curve.verdict("a", 60, sums(*losses), few).helps == "unclear"


def test_the_learning_curve_trains_on_three_shares(trained, bases, tmp_path):
    done = run(
        "-m", "dolly", "evaluate", "--learning-curve", "--base", bases["llama"], "--data", trained / "my.jsonl",
        "--json", tmp_path / "c.json", "--epochs", 1, "--max-length", 256, "--batch-tokens", 512, "--validation", 0.3,
        "--learning-rate", 1e-2, "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *others = json.loads((tmp_path / "c.json").read_text())
    assert first["category"] is None and {each["category"] for each in others} == {"open_qa", "classification"}
    assert first["records"] == sum(each["records"] for each in others)
    assert first["losses"][0] > first["losses"][1] > first["losses"][2]
    assert "would more help?" in done.stdout and not (ROOT / "models" / "none").exists()


# ---- others' tasks ---------------------------------------------------------------------------------------------------


def test_tasks_of_the_harness(trained, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra: pip install lm_eval")
    rows = [{"q": "Water is", "choices": ["wet", "a bird of the north"], "a": 0}] * 4
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        f"task: wetness\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'rows.json'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: a\nmetric_list:\n  - metric: acc\n"
    )
    model, tokenizer = models.load_package(str(trained / "model"))
    found = evaluate.harness(model, tokenizer, [str(tmp_path / "task.yaml")])
    assert 0 <= found["wetness"]["acc,none"] <= 1
    with pytest.raises(UserError, match="--tasks nothing"):
        evaluate.harness(model, tokenizer, ["nothing"])


def test_a_missing_harness_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        evaluate.harness(None, None, ["x"])


def test_scores_of_answers_become_a_table():
    rows = [
        {"category": "tweet", "score": 4, "ended": True},
        {"category": "tweet", "score": 1, "ended": True},
        {"category": "other", "score": 3, "ended": False},
    ]
    assert table(rows).splitlines()[2:] == [
        "| tweet | 2 | 2.50 | 50% | 100% |",
        "| other | 1 | 3.00 | 100% | 0% |",
        "| all | 3 | 2.67 | 67% | 67% |",
    ]
