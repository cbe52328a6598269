"""The model card: what the Hub reads of it, and what a person does."""

import ast
import re
from collections import Counter
from dataclasses import asdict, replace

from huggingface_hub import ModelCard

from dolly.config import TrainConfig
from dolly.report import CardFacts, model_card

FACTS = CardFacts(
    name="acme/helper",
    base="EleutherAI/pythia-70m",
    license="apache-2.0",
    data="records.jsonl",
    train_records=14_200,
    validation_records=750,
    settings=asdict(TrainConfig(learning_rate=3e-4)),
    steps=1_200,
    tokens=3_400_000,
    seconds=4_000,
    hardware="2 CPU cores",
    dtype="bfloat16",
    heldout_before=4.1,
    heldout_after=2.3,
    dropped=Counter({"longer than 1024 tokens": 7, "empty answer": 2}),
    categories=Counter({"open_qa": 4_000, "brainstorming": 1_700}),
    history=[
        {"step": 0, "heldout": 4.1},
        *({"step": 10 * i, "loss": float(i), "learning_rate": 1e-5} for i in range(1, 38)),
        {"step": 197, "heldout": 3.25},
        {"step": 370, "heldout": 2.3},
    ],
    samples=[{"prompt": "Name a tool.", "before": "```\n## no heading\n", "after": "| A hammer."}],
    examples={"Tweets": 'Write a "tweet".', "Letters": "Write a letter to my cat."},
)


def load(text: str, folder) -> ModelCard:
    """The card as the Hub's own library reads it from a file."""
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def rows_below(text: str, head: str) -> list[list[str]]:
    """The cells of the table that starts with the line `head`."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_hub_reads_the_front_matter(tmp_path):
    data = load(model_card(FACTS), tmp_path).data
    assert (data.base_model, data.base_model_relation) == ("EleutherAI/pythia-70m", "finetune")
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"conversational", "dolly"} <= set(data.tags)
    assert data.widget[0] == {
        "example_title": "Tweets",
        "messages": [{"role": "user", "content": 'Write a "tweet".'}],
    }
    assert data.model_name == "helper"
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (2.3, "records.jsonl", "validation")


def test_a_hub_data_set_is_named_as_one(tmp_path):
    card = load(model_card(replace(FACTS, data="databricks/databricks-dolly-15k")), tmp_path)
    assert card.data.datasets == ["databricks/databricks-dolly-15k"]
    assert "https://huggingface.co/datasets/databricks/databricks-dolly-15k" in card.text


def test_the_body_tells_data_training_and_results():
    text = model_card(FACTS)
    assert re.findall(r"^#+ .*$", text, re.MULTILINE)[:7] == [
        "# helper",
        "## How to use it",
        "# A question or a task, as plain text ...",
        "# ... or a conversation.",
        "## What it learned from",
        "## How it was trained",
        "## Before and after",
    ]
    assert text.index("## Before and after") < text.index("## Limits")
    assert rows_below(text, "| reason") == [["longer than 1024 tokens", "7"], ["empty answer", "2"]]
    assert rows_below(text, "| category") == [["open_qa", "4,000"], ["brainstorming", "1,700"]]
    assert rows_below(text, "| fine-tuning") == [["before", "4.100", "60.34"], ["after", "2.300", "9.97"]]
    assert ["learning_rate", "0.0003"] in rows_below(text, "| setting")
    assert (
        "1,200 updates on 3,400,000 tokens, 850 a second; 1 h 6 min on 2 CPU cores, matrix products in bfloat16" in text
    )
    assert "750 held out" in text


def test_a_long_tail_of_reasons_becomes_one_row():
    dropped = Counter({f"not valid JSON (column {i})": 1 for i in range(30)}) + Counter({"empty answer": 5})
    rows = rows_below(model_card(replace(FACTS, dropped=dropped)), "| reason")
    assert (len(rows), rows[0], rows[-1]) == (21, ["empty answer", "5"], ["others", "11"])


def test_the_curve_is_a_picture_beside_the_card():
    assert "(training-curve.png)" in model_card(FACTS)
    assert "(training-curve.png)" not in model_card(replace(FACTS, history=[]))


def test_answers_stand_in_it_unedited():
    text = model_card(FACTS)
    assert "````text\n```\n## no heading\n\n````" in text
    assert "```text\n| A hammer.\n```" in text


def test_the_code_can_be_run_whatever_the_prompts_are():
    for prompts in ({"a": 'Say "hi"', "b": "two\nlines", "c": "back\\slash"}, {}):
        text = model_card(replace(FACTS, examples=prompts))
        calls = ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
        assert "Write a tweet announcing a new bakery." in ast.dump(calls)
    assert 'dolly("Write a letter to my cat."' in model_card(FACTS)


def test_no_folder_of_this_machine_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/base").mkdir(parents=True)
    (tmp_path / "data/mine.jsonl").touch()
    for base, data in ((tmp_path / "data/base", tmp_path / "data/mine.jsonl"), ("data/base", "data/mine.jsonl")):
        settings = asdict(TrainConfig(base=str(base), data=str(data), output=str(tmp_path / "out")))
        text = model_card(replace(FACTS, base=str(base), data=str(data), settings=settings))
        card = load(text, tmp_path)
        assert card.data.base_model is None
        assert card.data.datasets is None
        assert str(tmp_path) not in text
        assert "data/base" not in text
        assert "An assistant: `base`" in text
        assert "`mine.jsonl`: 14,200 records" in text


def test_what_is_not_known_leaves_no_trace(tmp_path):
    unknown = {"heldout_before": None, "heldout_after": None, "license": None, "settings": {}}
    empty = {"dropped": Counter(), "categories": Counter(), "history": [], "samples": [], "examples": {}}
    text = model_card(replace(FACTS, name="helper", **unknown, **empty))
    data = load(text, tmp_path).data
    assert (data.license, data.eval_results, data.get("widget")) == (None, None, None)
    assert "None" not in text
    assert "Before and after" not in text
    assert "|" not in text
    assert "No licence is stated" in text
    assert 'model="helper")  # the path of this folder, or its id on the Hub' in text


def test_a_model_of_plain_texts_is_not_called_an_assistant(tmp_path):
    text = model_card(replace(FACTS, assistant=False, samples=[]))
    assert "plain texts" in text and "assistant" not in text.lower()
    assert "train.py --base acme/helper" in text
    data = load(text, tmp_path).data
    assert "widget" not in data.to_dict() and "conversational" not in data.tags


def test_extra_data_is_named_without_its_folder(tmp_path):
    settings = FACTS.settings | {"extra_data": str(tmp_path / "general.jsonl")}
    text = model_card(replace(FACTS, settings=settings))
    assert "and, nothing of it held out, `general.jsonl`: " in text and str(tmp_path) not in text
    found = load(model_card(replace(FACTS, data="me/one", settings=settings | {"extra_data": "me/two"})), tmp_path)
    assert found.data.datasets == ["me/one", "me/two"]
