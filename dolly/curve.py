"""The learning curve: would more data help? Fine-tunes on shares of a file and compares on the same held-out records.

The shares are nested: each record of a smaller one is in the larger. A smaller one is trained for as many passes and,
again, for as many updates as the whole; the better of the two counts, or more data would only mean more training. So it
takes three and a half times as long as the fine-tuning. Whether the last step, from 30 to 100 %, helped is judged on
pairs: the same held-out record before and after, its difference against the spread of all differences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from dolly import trainer
from dolly.config import TrainConfig
from dolly.evaluate import record_losses
from dolly.packing import Document

SHARES = (0.1, 0.3, 1.0)
FEW = 10  # held-out records of a category below which nothing is said
SURE, SURE_OF_MANY = 2, 3  # standard errors, for the whole and for each of many categories
WORTH = 0.01  # share of the loss that twice the data must save to be worth writing them


@dataclass(frozen=True)
class Verdict:
    """Of a category, `None` for all: its held-out loss for each share, and what twice the data would make of it."""

    category: str | None
    records: int  # in training
    losses: list[float]
    error: float  # standard error of the last difference
    doubled: float
    helps: str  # yes, a little, no or unclear


def learning_curve(
    training: list[Document],
    heldout: list[Document],
    length: int,
    pad_id: int,
    config: TrainConfig,
    fresh: Callable[[], PreTrainedModel],
) -> list[Verdict]:
    """The verdicts, that of all records first. fresh: gives the model as it is before training, anew each time."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(config.seed)).tolist()
    products = trainer.precision(config)

    def trained(share: float, config: TrainConfig) -> tuple[int, torch.Tensor]:
        part = [training[i] for i in order[: max(1, round(share * len(order)))]]
        history, model = trainer.train(fresh(), part, [], length, pad_id, config)
        return history.steps, record_losses(model, heldout, length, products)

    updates, whole = trained(1.0, config)
    measured = []
    for share in SHARES[:-1]:
        longer = replace(config, epochs=math.ceil(config.epochs / share), max_steps=updates)
        runs = [trained(share, each)[1] for each in (config, longer)]
        measured.append(min(runs, key=lambda sums: float(sums[:, 0].sum())))
    measured.append(whole)
    names = sorted({document.category for document in heldout})
    counts = {name: sum(document.category == name for document in training) for name in names}
    verdicts = [verdict(None, len(training), measured, torch.ones(len(heldout), dtype=torch.bool))]
    if len(names) > 1:
        for name in names:
            chosen = torch.tensor([document.category == name for document in heldout])
            verdicts.append(verdict(name, counts[name], measured, chosen))
    return verdicts


def verdict(category: str | None, records: int, measured: list[torch.Tensor], chosen: torch.Tensor) -> Verdict:
    """measured: for each share `trainer.document_losses` of all held-out records; chosen: those of the category."""
    sums = [each[chosen] for each in measured]
    losses = [float(each[:, 0].sum() / each[:, 1].sum()) for each in sums]
    tokens = sums[-1][:, 1]
    saved = (sums[-2] - sums[-1])[:, 0]  # nats of each record
    gain = losses[-2] - losses[-1]
    # Of a ratio of sums, by the residuals of its records (Cochran, Sampling Techniques, section 6.4).
    count = len(tokens)
    error = float((saved - gain * tokens).square().sum().sqrt() / tokens.sum()) * math.sqrt(count / max(1, count - 1))
    sure = SURE if category is None else SURE_OF_MANY
    doubled = losses[-1] - gain * math.log(2) / math.log(SHARES[-1] / SHARES[-2])
    if count < FEW or abs(gain) <= sure * error:
        helps = "unclear"
    elif gain < 0:
        helps = "no"
    else:
        helps = "yes" if losses[-1] - doubled > WORTH * losses[-1] else "a little"
    return Verdict(category, records, losses, error, doubled, helps)


def report(verdicts: list[Verdict]) -> str:
    """The verdicts as Markdown, with what to do."""
    shares = " | ".join(f"{share:.0%}" for share in SHARES)
    lines = [f"| category | records | {shares} | twice the data | would more help? |", "|---|" + "---:|" * 5 + "---|"]
    for v in verdicts:
        name = "all" if v.category is None else v.category or "(none)"
        losses = " | ".join(f"{loss:.3f}" for loss in v.losses)
        lines.append(f"| {name} | {v.records:,} | {losses} | {v.doubled:.3f} | {v.helps} |")
    told = (
        "Held-out loss in nats a token of the answers, after fine-tuning on that share of the records. `twice the "
        f"data` continues the last step. `unclear`: the step is within {SURE} standard errors of nothing (in a "
        f"category {SURE_OF_MANY}), or fewer than {FEW} held-out records tell. These errors are of the held-out sample "
        "alone; another seed may differ by more."
    )
    return "\n".join([*lines, "", told]) + "\n"
