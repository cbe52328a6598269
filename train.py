"""Fine-tunes a causal language model on records of instructions and answers: settings -> run -> package (-> Hub).

python train.py --config configs/demo.yaml
python train.py --base EleutherAI/pythia-410m --data my.jsonl --output models/mine --push-to-hub mine
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import yaml

from dolly.config import TrainConfig, parse
from dolly.errors import UserError, told_plainly

ROW = 1024  # tokens of a row where --max-length is not given and the base can see that far
SAMPLES = 4  # held-out prompts answered before and after, for the model card
EXAMPLES = Path(__file__).parent / "data" / "examples.yaml"


def main(argv: list[str]) -> None:
    config = parse(argv)
    # torch and transformers take seconds to import: a mistake in the settings is told before.
    from transformers.utils import logging

    from dolly import hub, packing, records, report, trainer
    from dolly import model as models
    from dolly.prompt import dolly_tokenizer

    logging.disable_progress_bar()
    base_tokenizer = models.load_tokenizer(config.base)
    tokenizer = dolly_tokenizer(base_tokenizer)
    tokenizer.model_max_length = length = row_length(config, models.window(config.base))

    read, broken = records.read_records(config.data)
    train_part, heldout_part = records.split(read, config.validation)
    training, long = packing.tokenize(train_part, tokenizer, length)
    heldout, long_too = packing.tokenize(heldout_part, tokenizer, length)
    dropped = sort_out(broken + long + long_too, len(read) + len(broken), config)
    if not training:
        raise UserError(f"{config.data} has no record left to train on: all {len(read) + len(broken)} were dropped.")
    licence = models.license_of(config.base)
    repo = hub.check_write(config.push_to_hub, config.private) if config.push_to_hub else None

    model = models.load_base(config.base)
    models.add_control_tokens(model, base_tokenizer, tokenizer)
    defaults = models.generation_defaults(tokenizer, model, **sampling(config))
    prompts = [record.messages[0]["content"] for record in heldout_part if len(record.messages) == 2]
    prompts = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) <= length // 2][:SAMPLES]
    before = models.answers(model, tokenizer, prompts, defaults)
    history = trainer.train(model, training, heldout, length, tokenizer.pad_token_id, config)
    after = models.answers(model, tokenizer, prompts, defaults)

    folder = Path(config.output)
    facts = report.CardFacts(
        name=repo or folder.name,
        base=config.base,
        license=licence,
        data=config.data,
        train_records=len(training),
        validation_records=len(heldout),
        settings=dataclasses.asdict(config),
        steps=history.steps,
        tokens=history.tokens,
        seconds=history.seconds,
        hardware=trainer.hardware(),
        dtype=trainer.precision(config.dtype),
        heldout_before=history.heldout[0] if heldout else None,
        heldout_after=history.heldout[-1] if heldout else None,
        heldout_by_category=history.heldout_by_category,
        dropped=dropped,
        categories=Counter(document.category for document in training + heldout),
        history=history.rows,
        samples=[{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)],
        examples=widget_prompts(),
    )
    files = {"README.md": report.model_card(facts), "train.yaml": yaml.safe_dump(facts.settings, sort_keys=False)}
    models.save_package(model, tokenizer, folder, defaults, files)
    print(f"{folder} is ready. Talk to it: python app.py --model {folder}")
    if repo:
        print(f"Pushed to {hub.push(folder, repo, config.private)}")


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


def sampling(config: TrainConfig) -> dict:
    """The settings of the answers as transformers names them."""
    how = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if config.temperature == 0:
        how = {"do_sample": False}
    return how | {"max_new_tokens": config.max_new_tokens, "repetition_penalty": config.repetition_penalty}


def widget_prompts() -> dict[str, str]:
    categories = yaml.safe_load(EXAMPLES.read_text(encoding="utf-8"))["categories"]
    return {category["name"]: category["prompts"][0] for category in categories}


if __name__ == "__main__":
    with told_plainly():
        main(sys.argv[1:])
