"""The data doctor: every kind of fault at its line and nothing else, in the terminal, in JSON, and as a page."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dolly.doctor import KINDS, examine
from dolly.doctor_report import as_html, as_json
from dolly.errors import UserError
from dolly.faults import lacks_end, looks_cut, repeats
from dolly.language import language
from dolly.records import read_records

FUZZED = int(os.environ.get("DOLLY_FUZZ", "500"))  # files of each kind; 10,000 of all three take 80 seconds

GOOD = [
    ("Name a fruit that keeps well.", "The apple keeps for months in a cool cellar."),
    ("How do I get wax off a table cloth?", "Freeze it, break the wax off, then iron the rest into brown paper."),
    ("Why is the sea salt?", "Rivers wash salts out of the rocks and carry them to the sea, where they stay."),
    ("Which month has 28 days?", "All of them have at least 28. February has no more in most years."),
    ("Write a short thank-you note to my aunt.", "Dear aunt Vera,\n\nThe socks fit. Thank you!\n\nLove,\nPaul"),
    ("List three round things.", "- a ball\n- a coin\n- the full moon over a quiet lake in the hills"),
]
# What is wrong with a record, and the record.
PLANTED = [
    ("unreadable", '{"instruction": "Cut off'),
    ("unreadable", {"instruction": "No answer here."}),
    ("empty", {"instruction": "Say something.", "response": "  "}),
    ("too long", {"instruction": "Write much.", "response": "Words upon words, and so on. " * 60}),
    ("duplicate", {"instruction": GOOD[1][0], "response": GOOD[1][1]}),
    ("near-duplicate", {"instruction": GOOD[2][0], "response": GOOD[2][1].replace("stay", "all stay")}),
    ("cut off", {"instruction": "Plan my day.", "response": "Get up early. Then go for a walk in the"}),
    ("cut off", {"instruction": "Show a loop.", "response": "```python\nfor x in y: print(x)"}),
    (
        "no full stop",
        {"instruction": "What next?", "response": "Wait a day. Then ask your neighbour whether he has seen it"},
    ),
    ("echo", {"instruction": "What is the tallest tree?", "response": "What is the tallest tree? A redwood is."}),
    ("control token", {"instruction": "Say hi.", "response": "Hi there, my friend.\n\n### End"}),
    ("control token", {"instruction": "Greet me.", "response": "Good morning to you.<|im_end|>"}),
    ("personal data", {"instruction": "Whom do I ask?", "response": "Write to jane.roe@mailbox.net about it."}),
    ("personal data", {"instruction": "Whom do I call?", "response": "Call the porter on +44 20 7946 0123 first."}),
    ("personal data", {"instruction": "How do I pay?", "response": "They noted 4539 1488 0343 6467 on paper."}),
    (
        "secret",
        {"instruction": "How do I log in?", "response": "With hf_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH, as always."},
    ),
    ("secret", {"instruction": "Which key is it?", "response": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow=="}),
    ("encoding", {"instruction": "Where do we meet?", "response": "At the cafÃ© on the corner."}),
    ("encoding", {"instruction": "Who comes along?", "response": "Fish &amp; Chips, the band."}),
    ("encoding", {"instruction": "What was lost?", "response": "One letter of na\ufffdve was lost."}),
    ("leftover", {"instruction": "Where is it from?", "response": "It was built in the north in 1890.[3] It stands."}),
    ("leftover", {"instruction": "Do you sleep?", "response": "As an AI language model, I do not sleep."}),
    ("placeholder", {"instruction": "Sign my card.", "response": "With much love from [Your Name]."}),
    (
        "language",
        {"instruction": "Sag etwas.", "response": "Das ist nicht der Anfang, und es ist auch nicht das Ende."},
    ),
]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def good() -> list[dict]:
    rows = [
        {"instruction": prompt, "context": "", "response": answer, "category": "open_qa"} for prompt, answer in GOOD
    ]
    return rows + [{"messages": [{"role": "user", "content": "And what is the smallest bird, then?"},
                                 {"role": "assistant", "content": "The bee hummingbird of Cuba."}]}]  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    rows = good()
    rows += [row if isinstance(row, str) else row | {"category": "planted"} for _, row in PLANTED]
    return write(tmp_path_factory.mktemp("doctor") / "planted.jsonl", rows)


def wanted() -> dict[str, list[int]]:
    lines = {kind: [] for kind in KINDS}
    for line, (kind, _) in enumerate(PLANTED, len(good()) + 1):
        lines[kind].append(line)
    return lines


def test_every_planted_fault_is_found_at_its_line_and_nothing_else(planted):
    found = examine(planted, 256, lambda records: [len(r.messages[-1]["content"]) // 4 for r in records])
    assert found.found == wanted()
    assert found.count("error") == 6 and found.count("warning") == len(PLANTED) - 6
    assert found.records == len(good()) + len(PLANTED) - 3
    assert found.over == {256: 1, 1024: 0, 2048: 0, 4096: 0, 8192: 0}  # by the count above


def test_good_records_are_clean(tmp_path):
    found = examine(write(tmp_path / "good.jsonl", good()))
    assert not any(found.found.values())
    assert found.languages["English"] >= 5 and found.categories == {"open_qa": 6, "": 1}


def test_a_record_that_is_in_the_validation_file_too_is_a_leak(tmp_path):
    rows = good()
    other = [rows[0] | {"response": "The pear, though not for long."}, rows[2] | {"instruction": "Why is sea salt?"}]
    found = examine(write(tmp_path / "a.jsonl", rows), against=write(tmp_path / "b.jsonl", other))
    assert found.found["leak"] == [1, 3]


def test_several_questions_about_one_text_are_no_duplicates(tmp_path):
    passage = "The lighthouse was built of granite in 1860 and is as high as a house of nine floors. " * 3
    rows = [
        {"instruction": "How high is it?", "context": passage, "response": "As high as a house of nine floors."},
        {
            "instruction": "When was the tower of the lighthouse built, please?",
            "context": passage,
            "response": "It was built in 1860.",
        },
        {
            "instruction": "When was the tower of the lighthouse built?",
            "context": passage,
            "response": "It was built in 1860.",
        },
    ]
    found = examine(write(tmp_path / "a.jsonl", rows))
    assert found.found["near-duplicate"] == [3]


def test_many_records_that_begin_alike_are_told(tmp_path):
    rows = [
        {"instruction": f"Write a tweet about {n} {'very ' * (n % 9)}things", "response": f"Number {n}!"}
        for n in range(120)
    ]
    assert examine(write(tmp_path / "a.jsonl", rows)).monotony == {"write a tweet about": 120}


def test_code_prices_and_markup_are_no_faults(tmp_path):
    answers = [
        "Take values[0], then nums[12], and add them.",
        "Write `<b>bold</b>` and `&amp;` in a page, and `[name]` in a form.",
        "```html\n<p>One &amp; two</p>\n[your name]\n```",
        "Use the package react@18.2.0 here, cloned from git@github.com, and A@B.transpose() there.",
        "The bits are 0000 0000 0000 0101, and the price was 1,299.00 in 2019-2020.",
        "In Python, ages[name] is a look-up, and (?P<name>x) names a group.",
        "They won Super Bowl XXX, and lost the next one.",
        "The line is:\nreturn x + y",
        "Call me maybe: from 9 to 17, on 12/11/2024, for 30 days at most, [as agreed](terms.html).",
        "He lived from 1850 to 1921, in room 100-200-300 of the archive, shelf 12345678901234567.",
        "AMANHÃ\u201d is what the poster said in capitals.",
    ]
    rows = [{"instruction": f"Tell me about thing {n}.", "response": answer} for n, answer in enumerate(answers)]
    assert {k: v for k, v in examine(write(tmp_path / "a.jsonl", rows)).found.items() if v} == {}


def test_a_long_run_of_letters_takes_no_time_and_no_conversation_counts_twice(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "Go on."), ("assistant", "He went to the"))]
    rows = [{"instruction": "Decode it @ once.", "response": "QUJD" * 250_000 + " is it."}, {"messages": turns * 3}]
    assert {k: v for k, v in examine(write(tmp_path / "a.jsonl", rows)).found.items() if v} == {"cut off": [2]}


def test_one_question_about_several_texts_is_no_duplicate(tmp_path):
    ask = "Classify the mood of this review of our restaurant as good, bad or mixed, and answer with one word only."
    rows = [{"instruction": ask, "context": text, "response": "Good"} for text in ("Fine soup!", "We loved the cake.")]
    assert examine(write(tmp_path / "a.jsonl", rows)).found["near-duplicate"] == []


def test_where_no_language_is_that_of_most_none_is_strange(tmp_path):
    told = ["The cat is on the mat.", "Der Hund ist nicht hier.", "Le chat est dans la maison.", "Кошка спит, да"]
    rows = [{"instruction": f"{n}?", "response": text} for n, text in enumerate(told * 5)]
    assert examine(write(tmp_path / "a.jsonl", rows)).found["language"] == []


def test_a_validation_file_that_cannot_be_read_is_told(tmp_path):
    good_file = write(tmp_path / "a.jsonl", good())
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        examine(good_file, against=write(tmp_path / "b.jsonl", ["{"]))
    with pytest.raises(UserError, match="is empty"):
        examine(good_file, against=write(tmp_path / "c.jsonl", []))


def test_what_a_record_says_does_not_reach_the_terminal_as_a_command(tmp_path):
    rows = [{"instruction": "Say \u001b[31mred\u001b]0;x\u0007 🙂", "response": "As an AI, \u001b[2J no."}]
    file = write(tmp_path / "x.jsonl", rows)
    done = run("-m", "dolly", "check", file, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\\x1b" in done.stdout and "\\U0001f642" in done.stdout


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        ("Kind regards,\nMaria Schmidt of the house next door", False),
        ("A single line without any full stop at its end", False),
        ("We are open again. Come and see us this Saturday at ten #bakery", False),
        ("Two things. First wash it well under cold water, then", True),
        ("Two things. First wash it well under the cold water and", True),
        ("Dear all,\nI am late.\nWith love from all of us on the third floor", False),
        ("It was late. The old man took his hat and went out into the dark", True),
        ("He said: \"It is late. Let us go home, all of us, right now.\"", False),
        ("One. Two.\n- three apples, four pears, a melon and the last of the plums", False),
    ],
)  # fmt: skip
def test_an_answer_that_stops_within_a_sentence_looks_cut(answer, cut):
    assert (looks_cut(answer) or lacks_end(answer)) == cut


def test_an_echo_is_the_first_line_of_the_prompt():
    assert repeats("What is the oldest city?\n\nInput:\nRome", "what is the oldest city: Rome")
    assert repeats("Repeat", "Repeat!")
    assert not repeats("Name it", "Name it and you have power over it.")
    assert not repeats("What is the oldest city?", "The oldest city is Jericho.")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The cat is on the mat and it sleeps.", "English"), ("Der Hund ist nicht hier.", "German"),
        ("Le chat est dans la maison.", "French"), ("¿Cómo está el perro de los niños?", "Spanish"),
        ("Il gatto è sul tavolo della cucina.", "Italian"), ("O gato não está em casa.", "Portuguese"),
        ("Кошка спит", "Cyrillic"), ("猫が好きです", "Japanese"), ("我喜欢猫", "Chinese"), ("Wagga", None), ("", None),
    ],
)  # fmt: skip
def test_languages(text, name):
    assert language(text) == name


def test_the_command_tells_all_and_exits_by_what_it_found(planted, tmp_path):
    page, report = tmp_path / "report.html", tmp_path / "report.json"
    done = run("-m", "dolly", "check", planted, "--max-length", 256, "--html", page, "--json", report)
    assert done.returncode == 1, done.stderr
    told = json.loads(report.read_text())
    assert {f["kind"]: f["lines"] for f in told["findings"]} == {k: v for k, v in wanted().items() if v}
    assert "6 errors and 18 warnings" in done.stdout
    for kind in dict(PLANTED):
        assert f": {kind} (" in done.stdout
    assert "<script" not in page.read_text() and "cafÃ©" in page.read_text()

    clean = write(tmp_path / "good.jsonl", good())
    done = run("-m", "dolly", "check", clean, "--json", "-")
    assert done.returncode == 0 and json.loads(done.stdout)["errors"] == 0
    assert "clean: nothing to mend" in done.stderr

    done = run("-m", "dolly", "check", tmp_path / "none.jsonl")
    assert done.returncode == 2 and "There is no file" in done.stderr and "Traceback" not in done.stderr

    for twice in (["--json", page, "--html", page], ["--json", clean]):
        done = run("-m", "dolly", "check", clean, *twice)
        assert done.returncode == 2 and "is given twice" in done.stderr
    assert len(Path(clean).read_text().splitlines()) == len(good())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_and_a_reader_that_left_are_no_tracebacks(tmp_path):
    file = write(tmp_path / "good.jsonl", good())
    for target, told in (("> /dev/full", "No space left"), ("--json - | true", "")):
        command = f"{sys.executable} -m dolly check {file} {target}"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert told in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_page_escapes_what_the_file_says(tmp_path):
    rows = [{"instruction": "<script>alert(1)</script>", "response": "<b>x", "category": "<i>"}]
    assert "<script" not in as_html(examine(write(tmp_path / "a.jsonl", rows)))


def test_the_projects_own_records_are_clean():
    found = examine(str(ROOT / "data" / "instructions.jsonl"))
    assert as_json(found)["findings"] == [] and found.monotony == {}


# ---- mangled files ---------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.just("\ud800"),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), st.text(max_size=9)), max_size=3),
)  # fmt: skip
NAMES = st.sampled_from(
    ["instruction", "context", "response", "category", "text", "messages", "prompt", "output", "\x00"]
)
ROWS = st.lists(st.one_of(st.dictionaries(NAMES, VALUES, max_size=5), VALUES), max_size=8)
CODECS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-7"])
DAMAGE = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from(["delete", "insert", "cut"]), st.binary(max_size=3)), max_size=6
)
QUICK = settings(max_examples=FUZZED, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(data: bytes, damage) -> bytes:
    for at, how, more in damage:
        at = min(at, len(data))
        data = {"delete": data[:at] + data[at + 2 :], "insert": data[:at] + more + data[at:], "cut": data[:at]}[how]
    return data


def check_nothing_is_lost(path, lines: int) -> None:
    try:
        records, problems = read_records(str(path))
    except UserError as error:
        assert path.suffix != ".jsonl" or "is empty" in str(error)  # of JSONL each line is read by itself
        with pytest.raises(UserError):
            examine(str(path))
        return
    assert len(records) + len(problems) == lines
    found = examine(str(path))
    assert found.records == len(records)
    assert len(found.found["unreadable"] + found.found["empty"]) == len(problems)
    as_html(found), json.dumps(as_json(found))


@QUICK
@given(rows=ROWS, codec=CODECS, end=st.sampled_from(["\n", "\r\n", "\n\n"]), damage=DAMAGE)
def test_no_mangled_jsonl_loses_a_line_or_ends_in_a_traceback(tmp_path, rows, codec, end, damage):
    text = "".join(json.dumps(row) + end for row in rows)
    data = damaged(text.encode(codec, errors="replace"), damage)
    (tmp_path / "x.jsonl").write_bytes(data)
    check_nothing_is_lost(tmp_path / "x.jsonl", sum(bool(line.strip(b" \t\r\n\f\v")) for line in lines_of(data)))


def lines_of(data: bytes) -> list[bytes]:
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")


@QUICK
@given(rows=ROWS, codec=CODECS, damage=DAMAGE)
def test_no_mangled_csv_loses_a_row_or_ends_in_a_traceback(tmp_path, rows, codec, damage):
    made = io.StringIO()
    table = [row for row in rows if isinstance(row, dict)]
    written = csv.DictWriter(made, sorted(set().union(*table)))
    written.writeheader()
    written.writerows(table)
    data = damaged(made.getvalue().encode(codec, errors="replace"), damage)
    (tmp_path / "x.csv").write_bytes(data)
    try:
        _, *counted = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    except (ValueError, csv.Error):
        counted = []
    check_nothing_is_lost(tmp_path / "x.csv", sum(map(bool, counted)))


@QUICK
@given(rows=ROWS, codec=CODECS, damage=DAMAGE)
def test_no_mangled_json_list_loses_a_row_or_ends_in_a_traceback(tmp_path, rows, codec, damage):
    data = damaged(json.dumps(rows).encode(codec, errors="replace"), damage)
    (tmp_path / "x.json").write_bytes(data)
    try:
        count = len(json.loads(data.decode("utf-8-sig")))
    except (ValueError, TypeError):
        count = -1
    check_nothing_is_lost(tmp_path / "x.json", count)
