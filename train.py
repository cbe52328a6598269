"""Fine-tunes a causal language model on records of instructions and answers: settings -> run -> package (-> Hub).

python train.py --config configs/demo.yaml
python train.py --base EleutherAI/pythia-410m --data my.jsonl --output models/mine --push-to-hub mine
torchrun --nproc-per-node 8 train.py --config configs/zero3.yaml --data my.jsonl --output models/mine
"""

import dataclasses
import json
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dolly import launch
from dolly.config import TrainConfig
from dolly.errors import told_plainly
from dolly.prepare import Prepared, prepare, starting_model

if TYPE_CHECKING:  # torch and transformers take seconds to import: a mistake in the settings is told before
    from dolly.model import Answer
    from dolly.trainer import History

SAMPLES = 4  # held-out prompts whose answers the model card shows
EXAMPLES = Path(__file__).parent / "data" / "examples.yaml"


def main(argv: list[str]) -> None:
    ready = launch.once(lambda: prepare(argv))
    config, tokenizer = ready.config, ready.tokenizer
    from transformers.utils import logging

    from dolly import checkpoint, evaluate, hub, trainer
    from dolly import model as models

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another, DeepSpeed's at every step
    model = starting_model(ready)
    defaults = models.generation_defaults(tokenizer, model, **sampling(config))
    first, products = launch.is_first(), trainer.precision(config)
    before = models.answers(model, tokenizer, ready.prompts, defaults) if first else []
    texts = evaluate.plain_documents(config.base, ready.length) if first else []
    plain = [evaluate.losses(model, texts, ready.length, products)["all"]] if first else []
    place = checkpoint.place_of(config.output)
    pad = tokenizer.pad_token_id or 0  # the base's own may have none, and then any will do
    history, model = trainer.train(model, ready.training, ready.heldout, ready.length, pad, config, place)
    if model is None:
        return  # the first process does the rest

    after = models.answers(model, tokenizer, ready.prompts, defaults)
    plain.append(evaluate.losses(model, texts, ready.length, products)["all"])
    if config.lora_rank and config.merge:
        from dolly import adapters  # peft takes three seconds to import

        model = adapters.merged(model)
    folder = Path(config.output)
    models.save_package(model, tokenizer, folder, defaults, package_files(ready, history, before, after, plain))
    shutil.rmtree(place, ignore_errors=True)
    use = f"Talk to it: python app.py --model {folder}"
    if not ready.assistant:
        use = f"It continues texts; to have it follow instructions, python train.py --base {folder} --data YOUR.jsonl"
    print(f"{folder} is ready. {use}")
    if ready.repo:
        print(f"Pushed to {hub.push(folder, ready.repo, config.private)}")


def sampling(config: TrainConfig) -> dict:
    """The settings of the answers as transformers names them."""
    how = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if config.temperature == 0:
        how = {"do_sample": False}
    same = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
    return how | {name: getattr(config, name) for name in same}


def package_files(
    ready: Prepared, history: "History", before: list["Answer"], after: list["Answer"], plain: list[float]
) -> dict[str, str | bytes]:
    """What lies beside the model, by name: the card with its curve, the settings, the history."""
    from dolly import evaluate, faults, plot, report, trainer

    config = ready.config
    answered = zip(ready.prompts, before, after, strict=True)
    samples = [{"prompt": prompt, "before": b.text, "after": a.text} for prompt, b, a in answered]
    samples = [sample for sample in samples if not faults.private("\n".join(sample.values()))][:SAMPLES]
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
        quality=[evaluate.quality(before), evaluate.quality(after)] if ready.prompts else [],
        plain_text=plain,
        dropped=ready.dropped,
        categories=Counter({d.line: d.category for d in ready.training + ready.heldout}.values()),
        history=history.rows,
        samples=samples,
        examples=widget_prompts(),
        assistant=ready.assistant,
    )
    return {
        "README.md": report.model_card(facts),
        report.CURVE: plot.training_curve(history.rows),
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
