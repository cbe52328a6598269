"""The token loop gives what `generate` gives, fits conversations into the window, and stops; text comes whole."""

import math
import re
import threading
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from transformers import LogitsProcessorList

import dolly.engine
from dolly.engine import Engine, Sampling, fastest_threads
from dolly.errors import UserError
from dolly.loops import NoRepeatInAnswer
from dolly.model import add_control_tokens, generation_defaults, load_base, load_tokenizer
from dolly.prompt import END, as_text, dolly_tokenizer, encode

GREEDY = Sampling(max_new_tokens=40, temperature=0)
SAMPLED = Sampling(max_new_tokens=40, temperature=1.3, top_p=0.95, top_k=50, repetition_penalty=1.1, seed=7)
QUESTION = [{"role": "user", "content": "Write a tweet announcing a new bakery."}]


def random_engine(base) -> Engine:
    """An engine on random weights, large enough for answers that vary."""
    known = load_tokenizer(str(base))
    tokenizer, model = dolly_tokenizer(known), load_base(str(base)).eval()
    add_control_tokens(model, known, tokenizer)
    model.generation_config = generation_defaults(tokenizer, model)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(10 if weights.dim() > 1 else 1)
    return Engine(model, tokenizer)


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request, bases):
    return random_engine(bases[request.param])


@pytest.fixture(scope="module")
def neox(bases):
    return random_engine(bases["gpt_neox"])


def last(replies):
    return list(replies)[-1]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.3),
        replace(GREEDY, no_repeat_ngram_size=2),
        SAMPLED,
        replace(SAMPLED, no_repeat_ngram_size=3, temperature=1.0),
    ],
    ids=["greedy", "penalty", "ngram", "sampled", "sampled-ngram"],
)
def test_the_ids_are_those_of_generate(engine, sampling):
    prompt, _ = engine.fit(QUESTION, sampling.max_new_tokens)
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    size = sampling.no_repeat_ngram_size
    own = LogitsProcessorList([NoRepeatInAnswer(size, len(prompt))] if size else [])
    torch.manual_seed(sampling.seed or 0)
    whole = engine.model.generate(
        torch.tensor([prompt]),
        do_sample=sampling.temperature > 0,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        logits_processor=own,
        **(options if sampling.temperature else {}),
    )
    expected = whole[0, len(prompt) :].tolist()
    assert len(set(expected)) > 3
    assert list(engine.tokens(prompt, sampling)) == expected


def test_an_answer_may_repeat_the_question_but_not_itself():
    prompt, answer, size = [5, 6, 7, 5, 6], [7, 8, 7], 2
    scores = torch.zeros(1, 10)
    kept = NoRepeatInAnswer(size, len(prompt))(torch.tensor([prompt + answer]), scores)
    assert (kept == -torch.inf).nonzero().tolist() == [[0, 8]]  # 7 8 is in the answer; 6 7 and 7 5 are in the prompt
    assert not NoRepeatInAnswer(size, len(prompt))(torch.tensor([prompt]), scores).any()


def test_the_answer_ends_at_an_end_token_the_limit_or_a_full_window(neox, monkeypatch):
    prompt, _ = neox.fit(QUESTION, 40)
    ids = list(neox.tokens(prompt, GREEDY))
    reply = last(neox.stream(QUESTION, GREEDY))
    assert (reply.tokens, reply.ended) == (40, "limit")

    reply = last(neox.stream(QUESTION, replace(GREEDY, max_new_tokens=10_000)))
    assert (len(prompt) + reply.tokens, reply.ended) == (neox.window, "window")

    monkeypatch.setattr(neox, "ends", {ids[9], ids[5]})
    replies = list(neox.stream(QUESTION, GREEDY))
    assert (replies[-1].tokens, replies[-1].ended) == (min(ids.index(ids[9]), ids.index(ids[5])) + 1, "end")
    assert {reply.ended for reply in replies[:-1]} == {None}


def test_the_ends_are_those_of_the_generation_config(neox):
    config = neox.model.generation_config
    assert neox.ends == set(config.eos_token_id)
    assert neox.tokenizer.convert_tokens_to_ids(END) in neox.ends


def test_the_text_grows_by_whole_characters(engine, monkeypatch):
    text = "Grüße! 🐑🎉 世界, 👩‍👧 and à la carte — fin"
    ids = [*as_text(engine.tokenizer, text), engine.tokenizer.convert_tokens_to_ids(END)]
    monkeypatch.setattr(engine, "tokens", lambda prompt, sampling: iter(ids))
    texts = [reply.text for reply in engine.stream(QUESTION, replace(GREEDY, max_new_tokens=len(ids)))]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    assert not any("\ufffd" in text for text in texts)
    assert len(set(texts)) > 10
    assert texts[-1].strip() == text


def test_a_character_cut_by_the_limit_is_not_shown(engine, monkeypatch):
    ids = as_text(engine.tokenizer, "a🐑")
    monkeypatch.setattr(engine, "tokens", lambda prompt, sampling: iter(ids[:-1]))
    assert last(engine.stream(QUESTION, GREEDY)).text.strip() == "a"


def conversation(turns: int, words: int = 20) -> list[dict]:
    roles = ["user", "assistant"] * turns
    return [{"role": role, "content": f"{number} " + "word " * words} for number, role in enumerate(roles)][:-1]


def test_the_oldest_turns_are_dropped_and_the_system_turn_is_kept(neox):
    messages = [{"role": "system", "content": "Be brief."}, *conversation(9)]
    ids, dropped = neox.fit(messages, 40)
    assert dropped > 0 and dropped % 2 == 0
    assert ids == encode(neox.tokenizer, messages[:1] + messages[1 + dropped :])[0]
    assert len(ids) <= neox.window - 40
    assert len(encode(neox.tokenizer, messages[:1] + messages[dropped - 1 :])[0]) > neox.window - 40
    assert last(neox.stream(messages, GREEDY)).dropped == dropped
    assert neox.fit(conversation(2, words=3), 40)[1] == 0


def test_a_quarter_of_the_window_is_enough_room_for_a_long_answer(neox):
    ids, _ = neox.fit(conversation(9), max_new_tokens=10_000)
    assert neox.window / 2 < len(ids) <= neox.window * 3 / 4


def test_a_message_that_is_too_long_alone_is_refused_with_the_number_of_tokens(neox):
    message = [{"role": "user", "content": "word " * 500}]
    excess = len(encode(neox.tokenizer, message)[0]) - (neox.window - 40)
    with pytest.raises(UserError, match=f"^This is {excess} tokens too long") as error:
        next(neox.stream(message, GREEDY))
    assert re.search(rf"reads {neox.window} tokens at once, 40 of them", str(error.value))


def test_closing_the_answer_ends_the_work(neox):
    steps = []
    hook = neox.model.register_forward_hook(lambda *_: steps.append(1))
    answer = neox.stream(QUESTION, GREEDY)
    for _ in range(3):
        next(answer)
    answer.close()
    hook.remove()
    assert len(steps) == 3
    assert last(neox.stream(QUESTION, GREEDY)).tokens == 40


def test_the_same_seed_gives_the_same_answer_beside_other_answers(neox):
    alone = {seed: last(neox.stream(QUESTION, replace(SAMPLED, seed=seed))).text for seed in range(4)}
    assert len(set(alone.values())) == 4
    together, begin = {}, threading.Barrier(4)

    def answer(seed):
        begin.wait()
        together[seed] = last(neox.stream(QUESTION, replace(SAMPLED, seed=seed))).text

    threads = [threading.Thread(target=answer, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    unseeded = replace(SAMPLED, seed=None)
    assert last(neox.stream(QUESTION, unseeded)).text != last(neox.stream(QUESTION, unseeded)).text


def test_the_defaults_are_those_of_the_model(neox, monkeypatch):
    assert Sampling.of(neox.model) == Sampling(256, temperature=0, top_p=1, top_k=50)
    wanted = {"max_new_tokens": 99, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.2}
    config = generation_defaults(neox.tokenizer, neox.model, do_sample=True, no_repeat_ngram_size=3, **wanted)
    monkeypatch.setattr(neox.model, "generation_config", config)
    assert Sampling.of(neox.model) == Sampling(**wanted, no_repeat_ngram_size=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 0.009),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", "1"),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", 101),
        ("seed", 2**70),
        ("seed", 1.5),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name} must be .*, and is {value!r}.$"):
        Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0.01, 100])
def test_the_ends_of_the_ranges_are_sampled(neox, temperature):
    for penalty in (0.01, 100):
        sampling = Sampling(5, temperature, repetition_penalty=penalty, no_repeat_ngram_size=1, seed=1 - 2**63)
        assert last(neox.stream(QUESTION, sampling)).tokens == 5


def test_no_thread_is_measured_with_the_padding(bases):
    engine, seen = random_engine(bases["gpt2"]), []
    hook = engine.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].flatten().tolist()))
    Engine(engine.model, engine.tokenizer)
    hook.remove()
    assert seen and engine.tokenizer.pad_token_id not in seen


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda threads: 8 / threads, 8),
        (lambda threads: threads, 1),
        (lambda threads: {8: 3, 4: 1, 2: 2, 1: 4}[threads], 4),
    ],
    ids=["more-is-faster", "one-is-fastest", "the-middle"],
)
def test_the_fastest_number_of_threads_is_measured(monkeypatch, cost, expected):
    before, now = torch.get_num_threads(), [0.0]

    def step():
        now[0] += cost(torch.get_num_threads()) / 100

    monkeypatch.setattr(dolly.engine.time, "perf_counter", lambda: now[0])
    try:
        assert fastest_threads(step, 8) == expected
    finally:
        torch.set_num_threads(before)
