"""The launched page in a real browser, with a small random model, and its public endpoint."""

import json
import re
import time

import gradio as gr
import pytest
import torch
import yaml
from browser import BOT, CHROMIUM, ROOT, SAID, answered, app, ask, chromium
from conftest import save_base
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import expect

from app import chat
from dolly import texts
from dolly.chat import LOOK, build, endpoint, messages
from dolly.engine import Engine, Sampling
from dolly.errors import UserError
from dolly.model import add_control_tokens, generation_defaults, load_base, load_package, load_tokenizer, save_package
from dolly.prompt import dolly_tokenizer

in_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (apt-get install chromium)")
EXAMPLES = yaml.safe_load((ROOT / "data" / "examples.yaml").read_text(encoding="utf-8"))["categories"]
FIRST, SECOND = "Write a tweet announcing a new bakery.", "Make it shorter."


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package with random weights that answers in words only, greedily, 24 tokens long."""
    folder = tmp_path_factory.mktemp("chat")
    base = str(save_base(folder / "base", "gpt_neox", max_position_embeddings=512))
    known, model = load_tokenizer(base), load_base(base)
    tokenizer = dolly_tokenizer(known)
    add_control_tokens(model, known, tokenizer)
    words = torch.tensor([bool(re.fullmatch("Ġ[a-z]{2,}", known.convert_ids_to_tokens(i))) for i in range(len(known))])
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(10 if weights.dim() > 1 else 1)
        model.get_output_embeddings().weight.mul_(words[:, None])
    save_package(model, tokenizer, folder / "random", generation_defaults(tokenizer, model, max_new_tokens=24), {})
    return folder / "random"


@pytest.fixture(scope="module")
def engine(package):
    return Engine(*load_package(str(package)))


@pytest.fixture(scope="module")
def addresses(package, tmp_path_factory):
    """Of the app with a model, as a subprocess, and of its page without one, in this process."""
    nowhere = tmp_path_factory.mktemp("empty") / "nothing"
    with app("--model", package) as address:
        page = chat(str(nowhere))
        _, without, _ = page.launch(prevent_thread_lock=True, quiet=True, **LOOK)
        yield address, without
        page.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Opens a page; at the end of the test, no page may have logged an error."""
    contexts, errors = [], []

    def open_page(address, width=1280, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.get_by_role("heading", name="Dolly")).to_be_visible(timeout=20_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def turns(*said: str) -> list[dict]:
    return [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(said), said, strict=False)
    ]


def expected(engine, *said: str, **sampling) -> str:
    """The engine's own answer to a conversation, without the page."""
    options = {"max_new_tokens": 24, "temperature": 0} | sampling
    return list(engine.stream(turns(*said), Sampling(**options)))[-1].text.strip()


def spoken(page) -> list[str]:
    return [text.strip() for text in page.locator(SAID).all_inner_texts()]


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


@in_browser
def test_a_question_is_answered_and_the_next_turn_knows_of_it(addresses, engine, visit):
    page = visit(addresses[0])
    ask(page, FIRST)
    first = expected(engine, FIRST)
    expect(answered(page)).to_have_text(first)
    expect(page.locator("#status")).to_contain_text(re.compile(r"24 tokens, \d+ a second · cut at the answer length"))
    expect(page.locator("#message textarea")).to_have_value("")

    page.locator("#message textarea").fill(SECOND)
    button(page, "Send").click()
    second = expected(engine, FIRST, first, SECOND)
    assert second != expected(engine, SECOND)
    expect(page.locator(BOT)).to_have_text([first, second])


@in_browser
def test_retry_edit_and_undo(addresses, engine, visit):
    page = visit(addresses[0])
    ask(page, FIRST)
    answered(page)
    page.get_by_role("button", name="Settings").first.click()
    expect(page.get_by_role("spinbutton", name="Seed")).to_be_visible()
    page.wait_for_timeout(500)  # Gradio mounts the controls of an accordion after it shows them
    page.get_by_label("number input for Temperature").fill("1.5")
    page.get_by_label("number input for Temperature").press("Tab")
    expect(page.get_by_label("range slider for Temperature")).to_have_value("1.5")
    page.get_by_role("spinbutton", name="Seed").fill("5")
    page.get_by_role("spinbutton", name="Seed").press("Tab")
    retried = expected(engine, FIRST, temperature=1.5, top_k=50, seed=5)
    for _ in range(4):  # Gradio takes a number over a moment after the key, and nothing on the page tells when
        page.wait_for_timeout(500)
        button(page, "Retry").click()
        page.wait_for_timeout(500)
        expect(button(page, "Send")).to_be_visible()
        if page.locator(BOT).inner_text().strip() == retried:
            break
    expect(page.locator(BOT)).to_have_text([retried])
    expect(button(page, "Send")).to_be_visible()  # the answer is over, and the page will not change under the editor

    button(page, "Edit").click()
    page.locator("#conversation textarea").fill(SECOND)
    button(page, "Submit").click()
    edited = expected(engine, SECOND, temperature=1.5, top_k=50, seed=5)
    expect(page.locator(BOT)).to_have_text([edited])
    expect(button(page, "Send")).to_be_visible()
    assert spoken(page) == [SECOND, edited]

    button(page, "Undo").click()
    expect(page.locator("#message textarea")).to_have_value(SECOND)
    expect(page.locator(SAID)).to_have_count(0)


@in_browser
def test_an_example_of_a_category_starts_a_new_conversation(addresses, engine, visit):
    category = next(category for category in EXAMPLES if "\n\nInput:\n" in category["prompts"][0])
    prompt = category["prompts"][0]
    page = visit(addresses[0])
    ask(page, FIRST)
    answered(page)
    page.get_by_role("tab", name=category["name"]).click()
    button(page, prompt.split("\n\nInput:\n")[0]).click()
    expect(page.locator(BOT)).to_have_text([expected(engine, prompt)])
    assert spoken(page)[0].split() == prompt.split()
    for each in EXAMPLES:
        expect(page.get_by_role("tab", name=each["name"])).to_be_visible()


@in_browser
def test_a_message_that_is_too_long_comes_back_with_the_reason(addresses, visit):
    page = visit(addresses[0])
    ask(page, FIRST)
    answer = answered(page).inner_text()
    long = "word " * 600
    ask(page, long)
    expect(page.get_by_role("alert")).to_contain_text(re.compile(r"This is \d+ tokens too long"))
    expect(page.locator("#message textarea")).to_have_value(long.strip())
    assert spoken(page) == [FIRST, answer.strip()]
    expect(button(page, "Send")).to_be_visible()


class Slow(Engine):
    """Takes its time, and counts its work."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.begun = self.running = self.given = 0

    def tokens(self, prompt, sampling):
        self.begun += 1
        self.running += 1
        try:
            for token in super().tokens(prompt, sampling):
                time.sleep(0.1)
                self.given += 1
                yield token
        finally:
            self.running -= 1

    def wait_for_rest(self, patience=20):
        started = time.monotonic()
        while self.running and time.monotonic() - started < patience:
            time.sleep(0.05)
        assert self.running == 0


@pytest.fixture
def slow(package):
    """A slow engine and the address of its page, in this process."""
    engine = Slow(*load_package(str(package)))
    engine.model.generation_config.max_new_tokens = 400
    page = build(engine, EXAMPLES)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **LOOK)
    yield engine, address
    page.close()


@in_browser
def test_words_come_one_by_one_and_stop_ends_the_work(slow, engine, visit):
    slow, address = slow
    page = visit(address)
    whole = expected(engine, FIRST, max_new_tokens=100)
    ask(page, FIRST)
    bubble = page.locator(BOT)
    for words in (1, 4):
        expect(bubble).to_contain_text(" ".join(whole.split()[:words]))
    assert slow.given < 100

    button(page, "Stop").click()
    slow.wait_for_rest()
    expect(page.locator("#status [role=status]")).to_contain_text("stopped")
    partial = bubble.inner_text().strip()
    assert partial and whole.startswith(partial)
    assert slow.given < 100

    button(page, "Send").wait_for()
    ask(page, SECOND)
    expect(bubble).to_have_count(2)
    assert bubble.first.inner_text().strip() == partial
    button(page, "Stop").click()
    slow.wait_for_rest()
    assert slow.begun == 2


@in_browser
def test_a_new_question_ends_the_answer_in_progress(slow, engine, visit):
    slow, address = slow
    page = visit(address)
    ask(page, FIRST)
    expect(page.locator(BOT)).to_contain_text(expected(engine, FIRST, max_new_tokens=2))
    ask(page, SECOND)
    expect(page.locator(BOT)).to_have_count(2)
    assert spoken(page)[::2] == [FIRST, SECOND]
    assert slow.running == 1

    page.get_by_role("tabpanel").get_by_role("button").first.click()
    expect(page.locator(BOT)).to_have_count(1)
    assert spoken(page)[0] == EXAMPLES[0]["prompts"][0]
    page.close()
    slow.wait_for_rest()
    assert slow.begun == 3


@in_browser
def test_a_fault_is_told_and_the_conversation_stays(slow, engine, visit, monkeypatch):
    slow, address = slow
    page = visit(address)
    ask(page, FIRST)
    expect(page.locator(BOT)).to_contain_text(expected(engine, FIRST, max_new_tokens=2))
    button(page, "Stop").click()
    answer = answered(page).inner_text()
    with monkeypatch.context() as patch:
        patch.setattr(slow, "fit", lambda *_: 1 / 0)
        ask(page, SECOND)
        expect(page.get_by_role("alert")).to_have_text(texts.text("failed", "en"))
    expect(page.locator(SAID)).to_have_text([FIRST, answer, SECOND])
    ask(page, FIRST)
    expect(page.locator(BOT)).to_have_count(2)
    expect(page.get_by_role("alert")).to_have_count(0)


@in_browser
def test_a_phone_and_a_dark_page(addresses, visit):
    for address in addresses:
        page = visit(address, width=390, height=844, color_scheme="dark")
        assert page.evaluate("document.body.classList.contains('dark')")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    page = visit(addresses[0], width=390, height=844)
    assert not page.evaluate("document.body.classList.contains('dark')")
    ask(page, FIRST)
    answered(page)
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_role("spinbutton", name="Seed").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@in_browser
def test_the_page_speaks_the_language_of_the_browser(addresses, visit):
    page = visit(addresses[0], locale="fr-FR")
    page.locator("#message textarea").fill(FIRST)
    button(page, texts.text("send", "fr")).click()
    answered(page)
    expect(page.locator("#status")).to_contain_text(texts.text("limit", "fr"))
    missing = visit(addresses[1], locale="nl-BE")
    for key in ("missing", "make", "choose"):
        expect(missing.locator("#missing")).to_contain_text(texts.text(key, "nl"))


@in_browser
def test_without_a_model_the_page_says_what_was_looked_for_and_what_helps(addresses, visit):
    page = visit(addresses[1])
    expect(page.locator("#missing")).to_contain_text("nothing")
    for command in ("make model", "python app.py --model"):
        expect(page.locator("#missing pre").filter(has_text=command)).to_be_visible()
    expect(page.locator("textarea")).to_have_count(0)


def test_the_endpoint_streams_and_keeps_no_history(addresses, engine):
    client = Client(addresses[0], verbose=False)
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/chat"]
    first = expected(engine, FIRST)
    assert client.predict(FIRST, api_name="/chat").strip() == first
    assert client.predict(FIRST, api_name="/chat").strip() == first
    history = turns(FIRST, first)
    assert client.predict(SECOND, history, api_name="/chat").strip() == expected(engine, FIRST, first, SECOND)

    job = client.submit(FIRST, temperature=1, seed=3, max_new_tokens=9, api_name="/chat")
    assert job.result().strip() == expected(engine, FIRST, temperature=1, seed=3, top_k=50, max_new_tokens=9)
    assert len(job.outputs()) == 9
    with pytest.raises(AppError, match="tokens too long"):
        client.predict("word " * 600, api_name="/chat")
    for wrong, told in [
        ({"temperature": -1}, "temperature must be 0, or from"),
        ({"temperature": None}, "temperature must be .* is None"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"seed": 2**70}, "seed must be"),
        ({"system": None}, "must be text .* is None"),
        ({"history": "a"}, "history must be a list"),
        ({"history": ["a"]}, "must have .* is 'a'"),
        ({"history": [{"content": "a"}]}, "must have a .role."),
        ({"message": 5}, "must be text .* is 5"),
    ]:
        with pytest.raises(AppError, match=told):
            client.predict(**{"message": FIRST} | wrong, api_name="/chat")


def test_a_mistake_of_a_caller_leaves_no_traceback_in_the_log(engine):
    with pytest.raises(gr.Error, match="temperature must be") as error:
        next(endpoint(engine, Sampling())(FIRST, temperature=None))
    assert not error.value.print_exception


def test_what_the_model_reads_of_a_conversation():
    said = [
        {"role": "user", "content": "never answered"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    assert messages(said, " ") == turns("one two", "three", "four")
    brief, long = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be long."}
    assert messages(said, "Be brief.")[:2] == [brief, *turns("one two")]
    assert messages([long, *turns("one")], "Be brief.") == [brief, *turns("one")]
    assert messages([long, *turns("one")], "") == [long, *turns("one")]


@pytest.mark.parametrize(
    "said",
    [
        ["a"],
        [{"content": "a"}],
        [{"role": "user"}],
        [{"role": "tool", "content": "a"}],
        [*turns("a"), {"role": "system", "content": "b"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"text": None}]}],
        turns("half a character: \udc80"),
    ],
    ids=ascii,
)
def test_what_is_no_conversation_is_refused(said):
    with pytest.raises(UserError, match="^A message must"):
        messages([*said, *turns("and this?")], "")


def test_every_language_says_everything_with_the_same_values():
    english = texts.TEXTS["en"]
    for language, table in texts.TEXTS.items():
        assert set(table) | {"top_p"} == set(english), language
        for key, text in table.items():
            assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", english[key]), (language, key)
    assert [texts.language(accepted) for accepted in ("fr-CH, fr;q=0.9", "ja,nl;q=0.5", "", "ja")] == [
        "fr",
        "nl",
        "en",
        "en",
    ]


@in_browser
def test_visitors_rate_and_correct_answers_where_the_owner_keeps_them(package, engine, visit, tmp_path):
    kept = tmp_path / "feedback.jsonl"
    with app("--model", package, "--feedback", kept) as address:
        page = visit(address)
        ask(page, FIRST)
        first = expected(engine, FIRST)
        expect(answered(page)).to_have_text(first)
        button(page, "Like").click()
        expect(page.locator("#status")).to_contain_text("Kept, with this conversation")
        button(page, "Dislike").click()
        button(page, "Edit").last.click()
        page.locator("#conversation textarea").fill("A better answer.")
        button(page, "Submit").click()
        expect(page.locator(SAID).last).to_have_text("A better answer.")
        deadline = time.monotonic() + 10
        while (not kept.exists() or len(kept.read_text().splitlines()) < 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        page.context.close()  # before the app ends, which the page would complain of
    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [(each["rating"], each["correction"]) for each in found] == [
        ("good", None), ("bad", None), (None, "A better answer."),
    ]  # fmt: skip
    assert all(each["messages"] == turns(FIRST, first) and each["model"] == package.name for each in found)


@in_browser
def test_a_page_that_keeps_nothing_has_no_buttons_for_it(addresses, engine, visit):
    page = visit(addresses[0])
    ask(page, FIRST)
    expect(answered(page)).to_have_text(expected(engine, FIRST))
    expect(button(page, "Like")).to_have_count(0)
    expect(button(page, "Edit")).to_have_count(1)
