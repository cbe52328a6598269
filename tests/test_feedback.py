"""From the chat back to the data: nothing is lost, nothing is added twice, whoever writes meanwhile."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, run

from dolly import feedback
from dolly.errors import UserError
from dolly.feedback import Feedback
from dolly.records import read_records

ASKED = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "The apple."}]
LONGER = [*ASKED, {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "The pear."}]
OTHER = [ASKED[0], {"role": "assistant", "content": "Fruit!\u2028And more."}]
THIRD = [ASKED[0], {"role": "assistant", "content": "The quinze."}]
OLD = '{"instruction": "Say hi.", "context": "", "response": "Hi.", "category": "open_qa"}'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "data.jsonl").write_text(OLD, encoding="utf-8")  # without a line end
    for given in (
        Feedback(ASKED, "good", model="m"), Feedback(LONGER, "bad", "The plum."), Feedback(OTHER, "bad"),
        Feedback(THIRD, correction="The quince is one."),
    ):  # fmt: skip
        feedback.add(tmp_path / "feedback.jsonl", given)
    return tmp_path / "feedback.jsonl", tmp_path / "data.jsonl"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def reviewing(files, *keys):
    typed, said = iter(keys), []
    counts = feedback.review(*files, lambda prompt: next(typed), said.append)
    return counts, "\n".join(said)


def test_what_is_accepted_becomes_a_record_with_its_source(files):
    ids = [row["id"] for row in rows(files[0])]
    counts, said = reviewing(files, "a", "open_qa", "a", "", "d", "?", "s")
    assert counts == {"accepted": 2, "dropped": 1, "left": 1}
    assert "corrected: The plum." in said
    old, first, second = rows(files[1])
    assert old == json.loads(OLD)
    assert (first["instruction"], first["response"], first["category"]) == ("Name a fruit.", "The apple.", "open_qa")
    assert first["source"]["feedback"] == ids[0] and first["source"]["model"] == "m"
    assert second["messages"] == [*LONGER[:-1], {"role": "assistant", "content": "The plum."}]
    assert second["category"] == "feedback"
    records, problems = read_records(str(files[1]))
    assert len(records) == 3 and not problems
    assert [row["id"] for row in rows(files[0])] == ids[3:]


def test_an_answer_can_be_edited_before_it_is_accepted(files, tmp_path, monkeypatch):
    editor = tmp_path / "editor.py"
    editor.write_text("import sys; open(sys.argv[1], 'w').write('The fig. Write to jane@mailbox.net')")
    monkeypatch.setenv("VISUAL", f"{sys.executable} {editor}")
    _, said = reviewing(files, "e", "a", "", "q")
    assert rows(files[1])[1]["response"] == "The fig. Write to jane@mailbox.net"
    assert "note: the record holds an e-mail address" in said


def test_a_review_that_broke_off_between_the_two_files_adds_nothing_twice(files, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(feedback, "_remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        reviewing(files, "a", "")
    assert len(rows(files[1])) == 2 and len(rows(files[0])) == 4
    counts, _ = reviewing(files, "q")
    assert counts["left"] == 3
    assert len(rows(files[1])) == 2


def test_what_the_chat_adds_during_a_review_stays(files):
    later, numbers = iter(["a", "", "q"]), iter(range(9))

    def ask(prompt):
        feedback.add(files[0], Feedback([ASKED[0], {"role": "assistant", "content": f"Fruit {next(numbers)}"}], "good"))
        return next(later)

    assert feedback.review(*files, ask, lambda text: None)["left"] == 3 + 3


def test_many_may_write_at_once(tmp_path):
    path = tmp_path / "feedback.jsonl"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: feedback.add(path, Feedback(asked(n), "good", "x" * 5000)), range(200)))
    assert len(feedback.read(path)[0]) == 200


def asked(n: int) -> list[dict]:
    return [{"role": "user", "content": f"Name fruit {n}."}, ASKED[1]]


def test_a_line_that_is_no_feedback_stays_and_stops_nothing(tmp_path):
    path, data = tmp_path / "feedback.jsonl", tmp_path / "data.jsonl"
    broken = ["{", "[]", '{"messages": []}', '{"rating": "good"}', json.dumps({"messages": ASKED[:1]})]
    path.write_text("\n".join(broken), encoding="utf-8")  # the last one torn
    feedback.add(path, Feedback(ASKED, "good"))
    counts, said = reviewing((path, data), "a", "")
    assert counts == {"accepted": 1, "dropped": 0, "left": 0} and "5 lines are no feedback" in said
    assert path.read_text(encoding="utf-8").splitlines() == broken


def test_the_newest_judgement_of_an_answer_counts_and_all_leave_with_it(tmp_path):
    path, data = tmp_path / "feedback.jsonl", tmp_path / "data.jsonl"
    for rating in ("good", "bad"):
        feedback.add(path, Feedback(ASKED, rating))
    assert [each.rating for each in feedback.read(path)[0]] == ["bad"]
    assert reviewing((path, data), "d")[0]["left"] == 0 and path.read_text() == ""


@pytest.mark.parametrize(
    "given",
    [
        Feedback(ASKED[:1]),
        Feedback(ASKED[1:]),
        Feedback(ASKED, correction=" \n"),
        Feedback(ASKED, correction="x" * 70_000),
    ],
)
def test_what_is_not_worth_keeping_is_not_kept(tmp_path, given):
    with pytest.raises(UserError):
        feedback.add(tmp_path / "feedback.jsonl", given)
    assert not (tmp_path / "feedback.jsonl").exists()


def test_nothing_that_a_visitor_wrote_reaches_the_terminal_as_a_command(tmp_path):
    path = tmp_path / "feedback.jsonl"
    feedback.add(path, Feedback([{"role": "user", "content": "\x1b]0;x\x07\nhi"}, ASKED[1]], "bad", "\x1b[2J"))
    said = reviewing((path, tmp_path / "data.jsonl"), "q")[1]
    assert "\x1b" not in said and "\\x1b]0;x" in said


def test_other_data_is_not_damaged(tmp_path, files):
    with pytest.raises(UserError, match=r"\.jsonl files only"):
        reviewing((files[0], tmp_path / "my.csv"))
    files[1].write_text('{"category": "feedback", "source": "web"}\n{broken "feedback"\n', encoding="utf-8")
    assert reviewing(files, "s", "q")[0]["left"] == 4


def test_the_command_asks_in_the_terminal(files):
    done = subprocess.run(
        [sys.executable, "-m", "dolly", "review", "--feedback", files[0], "--data", files[1]],
        cwd=ROOT, input="a\n\nd\n", capture_output=True, text=True, timeout=60, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 accepted, 1 dropped, 2 left" in done.stdout  # the end of the input is a quit
    done = run("-m", "dolly", "review", "--feedback", "none.jsonl")
    assert done.returncode == 2 and "There is no file none.jsonl" in done.stderr
