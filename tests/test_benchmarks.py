"""The comparison of trainers: that all learn the same from the same tokens, and that its one command works."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import run
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("trl", reason="TRL is not installed (pip install -r benchmarks/requirements.txt)")

from benchmarks import systems, training  # noqa: E402
from dolly.errors import UserError  # noqa: E402

RECORDS = [
    {"instruction": f"Count from {n} to {n + n % 9}.", "response": " ".join(map(str, range(n, n + n % 9 + 1)))}
    for n in range(90)
]
FIGURES = {"tokens_per_second", "peak_gib", "heldout_loss"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "counting.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def task(records, tmp_path) -> systems.Task:
    documents = tmp_path / "documents.json"
    training.prepare(str(records), 512, 1, 16, documents)
    return systems.Task("dolly", "embedded", "cpu", 1, "float32", 512, 1, 16, 1e-3, str(documents))


def test_every_system_has_the_same_gradient_after_a_pass_over_the_same_tokens(task, tmp_path):
    """Which it has only if it saw the same tokens, learned the same ones and weighs each alike."""
    documents, _ = systems.documents_of(task)
    gradients, seen = {}, {}
    for name, system in systems.SYSTEMS.items():
        model, tokenizer = systems.build("embedded", "cpu")

        def keep(*_, name=name, model=model):
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])

        hook = register_optimizer_step_pre_hook(keep)
        with systems.Meter(model, tokenizer.pad_token_id, 1) as meter:
            system(model, documents, tokenizer, task, str(tmp_path))
        hook.remove()
        seen[name] = meter.tokens.item()
    assert set(seen.values()) == {sum(len(document.ids) for document in documents)}
    for name in ("2023", "trl-padded", "trl-packed"):
        apart = (gradients[name] - gradients["dolly"]).norm() / gradients["dolly"].norm()
        assert apart < 1e-4, f"{name}: {apart}"


def test_a_system_that_does_other_updates_than_it_was_to_is_no_measurement(task):
    with pytest.raises(RuntimeError, match="2 updates saw"):
        systems.measure(replace(task, system="2023", records=8))


def test_the_command_prints_a_table_and_writes_the_rows(records, tmp_path):
    options = ["--models", "embedded", "--records", records, "--updates", 2, "--repeats", 1, "--dtype", "float32"]
    options += ["--systems", "dolly", "trl-packed", "--json", tmp_path / "rows.json"]
    result = run("-m", "benchmarks.training", *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["system"] for row in rows] == ["dolly", "trl-packed"]
    for row in rows:
        assert (row["model"], row["device"], row["threads"], row["dtype"]) == ("embedded", "cpu", 1, "float32")
        assert all(row[name] > 0 for name in FIGURES)
        assert f"| embedded | {row['system']} | {row['tokens_per_second']:,.0f} |" in result.stdout
        assert row["heldout_loss"] == pytest.approx(rows[0]["heldout_loss"], rel=0.02)
    assert "embedded: Dolly is" in result.stdout and "trl 1." in result.stdout and "1 thread" in result.stdout
    assert "round 1 of 1, embedded, trl-packed" in result.stderr


def test_a_system_that_fails_is_shown_with_its_reason(task, tmp_path):
    parts = json.loads((tmp_path / "documents.json").read_text())
    parts["training"] = [[[9] * 20, [0] * 10 + [1] * 10]] * 16  # no response key among them
    (tmp_path / "documents.json").write_text(json.dumps(parts))
    rounds = [training.run(asdict(task) | {"system": "2023"}, tmp_path)]
    row = {"system": "2023", "model": "embedded", "device": "cpu", **training.medians(rounds)}
    assert row["tokens_per_second"] is None and row["error"].startswith("RuntimeError: Could not find response key")
    done = {"tokens_per_second": 9.0, "tokens_per_cpu_second": 8.0, "peak_gib": 1.0, "heldout_loss": 2.0}
    rows = [row | done | {"system": "dolly"}, row]
    del rows[0]["error"]
    assert training.table(rows)[2:] == [
        "| embedded | dolly | 9 | 8 | 1.00 | 2.0000 |",
        f"| embedded | 2023 | failed: {row['error']} |  |  |  |",
    ]
    assert training.ratios(rows) == []


def test_the_ratios_are_to_2023_and_to_the_faster_of_trl():
    speeds = {"dolly": 40, "2023": 10, "trl-padded": 20, "trl-packed": 16}
    rows = [
        {"system": name, "model": "m", "tokens_per_second": speed, "tokens_per_cpu_second": speed * 2}
        for name, speed in speeds.items()
    ]
    said = "m: Dolly is 4.00 times 2023 (4.00 by CPU time), 2.00 times trl-padded (2.00 by CPU time)"
    assert training.ratios(rows) == [said]


def test_too_few_records_and_bad_options_are_told(records, tmp_path, capsys):
    with pytest.raises(UserError, match="does not make 9 updates"):
        training.prepare(str(records), 512, 9, 32, tmp_path / "documents.json")
    for bad in (["--updates", "1"], ["--models", "gpt-j-6b"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            training.parse(bad)
        assert bad[0].strip("-")[:-1] in capsys.readouterr().err
