"""The model card: the README.md of a package, written from the plain facts of its training run.

Nothing in it names a folder of the machine that trained: of a local base or data file only the name is told.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Settings that the card tells elsewhere, or that speak of the machine rather than of the model.
UNTOLD = ("base", "data", "extra_data", "output", "push_to_hub", "private")
COUNT_ROWS = 20  # at most, of a table
CURVE = "training-curve.png"  # beside the card

QUALITY = (
    ("end by themselves", "end_by_themselves", ".0%"),
    ("say the same four words three times", "loop", ".0%"),
    ("words", "words", ".0f"),
    ("pairs of words that are not repeated", "distinct_2", ".0%"),
)

USE = """\
```python
from transformers import pipeline

dolly = pipeline("text-generation", model="{name}"){where}

# A question or a task, as plain text ...
print(dolly("{prompt}", return_full_text=False)[0]["generated_text"])

# ... or a conversation.
messages = [{{"role": "user", "content": "{prompt}"}}]
print(dolly(messages)[0]["generated_text"][-1]["content"])
```

The prompt and the place to stop are part of the tokenizer and of the generation settings; no remote code is needed.
A plain string is put into the prompt as well, so measure perplexity on raw text, or tokenize a conversation that
`apply_chat_template` has already rendered, with `add_special_tokens=False`.

As a server that speaks OpenAI's protocol: `transformers serve {name}` or `vllm serve {name}`. As a chat in the browser,
with Dolly's own code: `python app.py --model {name}`.
"""

USE_ADAPTERS = """\
These are adapters alone: they are loaded with their base, by peft or by Dolly (`python app.py --model {name}`).

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained("{name}"){where}
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("{prompt}", return_tensors="pt")
answer = model.generate(**prompt, generation_config=GenerationConfig.from_pretrained("{name}"))
print(tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))
```

The prompt is part of the tokenizer, the place to stop of the generation settings.
"""

LIMITS = """\
- It states falsehoods as fluently and as confidently as facts, the more so the smaller the model. Check what matters.
- It knows what its base model and its training records hold: nothing later, and it looks nothing up.
- It fails first at tasks unlike its training records, at arithmetic and at long texts.
- It was trained to follow instructions, not to refuse any, and it repeats the prejudices of the texts behind it. Do not
  let it decide about people.
- What no longer fits into its window, in a long conversation or a long text, it does not see.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a training run knows at its end. Losses are mean cross-entropies per answer token, in nats."""

    name: str  # OWNER/NAME where it will be pushed, else the name of its folder
    base: str  # a Hub id, or a folder
    license: str | None  # as the Hub spells it, such as apache-2.0
    data: str  # a Hub data set id, or a file
    train_records: int
    validation_records: int
    settings: dict[str, object]  # the configuration, setting by setting
    steps: int
    tokens: int
    seconds: float
    hardware: str
    dtype: str
    heldout_before: float | None = None
    heldout_after: float | None = None
    heldout_by_category: dict[str, list[float]] = field(default_factory=dict)  # before fine-tuning ... after
    quality: list[dict] = field(default_factory=list)  # of the answers before and after, as `evaluate.quality` tells it
    plain_text: list[float] = field(default_factory=list)  # loss before and after on plain English
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> records
    categories: Counter[str] = field(default_factory=Counter)  # category -> records
    history: list[dict] = field(default_factory=list)  # {"step", "loss"} and {"step", "heldout"}, by step
    samples: list[dict] = field(default_factory=list)  # {"prompt", "before", "after"}
    examples: dict[str, str] = field(default_factory=dict)  # title -> prompt, for the Hub's own chat box
    assistant: bool = True  # else trained on plain texts, which it continues


def model_card(facts: CardFacts) -> str:
    """The text of the README.md. Raises `ValueError` for facts that the Hub's card format cannot hold."""
    title = facts.name.split("/")[-1]
    sections = [
        (f"# {title}", _introduction(facts)),
        ("## How to use it", _use(facts)),
        ("## What it learned from", _data(facts)),
        ("## How it was trained", _training(facts)),
        ("## Before and after", _samples(facts)),
        ("## Limits", LIMITS if facts.assistant else ""),
    ]
    body = "\n\n".join(f"{heading}\n\n{text.strip()}" for heading, text in sections if text)
    return str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n"))


def _metadata(facts: CardFacts) -> ModelCardData:
    data_ids = [_hub_id(data) for data in (facts.data, facts.settings.get("extra_data")) if data]
    results = None
    if facts.heldout_after is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=data_ids[0] or _name(facts.data),
                dataset_name=_name(facts.data),
                dataset_split="validation",
                metric_type="loss",
                metric_name="cross-entropy per answer token (nats)",
                metric_value=round(facts.heldout_after, 4),
            )
        ]
    base = _hub_id(facts.base)
    return ModelCardData(
        model_name=facts.name.split("/")[-1],
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=[data_id for data_id in data_ids if data_id and "/" in data_id] or None,
        language="en",
        library_name="transformers",
        license=facts.license,
        pipeline_tag="text-generation",
        tags=["conversational", "instruction-following", "dolly"] if facts.assistant else ["dolly"],
        widget=[
            {"example_title": title, "messages": [{"role": "user", "content": prompt}]}
            for title, prompt in facts.examples.items()
            if facts.assistant
        ]
        or None,
        eval_results=results,
    )


def _introduction(facts: CardFacts) -> str:
    base = _hub_id(facts.base)
    linked = f"[{base}](https://huggingface.co/{base})" if base else f"`{_name(facts.base)}`"
    text = (
        f"An assistant: {linked}, fine-tuned by Dolly to follow instructions, on {facts.train_records:,} records of "
        "instructions and their answers."
        if facts.assistant
        else f"{linked}, trained further by Dolly on {facts.train_records:,} plain texts. It continues a text; "
        "it does not follow instructions until it is fine-tuned on some."
    )
    if facts.license is None:
        text += "\n\nNo licence is stated: those of the base model and of the training records hold."
    return text


def _use(facts: CardFacts) -> str:
    if not facts.assistant:
        return f"As a base for fine-tuning: `python train.py --base {facts.name} --data YOUR.jsonl`."
    plain = (prompt for prompt in facts.examples.values() if prompt.isprintable() and not set('"\\') & set(prompt))
    prompt = next(plain, "Write a tweet announcing a new bakery.")
    where = "" if "/" in facts.name else "  # the path of this folder, or its id on the Hub"
    alone = facts.settings.get("lora_rank") and not facts.settings.get("merge", True)
    return (USE_ADAPTERS if alone else USE).format(name=facts.name, prompt=prompt, where=where)


def _data(facts: CardFacts) -> str:
    extra = facts.settings.get("extra_data")
    names = " and, nothing of it held out, ".join(map(_linked_data, filter(None, (facts.data, extra))))
    parts = [
        f"{names}: {facts.train_records:,} records to learn from, and {facts.validation_records:,} held out, "
        "which training never saw."
    ]
    if facts.dropped:
        parts.append(f"Left out: {sum(facts.dropped.values()):,} records.")
        parts.append(table(("reason", "records"), counts(facts.dropped)))
    if len(facts.categories) > 1:
        parts.append(table(("category", "records"), counts(facts.categories)))
    return "\n\n".join(parts)


def _linked_data(data: str) -> str:
    data_id = _hub_id(data)
    return f"[{data_id}](https://huggingface.co/datasets/{data_id})" if data_id else f"`{_name(data)}`"


def counts(counter: Counter[str]) -> list[tuple[str, int]]:
    """The commonest, and the rest in one row: a reason may hold the column of a mistake, a user has any categories."""
    rows = [(name or "(none)", count) for name, count in counter.most_common(COUNT_ROWS)]
    rest = counter.total() - sum(count for _, count in rows)
    return [*rows, ("others", rest)] if rest else rows


def _training(facts: CardFacts) -> str:
    speed = f", {facts.tokens / facts.seconds:,.0f} a second" if facts.seconds else ""
    parts = [
        f"{facts.steps:,} updates on {facts.tokens:,} tokens{speed}; {_duration(facts.seconds)} on {facts.hardware}, "
        f"matrix products in {facts.dtype}."
    ]
    if facts.heldout_after is not None:
        measured = [("before", facts.heldout_before), ("after", facts.heldout_after)]
        rows = [(when, f"{loss:.3f}", f"{math.exp(loss):,.2f}") for when, loss in measured if loss is not None]
        parts.append(
            f"On the {facts.validation_records:,} held-out records (cross-entropy in nats, averaged over the tokens of "
            "the answers; perplexity is its exponential):"
        )
        parts.append(table(("fine-tuning", "loss", "perplexity"), rows))
        if len(facts.heldout_by_category) > 1:
            by_loss = sorted(facts.heldout_by_category.items(), key=lambda item: item[1][-1])[:COUNT_ROWS]
            rows = [(name or "(none)", f"{losses[0]:.3f}", f"{losses[-1]:.3f}") for name, losses in by_loss]
            parts.append(table(("category", "loss before", "after"), rows))
    if facts.plain_text:
        before, after = facts.plain_text
        parts.append(
            f"What it forgot: the loss of a token of plain English went from {before:.3f} to {after:.3f} (stories, "
            "reports and descriptions that the fine-tuning has not seen)."
        )
    if facts.quality:
        rows = [(name, *(f"{q[key]:{form}}" for q in facts.quality)) for name, key, form in QUALITY]
        parts.append(f"Its answers to {facts.quality[-1]['answers']} held-out prompts:")
        parts.append(table(("", "before", "after"), rows))
    if facts.history:
        parts.append(f"![The losses on the way, update by update]({CURVE})")
    told = [(name, value) for name, value in facts.settings.items() if name not in UNTOLD and value is not None]
    if told:
        parts.append("The settings:")
        parts.append(table(("setting", "value"), told))
    return "\n\n".join(parts)


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return ""
    parts = ["The same prompts to the base model and to this one. The answers are not edited."]
    for sample in facts.samples:
        parts.append(f"**Prompt**\n\n{verbatim(sample['prompt'])}")
        parts.append(f"Before:\n\n{verbatim(sample['before'])}")
        parts.append(f"After:\n\n{verbatim(sample['after'])}")
    return "\n\n".join(parts)


def verbatim(text: str) -> str:
    """A block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


def table(head: tuple[str, ...], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _hub_id(name: str) -> str | None:
    """`name` if it is an id on the Hub. As in transformers, what exists here is a path."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII) and not Path(name).exists()
    return name if is_id and not re.search(r"\.(jsonl?|csv|parquet)$", name) else None


def _name(path_or_id: str) -> str:
    return path_or_id if _hub_id(path_or_id) else Path(path_or_id).name
