"""Fine-tunes a causal language model on records of instructions and answers: settings -> run -> package (-> Hub).

python train.py --config configs/demo.yaml
python train.py --base EleutherAI/pythia-410m --data my.jsonl --output models/mine --push-to-hub mine
torchrun --nproc-per-node 8 train.py --config configs/zero3.yaml --data my.jsonl --output models/mine
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dolly import launch
from dolly.config import TrainConfig, parse
from dolly.errors import UserError, told_plainly

if TYPE_CHECKING:  # torch and transformers take seconds to import: a mistake in the settings is told before
    from transformers import PreTrainedTokenizerFast

    from dolly.packing import Document
    from dolly.trainer import History

ROW = 1024  # tokens of a row where --max-length is not given and the base can see that far
SAMPLES = 4  # held-out prompts answered before and after, for the model card
EXAMPLES = Path(__file__).parent / "data" / "examples.yaml"


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


def main(argv: list[str]) -> None:
    ready = launch.once(lambda: prepare(argv))
    config, tokenizer = ready.config, ready.tokenizer
    import torch
    from transformers.utils import logging

    from dolly import checkpoint, hub, trainer
    from dolly import model as models
    from dolly.attention import check_apart

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another, DeepSpeed's at every step
    torch.manual_seed(config.seed)  # what starts at random is the same in every process
    products = getattr(torch, trainer.precision(config))
    model = models.load_base(config.base, products if config.lora_rank else torch.float32, config.quantize)
    if config.lora_rank:
        from dolly import adapters  # peft takes three seconds to import

        new = models.make_room(model, ready.base_tokenizer, tokenizer)
        model = adapters.add_adapters(model, tokenizer, new, config.lora_rank, config.lora_alpha)
    elif ready.assistant:
        models.add_control_tokens(model, ready.base_tokenizer, tokenizer)
    if torch.cuda.is_available() and config.deepspeed != "zero3":  # with it the model may exceed a GPU
        model.to(f"cuda:{launch.local_rank()}")
    with torch.autocast(model.device.type, products, enabled=products != torch.float32):  # as the run will
        check_apart(model, ready.length)

    defaults = models.generation_defaults(tokenizer, model, **sampling(config))
    before = models.answers(model, tokenizer, ready.prompts, defaults) if launch.is_first() else []
    place = checkpoint.place_of(config.output)
    pad = tokenizer.pad_token_id or 0  # the base's own may have none, and then any will do
    history, model = trainer.train(model, ready.training, ready.heldout, ready.length, pad, config, place)
    if model is None:
        return  # the first process does the rest

    after = models.answers(model, tokenizer, ready.prompts, defaults)
    if config.lora_rank and config.merge:
        model = adapters.merged(model)
    folder = Path(config.output)
    models.save_package(model, tokenizer, folder, defaults, package_files(ready, history, before, after))
    shutil.rmtree(place, ignore_errors=True)
    use = f"Talk to it: python app.py --model {folder}"
    if not ready.assistant:
        use = f"It continues texts; to have it follow instructions, python train.py --base {folder} --data YOUR.jsonl"
    print(f"{folder} is ready. {use}")
    if ready.repo:
        print(f"Pushed to {hub.push(folder, ready.repo, config.private)}")


def prepare(argv: list[str]) -> Prepared:
    """Everything that can be wrong before a model is loaded, found out; the records read and tokenised."""
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
    length = row_length(config, models.window(config.base))

    read, broken = records.read_records(config.data)
    texts_only = bool(read) and all(record.text is not None for record in read)
    tokenizer = base_tokenizer if texts_only else dolly_tokenizer(base_tokenizer)
    tokenizer.model_max_length = length
    train_part, heldout_part = records.split(read, config.validation)
    training, long = packing.tokenize(train_part, tokenizer, length, base_tokenizer)
    heldout, long_too = packing.tokenize(heldout_part, tokenizer, length, base_tokenizer)
    dropped = sort_out(broken + long + long_too, len(read) + len(broken), config)
    if not training:
        raise UserError(f"{config.data} has no record left to train on: all {len(read) + len(broken)} were dropped.")
    tell_cuts(training + heldout)
    prompts = [record.messages[0]["content"] for record in heldout_part if len(record.messages) == 2]
    prompts = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) <= length // 2][:SAMPLES]
    license = models.license_of(config.base)
    repo = hub.check_write(config.push_to_hub, config.private) if config.push_to_hub and launch.is_first() else None
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


def row_length(config: TrainConfig, window: int | None) -> int:
    if config.max_length and window and config.max_length > window:
        raise UserError(f"--max-length {config.max_length} is more than {config.base} sees at once ({window} tokens).")
    return config.max_length or min(ROW, window or ROW)


def sort_out(problems, total: int, config: TrainConfig) -> Counter:
    """Counts the records that are left out, by reason; raises `UserError` unless the settings say to drop them."""
    from dolly.records import explain

    problems = sorted(problems, key=lambda problem: problem.line)
    if problems and config.bad_records == "stop":
        remedy = "Mend them, or leave them out with --bad-records drop."
        if any(problem.what.startswith("longer") for problem in problems):
            remedy += " A larger --max-length takes longer ones, as far as the base can see."
        raise UserError(explain(problems, config.data, total, remedy))
    print(f"{config.data}: {total - len(problems):,} records kept, {len(problems):,} dropped")
    if problems:
        print(explain(problems, config.data, total, "They are left out, as --bad-records drop asks."))
    return Counter(problem.what for problem in problems)


def tell_cuts(documents) -> None:
    pieces = Counter(document.line for document in documents)
    if cut := [count for count in pieces.values() if count > 1]:
        print(f"{len(cut):,} texts are longer than a row and were cut into {sum(cut):,} pieces; no token is lost")


def sampling(config: TrainConfig) -> dict:
    """The settings of the answers as transformers names them."""
    how = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if config.temperature == 0:
        how = {"do_sample": False}
    return how | {"max_new_tokens": config.max_new_tokens, "repetition_penalty": config.repetition_penalty}


def package_files(ready: Prepared, history: "History", before: list[str], after: list[str]) -> dict[str, str]:
    """The text files of the package by name: the card, the settings, the history."""
    from dolly import report, trainer

    config = ready.config
    samples = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(ready.prompts, before, after, strict=True)]
    facts = report.CardFacts(
        name=ready.repo or Path(config.output).name,
        base=config.base,
        license=ready.license,
        data=config.data,
        train_records=len({document.line for document in ready.training}),
        validation_records=len({document.line for document in ready.heldout}),
        settings=dataclasses.asdict(config),
        steps=history.steps,
        tokens=history.tokens,
        seconds=history.seconds,
        hardware=trainer.hardware(),
        dtype=trainer.precision(config),
        heldout_before=history.heldout[0] if ready.heldout else None,
        heldout_after=history.heldout[-1] if ready.heldout else None,
        heldout_by_category=history.heldout_by_category,
        dropped=ready.dropped,
        categories=Counter({d.line: d.category for d in ready.training + ready.heldout}.values()),
        history=history.rows,
        samples=samples,
        examples=widget_prompts(),
        assistant=ready.assistant,
    )
    return {
        "README.md": report.model_card(facts),
        "train.yaml": yaml.safe_dump(facts.settings, sort_keys=False),
        "history.json": json.dumps(dataclasses.asdict(history), indent=1),
    }


def widget_prompts() -> dict[str, str]:
    categories = yaml.safe_load(EXAMPLES.read_text(encoding="utf-8"))["categories"]
    return {category["name"]: category["prompts"][0] for category in categories}


if __name__ == "__main__":
    with told_plainly():
        main(sys.argv[1:])
    launch.leave()
