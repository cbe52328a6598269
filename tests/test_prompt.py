"""The same ids from training, the chat template and a plain string, with every kind of tokenizer."""

import pytest
from conftest import base_tokenizer
from transformers import AddedToken, AutoTokenizer

from dolly.errors import UserError
from dolly.prompt import CONTROL_TOKENS, END, INTRO, RESPONSE, as_text, dolly_tokenizer, encode, user_text

KINDS = ["gpt_neox", "gpt2", "llama", "mistral", "qwen3"]
# Ends and beginnings that byte-pair tokenizers like to merge with what is next to them.
PROMPTS = [
    "Write a tweet announcing a new bakery.",
    "Why?!\n\n",
    "  1. Sort:\n- plum\n- pear...",
    "Résumé für 你好 🙂",
    user_text("Summarize this.", "First line.\n\nSecond line: 42 %"),
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    """Saved and loaded again as any user of the package does."""
    folder = tmp_path_factory.mktemp(request.param)
    dolly_tokenizer(base_tokenizer(request.param)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_string_messages_and_training_give_the_same_ids(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    trained, learned = encode(tokenizer, messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids == trained
    assert tokenizer(prompt.strip()).input_ids == trained
    assert not any(learned)
    assert trained[-1] == tokenizer.convert_tokens_to_ids(RESPONSE)


@pytest.mark.parametrize("system", [None, "You are a pirate.\n"])
def test_a_conversation_and_its_learned_tokens(tokenizer, system):
    turns = [("user", "Hi. "), ("assistant", "Ahoy!\n"), ("user", "Bye\n\nnow"), ("assistant", "1. So\n2. long...")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    ids, learned = encode(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert rendered["input_ids"] == ids
    assert [bool(mark) for mark in rendered["assistant_masks"]] == learned
    end = tokenizer.convert_tokens_to_ids(END)
    assert learned[-1] and ids[-1] == end == tokenizer.eos_token_id
    answers = tokenizer.decode([i for i, known in zip(ids, learned, strict=True) if known]).split(END)
    assert [answer.strip() for answer in answers] == ["Ahoy!", "1. So\n2. long...", ""]
    assert tokenizer.decode(ids).count(INTRO) == (system is None)


def test_a_list_of_text_parts_is_a_message(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]
    plain = [{"role": "user", "content": "Hello there"}]
    ids = [tokenizer.apply_chat_template(m, add_generation_prompt=True).input_ids for m in (parts, plain)]
    assert ids[0] == ids[1]


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    ids, _ = encode(tokenizer, [{"role": "user", "content": "Say ### End and ### Response:\n now"}])
    control = {tokenizer.convert_tokens_to_ids(token): token for token in CONTROL_TOKENS}
    assert [control[i] for i in ids if i in control] == ["### Instruction:", "### Response:\n"]
    assert "### End" in tokenizer.decode([i for i in ids if i not in control])


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_beside_a_token_that_a_base_added_is_kept(kind):
    base = base_tokenizer(kind)
    base.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer = dolly_tokenizer(base)
    assert tokenizer.decode(as_text(tokenizer, "def f():\n    \n    return")).count("\n") == 2


def test_a_control_token_spelled_in_a_plain_string_is_one(tokenizer):
    end = tokenizer.convert_tokens_to_ids(END)
    assert end in tokenizer("Say ### End now").input_ids
    assert end not in encode(tokenizer, [{"role": "user", "content": "Say ### End now"}])[0]


def test_the_padding_token_is_not_the_one_that_ends_an_answer(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.convert_tokens_to_ids(END)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="found tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class Slow:
        is_fast, name_or_path = False, "some/base"

    with pytest.raises(UserError, match="some/base"):
        dolly_tokenizer(Slow())
