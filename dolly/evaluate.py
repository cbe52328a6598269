"""Honest measures of a fine-tuned model, beside its base where that is given.

The loss of held-out answers by category; whether answers end by themselves, loop, or repeat their words; what the model
forgot of plain English; the same prompts to both; and, on demand, the loss of each record (the highest are often
mistakes of the data) and tasks of EleutherAI's lm-evaluation-harness.
"""

import math
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from dolly import model as models
from dolly.attention import documents_apart
from dolly.config import TrainConfig
from dolly.distributed import Alone
from dolly.errors import UserError
from dolly.head import fused_head
from dolly.model import Answer
from dolly.packing import Document, tokenize
from dolly.prompt import END, bos_token
from dolly.records import Record, first_prompt, read_records, split, spread
from dolly.trainer import batch_loss, by_category, document_losses, precision

DATA = Path(__file__).parent.parent / "data"
MICRO_TOKENS = 4096  # of one forward pass
LONGEST = 8192  # tokens of a row that a tokenizer's own limit is taken for
ASKED = 32  # held-out records whose prompts are answered besides the fixed ones
LOOP = 3  # times that an answer says the same four words
LISTED = 30  # records of the highest loss that the report shows


def evaluate(
    name: str,
    base: str | None = None,
    data: str | None = None,
    whole: bool = False,
    prompts: list[str] | None = None,
    per_record: bool = False,
    tasks: list[str] | None = None,
) -> dict:
    """All measures of a package as a dict that JSON can hold. Losses are means in nats, over the tokens of answers.

    base: the model that it was made of, measured on the same tokens; data: a file or Hub id, of which the part that is
    held out from training is measured, or, with `whole`, all of it; prompts: to be answered, else those of
    `data/examples.yaml`; tasks: of lm_eval. Raises `UserError` for what cannot be read.
    """
    models.load_tokenizer(name)  # a name that is nowhere is told first
    trained = settings_of(name)
    if not data and not trained:
        raise UserError(
            f"{name} does not tell what it was trained on: give --data, and --whole if it learned none of it."
        )
    data, share = data or trained["data"], trained.get("validation", TrainConfig.validation)
    if not whole and share == 0:
        raise UserError(f"{name} was trained on all of its records: measure it on others, --data FILE --whole.")
    try:
        records, _ = read_records(data)
    except UserError as error:
        raise UserError(f"{error}\nGive --data: {name} was trained on {trained.get('data')}.") from None
    parts = ([], records) if whole else split(records, share)
    training, heldout = ([record for record in part if record.text is None] for part in parts)
    if not heldout:
        rest = "" if whole else " that is held out from training; with --whole all of them are measured"
        raise UserError(f"{data} has no record of an instruction and its answer{rest}.")
    model, tokenizer = models.load_package(name)
    if base:
        check_made_of(name, tokenizer, base)
    length = row_of(model, tokenizer)
    documents, too_long = tokenize(heldout, tokenizer, length)
    if not documents:
        raise UserError(f"Every record of {data} is longer than {length} tokens.")
    fixed = example_prompts() if prompts is None else prompts
    if long := [p for p in fixed if len(tokenizer(p).input_ids) > length // 2]:
        raise UserError(f"A prompt takes more than half of the {length} tokens that {name} sees: {long[0][:80]!r}")
    short = [p for p in map(first_prompt, heldout) if len(tokenizer(p).input_ids) <= length // 2]
    asked = fixed + spread(short, ASKED)
    products = precision(TrainConfig(base=base or name))

    defaults = model.generation_config
    result = {
        "model": name, "base": base, "data": data, "whole": whole, "records": len(documents), "too_long": len(too_long),
        "loss": {"model": losses(model, documents, length, products)},
    }  # fmt: skip
    answered = models.answers(model, tokenizer, asked, defaults)
    result["answers"] = {"model": quality(answered)}
    if per_record:
        result["highest_losses"] = highest(model, tokenizer, training or heldout, length, products)
    if tasks:
        result["tasks"] = {"model": harness(model, tokenizer, tasks)}
    if base:
        plain = plain_documents(base, length)
        result["plain_text"] = {"model": losses(model, plain, length, products)["all"]}
        del model
        model = instructed(base, tokenizer)
        result["loss"]["base"] = losses(model, documents, length, products)
        result["plain_text"]["base"] = losses(model, plain, length, products)["all"]
        before = models.answers(model, tokenizer, asked, defaults)
        result["answers"]["base"] = quality(before)
        if tasks:
            result["tasks"]["base"] = harness(model, models.load_tokenizer(base), tasks, chat=False)
    pairs = zip(asked, before if base else [None] * len(asked), answered, strict=True)
    result["samples"] = [
        {"prompt": prompt, "before": a and a.text, "after": b.text, "ended": b.ended} for prompt, a, b in pairs
    ][: len(fixed)]
    return result


def settings_of(name: str) -> dict:
    """The settings that a package in a folder was trained with; none where it does not hold them."""
    try:
        found = yaml.safe_load(Path(name, "train.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("data"), str) else {}


def check_made_of(name: str, tokenizer: PreTrainedTokenizerFast, base: str) -> None:
    """Raises `UserError` for a base whose tokens are others: the losses could not be compared."""
    own = tokenizer.get_vocab()
    if any(own.get(token) != number for token, number in models.load_tokenizer(base).get_vocab().items()):
        raise UserError(f"{name} was not made of {base}: their tokenizers differ.")


def row_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens of a row: those that the model was trained with, where its tokenizer says so, or what it sees at once."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or models.ROW
    length = min(tokenizer.model_max_length, window)
    return length if length <= LONGEST else models.ROW


def example_prompts() -> list[str]:
    categories = yaml.safe_load((DATA / "examples.yaml").read_text(encoding="utf-8"))["categories"]
    return [prompt for category in categories for prompt in category["prompts"]]


def instructed(base: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The base as it is when fine-tuning begins: it can read the prompt, whose control tokens mean nothing to it."""
    model = models.load_base(base)
    models.add_control_tokens(model, models.load_tokenizer(base), tokenizer)
    cuda = torch.cuda.is_available()
    return model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32).eval()  # as `load_package`


def plain_documents(base: str, length: int) -> list[Document]:
    """Texts that no training has seen, as `base` reads them."""
    tokenizer = models.load_tokenizer(base)
    return tokenize(read_records(str(DATA / "plain.jsonl"))[0], tokenizer, length, tokenizer)[0]


def losses(model: PreTrainedModel, documents: list[Document], length: int, products: str) -> dict[str, float]:
    """Mean loss of a learned token by category, after that of `all`. products: the precision of the matrix products."""
    measured = by_category(record_losses(model, documents, length, products), documents)
    names = {None: "all", "": "(none)", "all": "all (category)"}
    return {names.get(name, name): loss for name, loss in measured.items()}


def record_losses(model: PreTrainedModel, documents: list[Document], length: int, products: str) -> torch.Tensor:
    """As `trainer.document_losses`, of a model that is not in training."""
    alone = Alone(model.device, products)
    rows = max(1, MICRO_TOKENS // length)
    with fused_head(model.eval()) as head, documents_apart(model) as apart:
        losses_of = partial(batch_loss, model, accelerator=alone, head=head, documents=apart)
        return document_losses(losses_of, documents, length, rows, 0, alone)


def highest(model: PreTrainedModel, tokenizer, records: list[Record], length: int, products: str) -> list[dict]:
    """The records by their loss, the highest first: what a model that has learned them finds most surprising."""
    documents, _ = tokenize(records, tokenizer, length)
    sums = record_losses(model, documents, length, products).tolist()
    by_line = {record.line: record for record in records}
    found = [
        {
            "line": document.line, "loss": loss / count, "tokens": int(count), "category": document.category,
            "prompt": first_prompt(by_line[document.line]), "answer": by_line[document.line].messages[-1]["content"],
        }
        for document, (loss, count) in zip(documents, sums, strict=True) if count
    ]  # fmt: skip
    return sorted(found, key=lambda row: -row["loss"])


# ---- answers ---------------------------------------------------------------------------------------------------------


def quality(answers: Iterable[Answer]) -> dict[str, float]:
    """Shares of answers that end by themselves and that loop; distinct-n (Li et al. 2016, arXiv:1510.03055), the share
    of different runs of n words among all, in the mean of the answers; the mean number of words.
    """
    answers = list(answers)
    count = max(1, len(answers))
    words = [answer.text.lower().split() for answer in answers]
    filled = [each for each in words if each]
    return {
        "answers": len(answers),
        "end_by_themselves": sum(answer.ended for answer in answers) / count,
        "loop": sum(loops(each) for each in words) / count,
        "empty": (len(answers) - len(filled)) / count,
        "words": sum(map(len, words)) / count,
    } | {f"distinct_{n}": sum(distinct(each, n) for each in filled) / max(1, len(filled)) for n in (1, 2, 3)}


def distinct(words: list[str], n: int) -> float:
    runs = _runs(words, n)
    return len(set(runs)) / len(runs) if runs else 1.0


def loops(words: list[str]) -> bool:
    return max(Counter(_runs(words, 4)).values(), default=0) >= LOOP


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[at:] for at in range(n)), strict=False))


# ---- others' tasks ---------------------------------------------------------------------------------------------------


def harness(model: PreTrainedModel, tokenizer, tasks: list[str], chat: bool = True) -> dict[str, dict[str, float]]:
    """Results of tasks of lm-evaluation-harness, by task and metric; a task may also be the path of a YAML file.

    chat: put each question into the prompt that the model was trained with. Raises `UserError` when it is not
    installed, and for an unknown task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness: pip install lm_eval") from None

    class Apart(HFLM):
        """Prompt and answer are tokenised apart, as in training."""

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return self.tok_encode(context), self.tok_encode(continuation.lstrip())

    sampling = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sampling.eos_token_id, pad_token_id=sampling.pad_token_id)
    try:
        # A plain string would be put into the prompt by the tokenizer itself, options and all: no special tokens.
        wrapped = (Apart if chat else HFLM)(
            pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=not chat and bool(bos_token(tokenizer))
        )
        found = simple_evaluate(
            model=wrapped, tasks=tasks, apply_chat_template=chat, gen_kwargs={"until": [END]} if chat else None,
            bootstrap_iters=1000,
        )  # fmt: skip
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"--tasks {','.join(tasks)}: {error}") from None
    finally:
        model.generation_config = sampling
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def report(result: dict) -> str:
    """The measures as Markdown."""
    kind = "records" if result["whole"] else "held-out records"
    columns = ["base", "model"] if result["base"] else ["model"]
    left_out = f"; {result['too_long']:,} were too long" if result["too_long"] else ""
    parts = [
        f"# {result['model']}" + (f", fine-tuned from {result['base']}" if result["base"] else ""),
        f"{result['records']:,} {kind} of {result['data']}{left_out}. Loss: mean over the tokens of the "
        "answers, in nats; perplexity is its exponential.",
        _table(
            ["category", *columns, "perplexity"],
            (
                [name, *(f"{result['loss'][each][name]:.3f}" for each in columns), f"{math.exp(loss):,.1f}"]
                for name, loss in result["loss"]["model"].items()
            ),
        ),
    ]
    if "plain_text" in result:
        before, after = (result["plain_text"][each] for each in columns)
        cost = f"fine-tuning cost {after - before:+.3f} nats a token"
        parts.append(f"Plain English: {before:.3f} before, {after:.3f} after; {cost}.")
    rows = [
        [name.replace("_", " "), *(f"{result['answers'][each][name]:{form}}" for each in columns)]
        for name, form in (
            ("answers", "d"), ("end_by_themselves", ".0%"), ("loop", ".0%"), ("empty", ".0%"), ("words", ".0f"),
            ("distinct_1", ".2f"), ("distinct_2", ".2f"), ("distinct_3", ".2f"),
        )
    ]  # fmt: skip
    parts.append(_table(["answers", *columns], rows))
    for task, metrics in result.get("tasks", {}).get("model", {}).items():
        others = [result["tasks"][each][task] for each in columns]
        parts.append(_table([task, *columns], ([m, *(f"{o.get(m, math.nan):.4f}" for o in others)] for m in metrics)))
    if "highest_losses" in result:
        parts.append(f"## The {LISTED} records of the highest loss\n\nMistakes of the data are often among them.")
        rows = ((r["line"], f"{r['loss']:.2f}", r["prompt"], r["answer"]) for r in result["highest_losses"][:LISTED])
        parts.append(_table(["line", "loss", "prompt", "answer"], rows))
    parts.append("## Answers")
    for sample in result["samples"]:
        before = "" if sample["before"] is None else f"\n\nBefore:\n\n{_quoted(sample['before'])}"
        parts.append(f"**{' '.join(sample['prompt'].split())}**{before}\n\n{_quoted(sample['after'])}")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or ["(nothing)"])


def _table(head: list[str], rows: Iterable[Iterable]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(c).split())[:120].replace("|", "\\|") for c in r) + " |" for r in cells
    )
