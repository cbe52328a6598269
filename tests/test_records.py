"""Reading records: every known form, every mistake named by its line, nothing lost; the split."""

import json
import random

import pandas
import pytest

from dolly.errors import UserError
from dolly.records import SUFFIXES, Record, explain, read_records, split, unlike

GOOD = {"instruction": "Name a fruit.", "context": "", "response": "The apple.", "category": "open_qa"}
TURNS = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "The apple."}]

PART = {"type": "text"}


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"instruction": "Name a fruit.", "input": "", "output": "The apple."},
        {"prompt": "Name a fruit.", "completion": " The apple."},
        {"question": "Name a fruit.", "answer": "The apple.", "id": 7},
        {"messages": TURNS},
        {"messages": [TURNS[0] | {"content": [PART | {"text": "Name "}, PART | {"text": "a fruit."}]}, TURNS[1]]},
        {"conversations": [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "The apple."}]},
    ],
)
def test_the_known_forms_read_alike(tmp_path, row):
    records, problems = read_records(write(tmp_path / "x.jsonl", row))
    assert not problems
    assert records[0].messages == TURNS


def test_the_context_follows_the_instruction(tmp_path):
    records, _ = read_records(write(tmp_path / "x.jsonl", GOOD | {"context": "Apple, pear."}))
    assert records[0].messages[0]["content"] == "Name a fruit.\n\nInput:\nApple, pear."


def test_csv_parquet_and_json_lists_read_alike(tmp_path):
    rows = [GOOD, GOOD | {"instruction": 'Quote "this",\nplease.', "context": "é 🙂"}]
    pandas.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    wanted = [r.messages for r in read_records(write(tmp_path / "x.jsonl", *rows))[0]]
    for name in ("x.csv", "x.parquet", "x.json"):
        records, problems = read_records(str(tmp_path / name))
        assert not problems
        assert [record.messages for record in records] == wanted, name


def test_a_plain_text_keeps_its_white_space_and_stands_beside_conversations_in_every_kind_of_file(tmp_path):
    text = {"text": "  One day,\n\nsaid the fox. \n", "category": "tale"}
    write(tmp_path / "x.jsonl", text, GOOD)
    (tmp_path / "x.json").write_text(json.dumps([text, GOOD]))
    table = pandas.DataFrame([text, GOOD])  # the columns of both, nothing where a row has none
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet"):
        records, problems = read_records(str(tmp_path / name))
        assert not problems, name
        assert [(r.text, r.messages, r.category) for r in records] == [
            (text["text"], [], "tale"),
            (None, TURNS, "open_qa"),
        ], name


def test_a_text_beside_another_form_is_not_read(tmp_path):
    """As in Alpaca's data set, whose `text` is the whole prompt with the answer."""
    records, _ = read_records(write(tmp_path / "x.jsonl", GOOD | {"text": "a"}, {"messages": TURNS, "text": "a"}))
    assert [(record.messages, record.text) for record in records] == [(TURNS, None)] * 2
    assert not read_records(write(tmp_path / "x.jsonl", {"prompt": "a", "text": "b"}))[0]


def test_a_txt_file_is_one_text(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffÉté.\n\n  Two\n".encode())
    assert read_records(str(tmp_path / "x.txt")) == ([Record([], "", 1, "Été.\n\n  Two\n")], [])


def test_every_mistake_is_named_by_its_line_and_nothing_is_lost(tmp_path):
    path = tmp_path / "x.jsonl"
    bad = {
        2: '{"instruction": "a", ',
        3: json.dumps(GOOD | {"response": "  "}),
        4: json.dumps(GOOD | {"instruction": None}),
        5: json.dumps(GOOD | {"response": 7}),
        6: "[1, 2]",
        7: json.dumps({"instruction": "a"}),
        9: json.dumps({"messages": TURNS[:1]}),
        10: json.dumps({"messages": [*TURNS, *TURNS[1:]]}),
        11: json.dumps({"messages": "hello"}),
        12: "[" * 100_000,
    }
    lines = [bad.get(number, "" if number == 8 else json.dumps(GOOD)) for number in range(1, 14)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b'\n{"instruction": "caf\xe9"}\n')
    records, problems = read_records(str(path))
    assert [record.line for record in records] == [1, 13]
    assert [problem.line for problem in problems] == [*bad, 14]
    said = {problem.line: problem.what for problem in problems}
    assert "not valid JSON" in said[2] and "column" in said[2]
    assert said[3] == '"response" is empty'
    assert said[4] == '"instruction" is empty'
    assert said[5] == '"response" is not text'
    assert "columns: instruction" in said[7]
    assert "alternate" in said[9]
    assert "UTF-8" in said[14]
    paragraph = explain(problems, "x.jsonl", 13, "Mend them.")
    assert "x.jsonl: 11 of 13 records" in paragraph and 'line 3: "response" is empty' in paragraph


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "There is no file"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n \n", "is empty"),
        ("notes.pdf", "hello", "Dolly reads .jsonl"),
        ("empty.txt", " \n", "is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("one.json", "{}", "not a list of records"),
        ("broken.json", "[{]", "not valid JSON"),
        ("fake.parquet", "PAR", "not a Parquet file"),
        ("quotes.csv", 'instruction,response\na,b\n"c" d,e\nf,g\n', "line 3: not valid CSV"),
        ("latin.csv", b"instruction,response\na,caf\xe9\n", "not UTF-8"),
        ("rows.jsonl.GZ", "x", "unpack it first"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        read_records(str(tmp_path / name))


def test_a_folder_is_no_file_of_records(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_records(str(tmp_path))


def test_an_empty_name_of_the_data_is_explained():
    with pytest.raises(UserError, match="name of the data is empty"):
        read_records("")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_the_system_does_not_read_is_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.symlink_to("/proc/self/mem")  # a regular file whose first page nobody may read, the superuser included
    with pytest.raises(UserError, match=rf"x\{suffix} "):
        read_records(str(path))


def test_a_damaged_page_of_parquet_is_told(tmp_path):
    path = tmp_path / "x.parquet"
    pandas.DataFrame([GOOD] * 100).to_parquet(path)
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 8 + path.read_bytes()[12:])
    with pytest.raises(UserError, match=r"x\.parquet cannot be read"):
        read_records(str(path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD | {"response": "b \ud800"}, '"response" holds half a character (a lone surrogate)'),
        (GOOD | {"context": "\udfff"}, '"context" holds half a character (a lone surrogate)'),
        (GOOD | {"category": "\ud800"}, '"category" holds half a character (a lone surrogate)'),
        (GOOD | {"category": 7}, '"category" is not text'),
        ({"text": " \n"}, '"text" is empty'),
        ({"text": None, "response": ""}, '"text" is empty'),
        ({"text": ["a"]}, '"text" is not text'),
        ({"text": "a\ud800"}, '"text" holds half a character (a lone surrogate)'),
        ({"\ud800": 1}, "no column for the instruction (columns: \\ud800)"),
        ({"messages": [{"role": ["user"], "content": "a"}, TURNS[1]]}, '"role of turn 1" is not text'),
        ({"messages": [TURNS[0], {"role": {}, "content": "a"}]}, '"role of turn 2" is not text'),
        ({"messages": [{"content": "a"}, TURNS[1]]}, 'the turns of "messages" do not alternate'),
        ({"messages": [TURNS[0] | {"content": [{"type": "image"}]}, TURNS[1]]}, '"content of turn 1" has a part'),
        ({"messages": [TURNS[0] | {"content": ["a"]}, TURNS[1]]}, '"content of turn 1" has a part'),
        ({"messages": [TURNS[0] | {"content": []}, TURNS[1]]}, '"content of turn 1" is empty'),
    ],
)
def test_an_odd_value_is_a_problem_of_its_record(tmp_path, row, said):
    records, [problem] = read_records(write(tmp_path / "x.jsonl", row))
    assert not records
    assert problem.what.startswith(said)


def test_a_category_may_be_absent(tmp_path):
    rows = [GOOD | {"category": None}, {"prompt": "a", "answer": "b"}]
    records, problems = read_records(write(tmp_path / "x.jsonl", *rows))
    assert [record.category for record in records] == ["", ""] and not problems


@pytest.mark.parametrize("separator", [";", "\t"])
def test_another_separator_of_columns_is_hinted_at(tmp_path, separator):
    path = tmp_path / "x.csv"
    path.write_text(f"instruction{separator}response\na{separator}b\n")
    [problem] = read_records(str(path))[1]
    assert "separate the columns by commas" in problem.what


def test_a_suffix_may_be_in_capitals(tmp_path):
    assert len(read_records(write(tmp_path / "X.JSONL", GOOD))[0]) == 1


def questions(*texts):
    return [
        Record([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}], "", line)
        for line, text in enumerate(texts, 1)
    ]


def test_the_split_keeps_its_sides_when_records_are_added_or_moved():
    old = questions(*(f"Question number {i}?" for i in range(400)))
    new = questions(*(f"Another one, {i}." for i in range(400)))
    held = {r.messages[0]["content"] for r in split(old, 0.05)[1]}
    held_later = {r.messages[0]["content"] for r in split([*new, *reversed(old)], 0.05)[1]}
    assert 8 <= len(held) <= 36
    assert held == {text for text in held_later if text.startswith("Question")}


def test_equal_questions_stay_on_one_side():
    records = questions(*(f"Question number {i}?" for i in range(100)), *(f"question NUMBER {i}" for i in range(100)))
    training, heldout = split(records, 0.1)
    normal = [{r.messages[0]["content"].lower().strip("?") for r in part} for part in (training, heldout)]
    assert heldout and not normal[0] & normal[1]


WORDS = [f"word{n}" for n in range(20)]


def test_near_duplicates_stay_on_one_side():
    chance = random.Random(0)
    told = [" ".join(chance.choices(WORDS, k=20)) for _ in range(200)]
    records = questions(*(f"Tell me of {text}." for text in told), *(f"Please say: {text}." for text in told))
    parts = split(records, 0.1)
    sides = [{record.line % 200 for record in part} for part in parts]
    assert 5 <= len(sides[1]) <= 40 and not sides[0] & sides[1]


def test_records_that_are_all_of_one_form_are_split_like_others():
    records = questions(*(f"What does the shop at the corner of street {n} sell on Sundays?" for n in range(2000)))
    assert 60 <= len(split(records, 0.05)[1]) <= 140


def test_texts_are_split_too_and_equal_ones_stay_on_one_side():
    texts = [f"Chapter {i}. It was\na dark night." for i in range(100)]
    texts += [f"CHAPTER {i}: it was a dark night" for i in range(100)]
    records = [Record([], "", line, text) for line, text in enumerate(texts)]
    parts = split([*records, *questions("a", "b")], 0.1)
    sides = [{record.line % 100 for record in part if record.text} for part in parts]
    assert sides[1] and not sides[0] & sides[1]
    assert sum(map(len, parts)) == 202


def test_a_small_file_is_split_too_and_one_question_is_all_for_training():
    assert [len(part) for part in split(questions("a", "b", "c"), 0.05)] == [2, 1]
    assert [len(part) for part in split(questions("a"), 0.05)] == [1, 0]
    assert [len(part) for part in split(questions("a", "b"), 0.0)] == [2, 0]
    assert split([], 0.05) == ([], [])


def test_a_csv_row_with_surplus_fields_is_a_problem_and_an_index_column_is_not(tmp_path):
    (tmp_path / "x.csv").write_text(",instruction,response\n0,Name a fruit.,The apple.\n1,Two, three,four\n")
    records, problems = read_records(str(tmp_path / "x.csv"))
    assert [record.messages for record in records] == [TURNS]
    assert [(problem.line, problem.what[:16]) for problem in problems] == [(3, "more fields than")]


def test_a_csv_row_is_named_by_the_line_it_begins_in(tmp_path):
    (tmp_path / "x.csv").write_text('instruction,response\n"a\nb\nc","d\r\ne"\n\nf,g\n"h\n",\n', newline="")
    records, problems = read_records(str(tmp_path / "x.csv"))
    assert [record.line for record in records] == [2, 7]
    assert [problem.line for problem in problems] == [8]


def test_of_a_parquet_file_only_the_columns_of_records_are_read(tmp_path):
    table = pandas.DataFrame([GOOD | {"when": pandas.Timestamp.max, "vector": [0.5] * 100}] * 3)
    table["when"] = table["when"].astype("datetime64[ns]")
    table.to_parquet(tmp_path / "x.parquet")
    assert len(read_records(str(tmp_path / "x.parquet"))[0]) == 3
    table[["vector"]].to_parquet(tmp_path / "y.parquet")
    assert [p.what for p in read_records(str(tmp_path / "y.parquet"))[1]] == [
        "no column for the instruction (columns: vector)"
    ] * 3


def test_a_text_of_characters_without_width_is_empty(tmp_path):
    assert "is empty" in read_records(write(tmp_path / "x.jsonl", GOOD | {"response": "\u200b \ufeff"}))[1][0].what


def test_records_like_held_out_ones_are_found():
    def made(question, answer):
        return Record([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "", 1)

    heldout = [made("Who feeds the old grey horse on the hill in winter?", "The boy from the mill does it every day.")]
    same = made("who feeds the old grey horse on the hill in winter", "Nobody.")
    near = made(
        "Who feeds the old grey horse on the hill in the winter?", "The boy from the mill does it every single day."
    )
    other = made("Where do the geese sleep?", "In the reeds.")
    assert unlike([same, other, near], heldout) == [other]
