"""What is known before a model is loaded: the settings, the records as tokens, and whether the run can go well.

Everything that can be wrong is found out here, in seconds; then the base is made ready to be trained.
"""

import importlib.util
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dolly import launch
from dolly.config import TrainConfig, parse
from dolly.errors import UserError

if TYPE_CHECKING:  # torch and transformers take seconds to import: a mistake in the settings is told before
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from dolly.packing import Document

ANSWERED = 16  # held-out prompts answered before and after, for the model card


@dataclass(frozen=True)
class Prepared:
    """What is known before a model is loaded, by every process."""

    config: TrainConfig
    tokenizer: "PreTrainedTokenizerFast"  # of the package: Dolly's, or the base's where all records are plain texts
    base_tokenizer: "PreTrainedTokenizerFast"
    length: int
    training: list["Document"]
    heldout: list["Document"]
    prompts: list[str]
    dropped: Counter[str]
    license: str | None
    repo: str | None

    @property
    def assistant(self) -> bool:
        """Whether the result is to follow instructions: plain texts alone make a base again."""
        return self.tokenizer is not self.base_tokenizer


def prepare(argv: list[str], push: bool = True) -> Prepared:
    """Everything that can be wrong before a model is loaded, found out; the records read and tokenised.

    push: whether to see to the repository on the Hub, where the settings name one.
    """
    config = parse(argv)
    from transformers.utils import logging

    from dolly import checkpoint, hub, packing, records, trainer
    from dolly import model as models
    from dolly.prompt import dolly_tokenizer

    logging.disable_progress_bar()
    check_launch(config)
    found = checkpoint.newest(place := checkpoint.place_of(config.output))
    if found and not config.resume:
        raise UserError(
            f"A run that was to write {config.output} stopped after {found.name}. Go on with --resume, "
            f"or delete {place} to begin anew."
        )
    if config.resume and not found:
        print(f"There is no checkpoint in {place}: the run begins anew.")
    trainer.precision(config)
    base_tokenizer = models.load_tokenizer(config.base)
    if config.lora_rank and models.starts_at_random(config.base):
        raise UserError(f"{config.base} holds no weights: they start at random, and --lora-rank would leave them so.")
    if config.push_to_hub and not config.merge and Path(config.base).is_dir():
        raise UserError(f"--no-merge pushes adapters alone, and nobody else has their base, the folder {config.base}.")
    length = models.row_length(config.base, config.max_length)

    read, broken = records.read_records(config.data)
    extra, broken_extra = records.read_records(config.extra_data) if config.extra_data else ([], [])
    texts_only = bool(read) and all(record.text is not None for record in read + extra)
    tokenizer = base_tokenizer if texts_only else dolly_tokenizer(base_tokenizer)
    tokenizer.model_max_length = length
    train_part, heldout_part = records.split(read, config.validation)
    training, long = packing.tokenize(train_part, tokenizer, length, base_tokenizer)
    heldout, long_too = packing.tokenize(heldout_part, tokenizer, length, base_tokenizer)
    dropped = sort_out(broken + long + long_too, len(read) + len(broken), config.data, config.bad_records)
    if config.extra_data:
        unseen = records.unlike(extra, heldout_part)
        more, long = packing.tokenize(unseen, tokenizer, length, base_tokenizer)
        dropped += sort_out(broken_extra + long, len(extra) + len(broken_extra), config.extra_data, config.bad_records)
        if like := len(extra) - len(unseen):
            print(f"{config.extra_data}: {like:,} are left out, which are like held-out records")
        training += [replace(document, line=-document.line) for document in more]  # a number of its own
    if not training:
        raise UserError(f"{config.data} has no record left to train on: all {len(read) + len(broken)} were dropped.")
    tell_cuts(training + heldout)
    prompts = [record.messages[0]["content"] for record in heldout_part if len(record.messages) == 2]
    prompts = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) <= length // 2]
    prompts = records.spread(prompts, ANSWERED)
    license = models.license_of(config.base)
    repo = (
        hub.check_write(config.push_to_hub, config.private)
        if push and config.push_to_hub and launch.is_first()
        else None
    )
    return Prepared(config, tokenizer, base_tokenizer, length, training, heldout, prompts, dropped, license, repo)


def check_launch(config: TrainConfig) -> None:
    """Raises `UserError` for settings that the machine or the launcher does not fit."""
    if config.deepspeed and not launch.is_launched():
        raise UserError(
            f"--deepspeed {config.deepspeed} shares the work of several processes. Start them:\n"
            f"  torchrun --nproc-per-node 2 train.py --deepspeed {config.deepspeed} ..."
        )
    if launch.asks_for_deepspeed() and not config.deepspeed:
        raise UserError(
            "accelerate launch asks for DeepSpeed; say it to train.py instead: --deepspeed zero3, for example."
        )
    if "8bit" in config.optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw-8bit needs bitsandbytes: pip install bitsandbytes")


def sort_out(problems, total: int, source: str, bad_records: str) -> Counter:
    """Counts the records that are left out, by reason; raises `UserError` unless `bad_records` says to drop them."""
    from dolly.records import explain

    problems = sorted(problems, key=lambda problem: problem.line)
    if problems and bad_records == "stop":
        remedy = "Mend them, or leave them out with --bad-records drop."
        if any(problem.what.startswith("longer") for problem in problems):
            remedy += " A larger --max-length takes longer ones, as far as the base can see."
        raise UserError(explain(problems, source, total, remedy))
    print(f"{source}: {total - len(problems):,} records kept, {len(problems):,} dropped")
    if problems:
        print(explain(problems, source, total, "They are left out, as --bad-records drop asks."))
    return Counter(problem.what for problem in problems)


def tell_cuts(documents) -> None:
    pieces = Counter(document.line for document in documents)
    if cut := [count for count in pieces.values() if count > 1]:
        print(f"{len(cut):,} texts are longer than a row and were cut into {sum(cut):,} pieces; no token is lost")


def starting_model(ready: Prepared) -> "PreTrainedModel":
    """The base with the control tokens and, as configured, adapters; on the GPU where there is one.

    Raises `UserError` for a base that cannot be loaded, or that cannot keep the documents of a row apart.
    """
    import torch

    from dolly import model as models
    from dolly import trainer
    from dolly.attention import check_apart

    config = ready.config
    torch.manual_seed(config.seed)  # what starts at random is the same in every process
    products = getattr(torch, trainer.precision(config))
    model = models.load_base(config.base, products if config.lora_rank else torch.float32, config.quantize)
    if config.lora_rank:
        from dolly import adapters  # peft takes three seconds to import

        new = models.make_room(model, ready.base_tokenizer, ready.tokenizer)
        model = adapters.add_adapters(model, ready.tokenizer, new, config.lora_rank, config.lora_alpha)
    elif ready.assistant:
        models.add_control_tokens(model, ready.base_tokenizer, ready.tokenizer)
    if torch.cuda.is_available() and config.deepspeed != "zero3":  # with it the model may exceed a GPU
        model.to(f"cuda:{launch.local_rank()}")
    with torch.autocast(model.device.type, products, enabled=products != torch.float32):  # as the run will
        check_apart(model, ready.length)
    return model
