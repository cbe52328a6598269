"""The chat page: its parts, and what happens when a visitor asks. The words are in texts.py, the answers in engine.py.

Every way of asking (Send, an example, Retry, an edit) ends in a change of the state `asked`, which runs the one
function that answers. Each question has a number; an answer goes on while its visitor still waits for that number, so
Stop and a newer question end it, and with it the computation, at the next token.
"""

import html
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr

from dolly import feedback, texts
from dolly.engine import Engine, Reply, Sampling
from dolly.errors import UserError
from dolly.prompt import INTRO, Message

AT_ONCE, IN_LINE = 8, 64  # answers in progress; visitors who wait
EVERY = 0.05  # seconds between two updates of the page; one a token would cost more than the token

translated = gr.I18n(**texts.TEXTS)
BUSY = {"submit_btn": False, "stop_btn": translated("stop")}  # of the message box
IDLE = {"submit_btn": translated("send"), "stop_btn": False}

CSS = """
.gradio-container {width: 100%; max-width: 900px !important; margin: 0 auto !important}
#header header {display: grid; grid-template-columns: auto 1fr; align-items: center; gap: 0 12px; padding: 0 4px}
#header h1 {margin: 0; font-size: 1.9rem; font-weight: 750; letter-spacing: -0.02em}
#header code {justify-self: end; max-width: 100%; padding: 3px 12px; overflow: hidden; text-overflow: ellipsis;
  font-size: 0.8rem; color: var(--body-text-color-subdued); border: 1px solid var(--border-color-primary);
  border-radius: 99px}
#header p {grid-column: 1 / 3; margin: 0; color: var(--body-text-color-subdued)}
#conversation, .form:has(#message) {border: 1px solid var(--border-color-primary) !important}
#conversation .placeholder {text-align: center}
#message textarea {background: transparent; box-shadow: none}
#message button {min-width: 76px; border-radius: 10px; font-weight: 600}
#message .submit-button {color: var(--button-primary-text-color); background: var(--button-primary-background-fill)}
#message .submit-button:hover {background: var(--button-primary-background-fill-hover)}
#message .stop-button {color: white; background: var(--neutral-600)}
#status {min-height: 1.6em; font-size: 0.85rem}
#status > div {padding: 0 6px}
#status p {margin: 0; color: var(--body-text-color-subdued)}
#status [role=alert] {padding: 8px 14px; border-radius: 10px; color: var(--error-text-color);
  background: var(--error-background-fill); border: 1px solid var(--error-border-color)}
#examples .visually-hidden button {width: 0; padding: 0}  /* Gradio measures these: every tab fits, none in a menu */
#examples .tab-wrapper {padding-bottom: 0}
#examples .tab-wrapper, #examples .tab-container:not(.visually-hidden) {height: auto; flex-wrap: wrap; gap: 4px}
#examples .tab-container::after, #examples [role=tab]::after {display: none}
#examples [role=tab] {height: auto; padding: 4px 10px; border-radius: 99px; border: 1px solid transparent}
#examples [role=tab].selected {color: var(--body-text-color); background: var(--block-background-fill);
  border-color: var(--primary-500)}
#examples .tabitem {padding: 12px 0 0; border: none}
#examples .prompts {display: flex; flex-flow: row wrap; gap: 8px}
#examples .prompts button {flex: 0 1 auto; width: auto; min-width: 0; padding: 7px 14px; border-radius: 18px;
  white-space: normal; text-align: left; font-weight: 450; box-shadow: none;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary)}
#examples .prompts button:hover {border-color: var(--primary-500)}
#missing {padding: 20px; border-radius: 16px; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary)}
#missing h2 {margin: 0 0 8px; font-size: 1.3rem}
#missing pre {padding: 10px 14px; border-radius: 8px; overflow-x: auto; background: var(--background-fill-secondary)}
"""

THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_padding="0",
    input_border_color="*border_color_primary",
    input_border_width="1px",
    input_shadow="none",
)
LOOK = {"theme": THEME, "css": CSS, "i18n": translated, "footer_links": ["api", "settings"]}  # what `launch` takes


class Waiting:
    """Which question each visitor waits for."""

    def __init__(self):
        self._numbers = itertools.count(1)
        self._current: dict[str, int] = {}

    def begin(self, visitor: str) -> int:
        """Numbers a new question, which the visitor waits for from now on."""
        self._current[visitor] = next(self._numbers)
        return self._current[visitor]

    def current(self, visitor: str) -> int | None:
        return self._current.get(visitor)

    def end(self, visitor: str) -> None:
        self._current.pop(visitor, None)


def build(
    engine: Engine | None, examples: list[dict], error: str | None = None, judged: Path | None = None
) -> gr.Blocks:
    """The page for a model, or, without one, the page that says `error` and what helps. Launch it with `**LOOK`.

    `examples`: categories as {"name", "icon", "prompts": [text]}. judged: the file for ratings and corrected answers;
    without it the page has no buttons for them.
    """
    with gr.Blocks(title="Dolly") as page:
        name = f"<code>{html.escape(engine.model.name_or_path)}</code>" if engine else ""
        gr.HTML(f"<header><h1>🐑 Dolly</h1>{name}<p>{translated('tagline')}</p></header>", elem_id="header")
        if engine:
            conversation(engine, examples, judged)
        else:
            with gr.Column(elem_id="missing"):  # one translated text a component: Gradio fills in the first only
                gr.HTML(f"<h2>{translated('missing')}</h2><p>{html.escape(error)}</p>")
                gr.HTML(f"<p>{translated('make')}</p><pre>make model</pre>")
                gr.HTML(f"<p>{translated('choose')}</p><pre>python app.py --model models/mine</pre>")
    return page.queue(max_size=IN_LINE)


def conversation(engine: Engine, examples: list[dict], judged: Path | None) -> None:
    """The parts of the page and what they do."""
    waiting, usual = Waiting(), Sampling.of(engine.model)

    bot = gr.Chatbot(
        label=translated("conversation"),
        placeholder=translated("welcome"),
        show_label=False,
        editable="all" if judged else "user",
        buttons=["copy", "copy_all"],
        height="max(300px, calc(100dvh - 490px))",
        elem_id="conversation",
    )
    box = gr.Textbox(
        label=translated("message"),
        placeholder=translated("message"),
        show_label=False,
        **IDLE,
        max_lines=8,
        autofocus=True,
        elem_id="message",
    )
    status = gr.HTML(elem_id="status")
    with gr.Tabs(elem_id="examples"):
        prompts = {button: prompt for category in examples for button, prompt in category_tab(category)}
    with gr.Accordion(translated("settings"), open=False):
        controls = settings(usual, engine.window)
    asked = gr.State()  # (number, the conversation, which ends with the question)

    def ask(before: list[Message], question: str, request: gr.Request, **box_change):
        if not question.strip():
            return gr.skip(), gr.skip(), gr.skip()
        chat = [*before, {"role": "user", "content": question.strip()}]
        number = waiting.begin(request.session_hash)
        return chat, gr.Textbox(**BUSY, **box_change), (number, chat)

    def send(question, chat, request: gr.Request):
        return ask(chat, question, request, value="")

    def retry(chat, retried: gr.RetryData, request: gr.Request):
        return ask(chat[: retried.index], words(chat[retried.index]["content"]), request)

    def edit(chat, system, edited: gr.EditData, request: gr.Request):
        if chat[edited.index]["role"] == "assistant":
            before = messages(chat[: edited.index], system)
            judge(before, words(edited.previous_value), request, correction=words(edited.value))
            return gr.skip(), gr.skip(), gr.skip()
        return ask(chat[: edited.index], edited.value, request)

    def judge(before: list[Message], answer: str, request: gr.Request, **how) -> str:
        """Keeps what a visitor judged; gives what the line under the conversation says of it."""
        turns = [*before, {"role": "assistant", "content": answer}]
        name = engine.model.name_or_path
        name = Path(name).name if Path(name).is_dir() else name  # no path of this machine gets into data
        try:
            feedback.add(judged, feedback.Feedback(turns, model=name, **how))
        except UserError as error:
            return f"<p role=alert>{html.escape(str(error))}</p>"
        return f"<p role=status>{texts.text('kept', texts.language(request.headers.get('accept-language', '')))}</p>"

    def rate(chat, system, liked: gr.LikeData, request: gr.Request):
        if not isinstance(liked.liked, bool) or waiting.current(request.session_hash):  # taken back; still growing
            return gr.skip()
        answer = words(chat[liked.index]["content"])
        before = messages(chat[: liked.index], system)
        return judge(before, answer, request, rating="good" if liked.liked else "bad")

    def example(clicked: gr.EventData, request: gr.Request):
        return ask([], prompts[clicked.target], request)

    def undo(chat, undone: gr.UndoData, request: gr.Request):
        waiting.end(request.session_hash)
        return chat[: undone.index], words(chat[undone.index]["content"])

    def stop(request: gr.Request):
        waiting.end(request.session_hash)
        return gr.Textbox(**IDLE)

    def clear(request: gr.Request):
        return [], stop(request), ""

    def failed():
        return gr.skip(), gr.Textbox(**IDLE), f"<p role=alert>{translated('failed')}</p>"

    def answer(question, system, temperature, top_p, length, penalty, seed, request: gr.Request):
        number, chat = question
        visitor, language = request.session_hash, texts.language(request.headers.get("accept-language", ""))
        sampling = replace(
            usual,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=length,
            repetition_penalty=penalty,
            seed=None if seed in (None, -1) else seed,
        )
        shown = 0.0
        try:
            for reply in engine.stream(messages(chat, system), sampling):
                if waiting.current(visitor) != number:
                    break
                if time.monotonic() - shown >= EVERY and not reply.ended:
                    shown = time.monotonic()
                    yield said(chat, reply), gr.skip(), progress(reply, language)
            if waiting.current(visitor) in (number, None):  # else a newer question has the page
                yield said(chat, reply), gr.Textbox(**IDLE), progress(reply, language, over=True)
        except UserError as error:
            yield chat[:-1], gr.Textbox(chat[-1]["content"], **IDLE), f"<p role=alert>{html.escape(str(error))}</p>"
        finally:
            if waiting.current(visitor) == number:
                waiting.end(visitor)

    asks = {"outputs": [bot, box, asked], "show_progress": "hidden", "api_visibility": "private"}
    may_fail = [
        box.submit(send, [box, bot], **asks),
        bot.retry(retry, bot, **asks),
        bot.edit(edit, [bot, controls[0]], **asks),
        gr.on([button.click for button in prompts], example, **asks),
        asked.change(
            answer,
            [asked, *controls],
            [bot, box, status],
            show_progress="minimal",
            show_progress_on=bot,
            trigger_mode="multiple",  # a newer question does not wait for the end of the one before
            concurrency_limit=AT_ONCE,
            api_visibility="private",
        ),
    ]
    at_once = {"queue": False, "api_visibility": "private"}
    for event in may_fail:  # when too many wait, or by a fault; `bot` is an output so that its "Error" screen goes
        event.failure(failed, None, [bot, box, status], **at_once)
    box.stop(stop, None, box, **at_once)
    bot.undo(undo, bot, [bot, box], **at_once)
    if judged:
        bot.like(rate, [bot, controls[0]], status, **at_once)
    bot.clear(clear, None, [bot, box, status], **at_once)
    gr.api(endpoint(engine, usual), api_name="chat", concurrency_limit=AT_ONCE)


def category_tab(category: dict) -> list[tuple[gr.Button, str]]:
    """A tab with a button for each prompt of the category: the buttons and their prompts."""
    with gr.Tab(f"{category['icon']} {category['name']}"), gr.Column(elem_classes="prompts"):
        return [(gr.Button(prompt.split("\n\nInput:")[0], size="md"), prompt) for prompt in category["prompts"]]


def settings(usual: Sampling, window: int) -> list[gr.components.Component]:
    """The controls that `answer` reads, in its order, showing the model's own defaults."""

    def named(key: str) -> dict:
        return {"label": translated(key), "info": translated(key + "_info")}

    with gr.Row():
        temperature = gr.Slider(0, 1.5, usual.temperature, step=0.05, **named("temperature"))
        top_p = gr.Slider(0.05, 1, usual.top_p, step=0.01, **named("top_p"))
    with gr.Row():
        longest = max(usual.max_new_tokens, min(window, 4096))
        length = gr.Slider(16, longest, usual.max_new_tokens, step=1, **named("length"))
        penalty = gr.Slider(1, 2, usual.repetition_penalty, step=0.05, **named("penalty"))
    with gr.Row():
        seed = gr.Number(-1, precision=0, minimum=-1, **named("seed"))
        system = gr.Textbox("", placeholder=INTRO, lines=2, **named("system"))
    return [system, temperature, top_p, length, penalty, seed]


def endpoint(engine: Engine, usual: Sampling):
    """The function behind the public API, with the model's own defaults in its signature."""

    def chat(
        message: str,
        history: list[dict] | None = None,
        system: str = "",
        temperature: float = usual.temperature,
        top_p: float = usual.top_p,
        max_new_tokens: int = usual.max_new_tokens,
        repetition_penalty: float = usual.repetition_penalty,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answers a message, after the earlier messages of `history`; yields the text so far as it grows."""
        chosen = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        try:
            sampling = replace(usual, **chosen, repetition_penalty=repetition_penalty, seed=seed)
            if not isinstance(history, list | None):
                raise UserError(f"history must be a list of messages, and is {history!a:.80}.")
            question = [*(history or []), {"role": "user", "content": message}]
            for reply in engine.stream(messages(question, system), sampling):
                yield reply.text
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return chat


def words(content: str | list[dict]) -> str:
    """The text of a message's content: a string, or a list of parts {"text": string}. Raises `UserError` for others."""
    try:
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        text.encode()
    except (TypeError, KeyError, UnicodeEncodeError):
        raise UserError(f"A message must be text of whole characters, and one is {content!a:.80}.") from None
    return text


def messages(chat: list[Message], system: str) -> list[Message]:
    """What the model reads of a conversation; a question that was stopped before its first word is left out.

    A `system` that is not blank takes the place of a system turn at the beginning of the conversation. Raises
    `UserError` for what is no conversation.
    """
    plain = []
    for message in chat:
        match message:
            case {"role": "system", "content": content} if not plain:
                plain.append({"role": "system", "content": words(content)})
            case {"role": "user" | "assistant" as role, "content": content}:
                plain.append({"role": role, "content": words(content)})
            case _:
                raise UserError(
                    'A message must have a "role", user or assistant (system in the first only), and a "content"; '
                    f"one is {message!a:.80}."
                )
    if words(system).strip():
        plain = [{"role": "system", "content": system}, *plain[plain[0]["role"] == "system" :]]
    answered = [one for one, after in itertools.pairwise(plain) if one["role"] != after["role"]]
    return answered + plain[-1:]


def said(chat: list[Message], reply: Reply) -> list[Message]:
    return [*chat, {"role": "assistant", "content": reply.text}] if reply.text.strip() else chat


def progress(reply: Reply, language: str, over: bool = False) -> str:
    """The line under the conversation: how much, how fast, and in the end why it ended."""

    def text(key: str, **values) -> str:
        return texts.text(key, language, **values)

    parts = [text("speed", tokens=reply.tokens, speed=f"{reply.tokens / reply.seconds:.0f}")]
    if over and reply.ended == "end" and not reply.text.strip():
        parts = [text("nothing")]
    elif over:
        parts.append(text(reply.ended or "stopped"))
    if reply.dropped:
        parts.append(text("dropped", dropped=reply.dropped))
    return f"<p{' role=status' if over else ''}>{' · '.join(parts)}</p>"
