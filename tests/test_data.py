"""The embedded data: the records, the prompts that the chat offers, and what their cards and NOTICE say about them."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from statistics import median_low

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from dolly.prompt import user_text
from dolly.records import read_records

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    with (DATA / "instructions.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def categories() -> list[dict]:
    return yaml.safe_load((DATA / "examples.yaml").read_text(encoding="utf-8"))["categories"]


def asked(record: dict) -> list[str]:
    return said(record, "user") if "messages" in record else [record["instruction"], *filter(None, [record["context"]])]


def answered(record: dict) -> list[str]:
    return said(record, "assistant") if "messages" in record else [record["response"]]


def said(record: dict, role: str) -> list[str]:
    return [turn["content"] for turn in record["messages"] if turn["role"] == role]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def grams(text: str) -> set[tuple[str, ...]]:
    """All three words in a row; a text of fewer is one gram."""
    found = words(text)
    return {tuple(found[start : start + 3]) for start in range(max(1, len(found) - 2))}


def table(card: Path, first: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column is called `first`."""
    _, _, below = card.read_text(encoding="utf-8").partition(f"\n| {first} |")
    rows = below.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_record_has_one_of_the_two_schemas(records):
    for line, record in enumerate(records, 1):
        where = f"line {line}"
        if "messages" in record:
            turns = record["messages"]
            assert set(record) == {"messages", "category"}, where
            assert turns and all(set(turn) == {"role", "content"} for turn in turns), where
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2), where
        else:
            assert set(record) == {"instruction", "context", "response", "category"}, where
            assert isinstance(record["context"], str), where
        texts = [*asked(record), *answered(record), record["category"]]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), where


def test_no_record_spells_a_control_token(records):
    assert not [line for line, r in enumerate(records, 1) if "### " in " ".join([*asked(r), *answered(r)])]


def test_no_record_is_there_twice(records):
    times = Counter(tuple(tuple(words(text)) for text in asked(record)) for record in records)
    assert not [" ".join(key[0]) for key, number in times.items() if number > 1]


def test_card_counts_the_records(records):
    def row(name: str, chosen: list[dict]) -> list[str]:
        told = [turn for r in chosen for turn in (asked(r) if "messages" in r else [r["instruction"]])]
        answers = [len(answer.split()) for r in chosen for answer in answered(r)]
        with_context = sum(bool(r.get("context")) for r in chosen)
        instruction = median_low(len(turn.split()) for turn in told)
        return [name, *map(str, [len(chosen), with_context, instruction, median_low(answers), max(answers)])]

    names = dict.fromkeys(record["category"] for record in records)
    expected = [row(name, [record for record in records if record["category"] == name]) for name in names]
    assert table(DATA / "README.md", "category") == [*expected, row("all", records)]

    card = (DATA / "README.md").read_text(encoding="utf-8")
    conversations = sum("messages" in record for record in records)
    assert f"`instructions.jsonl` holds {len(records):,} records" in card
    assert f"{len(records) - conversations:,} are one instruction" in card
    assert f"{conversations} are conversations" in card


def test_card_shows_records_of_both_forms(records):
    shown = re.findall(r"```json\n(.*?)```", (DATA / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = [json.loads(text) for text in shown]
    assert ["messages" in record for record in shown] == [False, True]
    assert all(record in records for record in shown)


def test_the_composed_records_are_whole_and_share_no_phrase_with_the_prompts_of_the_benchmark(records):
    composed, broken = read_records(str(DATA / "composed.jsonl"))
    assert not broken
    assert f"{len(composed):,} requests and answers" in (DATA / "README.md").read_text(encoding="utf-8")
    lines = (ROOT / "benchmarks/quality/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {gram for line in lines for gram in fives(json.loads(line)["prompt"])}
    for record in composed:
        asked, answer = (message["content"] for message in record.messages)
        assert not re.search(r"[\[\]{}|]|\(n\)|###", asked + answer), asked
        assert not fives(asked) & prompts, asked


def fives(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[at:] for at in range(5)), strict=False))


def test_front_matter_is_what_the_hub_reads():
    data = DatasetCard.load(DATA / "README.md").data
    assert (data.license, data.language, data.task_categories) == ("cc-by-4.0", ["en"], ["text-generation"])
    assert [(DATA / config["data_files"]).is_file() for config in data.configs] == [True]
    base = ModelCard.load(DATA / "base/README.md").data
    assert (base.license, base.library_name, base.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")


def test_every_source_of_the_base_is_credited_with_its_licence():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    sources = {f"{source} ({licence})" for source, _, licence in table(DATA / "base/README.md", "source")}
    assert len(sources) > 20
    assert sources == set(re.findall(r"^(\S.* \(.+\))\n    \S", notice, re.MULTILINE))


def test_examples_are_well_formed(categories):
    assert all(set(category) == {"name", "icon", "prompts"} for category in categories)
    names = [category["name"] for category in categories]
    assert 7 <= len(names) == len(set(names)) <= 8
    assert all([unicodedata.category(char) for char in category["icon"]] == ["So"] for category in categories)
    prompts = [prompt for category in categories for prompt in category["prompts"]]
    assert prompts[0] == "Write a tweet announcing a new bakery."
    assert len(set(prompts)) == len(prompts) == 4 * len(categories)
    for prompt in prompts:
        parts = prompt.split("\n\nInput:\n")
        assert all(parts) and "Input:" not in "".join(parts), prompt
        assert user_text(*parts) == prompt


def test_no_example_is_close_to_a_record(categories, records):
    known = {text: grams(text) for record in records for text in asked(record)}
    for part in (part for c in categories for prompt in c["prompts"] for part in prompt.split("\n\nInput:\n")):
        own = grams(part)
        close = [text for text, other in known.items() if len(own & other) / len(own | other) >= 0.3]  # Jaccard
        assert not close, part


def test_the_card_of_the_base_has_every_figure_filled_in():
    assert "{{" not in (ROOT / "data" / "base" / "README.md").read_text(encoding="utf-8")
