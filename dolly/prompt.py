"""The Dolly prompt: the one place that spells it, its control tokens and its chat template.

    Below is an instruction that describes a task. Write a response that appropriately completes the request.

    ### Instruction:
    Write a tweet announcing a new bakery.

    ### Response:
    The oven is warm ...

    ### End

The three keys are single control tokens, as in databricks/dolly-v2. They take in the white space around them, so a
prompt is always the ids of `intro, ### Instruction:, instruction, ### Response:, answer, ### End` and no tokenizer can
merge letters across these borders: training, the chat template and a plain string give the same ids by construction.
A plain string keeps the white space at its ends, so strip one read from a file (a normalizer that strips would also
take the line end before a base's own indentation token). A control token spelled in it is one; only `encode`, which
training and the chat use, keeps such a spelling as text. A context follows the instruction after an `Input:` line;
further turns follow `### End`; a system turn replaces the intro.
"""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dolly.errors import UserError

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INSTRUCTION, RESPONSE, END = "### Instruction:", "### Response:\n", "### End"
CONTROL_TOKENS = (INSTRUCTION, RESPONSE, END)
TURN, ANSWER, STOP = f"\n\n{INSTRUCTION}\n", f"\n\n{RESPONSE}", f"\n\n{END}"  # with the white space of the prompt
INPUT = "\n\nInput:\n"  # between an instruction and its context
TOGETHER = 2**20  # characters that the tokenizer gets at once; it needs 150 bytes for each

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# `generation` marks the answers for `return_assistant_tokens_mask`; contents may be strings or lists of text parts.
# BOS and INTRO are filled in by `dolly_tokenizer`.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == "system" -%}
{{- "BOS" + text(messages[0].content) }}{%- set turns = messages[1:] -%}
{%- else -%}
{{- "BOSINTRO" }}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role == "user" -%}
{{- "\\n\\n### Instruction:\\n" + text(message.content) }}
{%- elif message.role == "assistant" -%}
{{- "\\n\\n### Response:\\n" }}{% generation %}{{- text(message.content) + "\\n\\n### End" }}{% endgeneration %}
{%- else -%}
{{- raise_exception("a role is user or assistant, and system in the first message only; found " + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "\\n\\n### Response:\\n" }}{%- endif -%}
"""


def user_text(instruction: str, context: str = "") -> str:
    """An instruction and its context as one user turn."""
    return f"{instruction.strip()}{INPUT}{context.strip()}" if context.strip() else instruction.strip()


def instruction_of(turn: str) -> str:
    """A user turn without its context."""
    return turn.split(INPUT, 1)[0]


def dolly_tokenizer(base: PreTrainedTokenizerBase, strips: bool = True) -> PreTrainedTokenizerFast:
    """A copy of `base` with the control tokens, the chat template, and a post-processor that puts a plain string in
    the prompt. It always is a `PreTrainedTokenizerFast`: `GPTNeoXTokenizer` would drop the post-processor when loaded.

    strips: whether the control tokens take in the white space around them; those of databricks/dolly-v2 do not.
    Raises `UserError` for a tokenizer without a Rust backend (a "slow" one).
    """
    if not getattr(base, "is_fast", False):
        raise UserError(
            f"The tokenizer of {base.name_or_path} ({type(base).__name__}) has no tokenizer.json, which Dolly needs "
            "to keep its prompt in the package. Use a base that ships one, or convert it with transformers first."
        )
    bos = bos_token(base)
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.add_special_tokens(list(CONTROL_TOKENS))
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        if token["content"] in CONTROL_TOKENS:
            token.update(lstrip=strips, rstrip=strips, special=True, normalized=False, single_word=False)
    for part in _parts(spec["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":  # else a string's first word differs from the same word in a chat
            part["prepend_scheme"] = "always"
    spec["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(spec))

    before, after = (backend.encode(text, add_special_tokens=False).ids for text in (INTRO + TURN, ANSWER))
    before = ([backend.token_to_id(bos)] if bos else []) + before
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special("prompt"), {"Sequence": {"id": "A", "type_id": 0}}, _special("answer")],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "prompt": {"id": "prompt", "ids": before, "tokens": [backend.id_to_token(i) for i in before]},
            "answer": {"id": "answer", "ids": after, "tokens": [backend.id_to_token(i) for i in after]},
        },
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token=bos or None,
        eos_token=END,
        pad_token=base.pad_token or base.eos_token or END,
        unk_token=base.unk_token,
        additional_special_tokens=list(CONTROL_TOKENS),
        chat_template=CHAT_TEMPLATE.replace("BOS", bos).replace("INTRO", INTRO),
        model_max_length=base.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def bos_token(base: PreTrainedTokenizerBase) -> str:
    """The token that `base` puts before a text; "" where it puts none, as GPT-2, which has one."""
    begins = base("x", add_special_tokens=True).input_ids[:1]
    return base.bos_token if begins == [base.bos_token_id] else ""


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each whether it is learned: the answers and their `### End`.

    Every part is tokenised apart and joined. Text that spells a control token is encoded as text. A conversation that
    ends with a user turn gets `### Response:` after it, ready to be answered.
    """
    ids, learned = next(encode_all(tokenizer, [messages]))
    return ids.tolist(), learned.tolist()


def encode_all(
    tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`encode` for many conversations, as arrays of int32 and of bool."""
    instruction, response, end = tokenizer([TURN, ANSWER, STOP], add_special_tokens=False).input_ids
    contents = (message["content"].strip() for messages in conversations for message in messages)
    texts = as_texts(tokenizer, contents)
    intro = as_text(tokenizer, INTRO)
    begin = [([tokenizer.bos_token_id], False)] if tokenizer.bos_token else []
    for messages in conversations:
        system = messages[0]["role"] == "system"
        parts = [*begin, (next(texts) if system else intro, False)]
        for turn in messages[system:]:
            if turn["role"] == "assistant":
                parts += [(response, False), (next(texts), True), (end, True)]
            else:
                parts += [(instruction, False), (next(texts), False)]
        if messages[-1]["role"] == "user":
            parts.append((response, False))
        ids, learned = zip(*parts, strict=True)
        yield np.concatenate(ids, dtype=np.int32), np.repeat(learned, [len(part) for part in ids])


def as_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of `text` without surrounding white space, no control token among them whatever it spells."""
    return next(as_texts(tokenizer, [text.strip()])).tolist()


def as_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text as it is, int32, no control token among them whatever it spells.

    The Rust tokenizer gets many texts at once, which it spreads over the cores unless TOKENIZERS_PARALLELISM=false.
    """
    for batch in _together(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from (np.array(ids, dtype=np.int32) for ids in encoded.input_ids)


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _special(name: str) -> dict:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _parts(pre_tokenizer: dict | None) -> list[dict]:
    return [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
