"""One measurement: one system fine-tunes one model on one set of records, in a process of its own.

`python -m benchmarks.systems TASK.json` prints what it measured as the last line of its output, in JSON. All systems
get the same token ids with the same answer tokens, first weights, optimizer, learning rate and number of updates, for
one epoch; each makes its batches its own way.
"""

import json
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    GPTJConfig,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available

from dolly.config import TrainConfig
from dolly.model import add_control_tokens, load_base, load_tokenizer
from dolly.packing import IGNORED, Document, pack
from dolly.prompt import RESPONSE, dolly_tokenizer

BASE = Path(__file__).absolute().parent.parent / "data" / "base"
RECORDS_OF_2023 = 8  # in a batch
WARM_UP = 1  # updates before the clock starts


def neox(hidden: int, layers: int, heads: int) -> GPTNeoXConfig:
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return GPTNeoXConfig(vocab_size=50304, intermediate_size=4 * hidden, **shape)


# Random weights in the shapes that EleutherAI released; `gptj-small` is GPT-J with fewer layers and heads.
SHAPES = {
    "pythia-70m": neox(512, 6, 8),
    "gptj-small": GPTJConfig(n_embd=512, n_layer=4, n_head=2),
    "pythia-410m": neox(1024, 24, 16),
    "pythia-1.4b": neox(2048, 24, 16),
    "gpt-j-6b": GPTJConfig(),
}


@dataclass(frozen=True)
class Task:
    system: str
    model: str
    device: str  # cpu or cuda
    threads: int
    dtype: str  # of the matrix products: float32 or bfloat16
    length: int  # tokens of a packed row
    updates: int
    records: int  # of one update; a multiple of 8
    learning_rate: float
    documents: str  # a file of {"training": [[ids, learned]], "heldout": ...}


def build(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model with float32 weights, the same every time, and the tokenizer that made the records."""
    base = load_tokenizer(str(BASE))
    tokenizer = dolly_tokenizer(base)
    torch.manual_seed(0)
    if name in SHAPES:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.float32), tokenizer
    model = load_base(str(BASE))
    add_control_tokens(model, base, tokenizer)
    return model.to(device), tokenizer


def labels(document: Document) -> list[int]:
    return np.where(document.learned, document.ids, IGNORED).tolist()


def rows_of(documents: list[Document], task: Task) -> int:
    return len(pack([len(document.ids) for document in documents], task.length))


# ---- the systems: each trains `model` in place -----------------------------------------------------------------------


def common(task: Task, folder: str) -> dict:
    """What the trainers of transformers and TRL call the settings that all systems share."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": task.dtype == "bfloat16",
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device == "cuda",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": 0,
    }


def faster_attention(model: PreTrainedModel, task: Task) -> None:
    """On the CPU eager, which is faster than SDPA for lengths of instructions: 1.15-1.25 times in bfloat16, 1.03 in
    float32 (embedded base, 2023 and TRL; FlexAttention has no gradient there). On CUDA transformers chooses SDPA.
    """
    if task.device == "cpu":
        model.set_attn_implementation("eager")


class CompletionOnly(DataCollatorForLanguageModeling):
    """The collator of databrickslabs/dolly, training/trainer.py: it searches the response key in every row, and masks
    all that ends with it.
    """

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        response = self.tokenizer.convert_tokens_to_ids(RESPONSE)
        masked = batch["labels"].clone()
        for i in range(len(examples)):
            found = np.where(batch["labels"][i] == response)[0]
            if not len(found):
                raise RuntimeError(f"Could not find response key {response} in token IDs {batch['labels'][i]}")
            masked[i, : found[0] + 1] = IGNORED
        batch["labels"] = masked
        return batch


def dolly_2023(model: PreTrainedModel, training: list[Document], tokenizer, task: Task, folder: str) -> None:
    """training/trainer.py of databrickslabs/dolly, on today's transformers, which is kinder to it than that of 2023:
    a fused AdamW, and a loss that accumulates exactly. Gradient checkpointing, its default, is off.
    """
    faster_attention(model, task)
    tokenizer.padding_side = "right"
    arguments = TrainingArguments(
        **common(task, folder),
        per_device_train_batch_size=RECORDS_OF_2023,
        gradient_accumulation_steps=task.records // RECORDS_OF_2023,
        remove_unused_columns=False,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [document.ids.tolist() for document in training]}),
        data_collator=CompletionOnly(tokenizer=tokenizer, mlm=False, return_tensors="pt", pad_to_multiple_of=8),
    ).train()


def trl(model: PreTrainedModel, training: list[Document], tokenizer, task: Task, folder: str, **batches) -> None:
    """TRL's SFTTrainer as it is released, at the settings that are fastest here.

    Tried on one CPU thread with the embedded base: torch_compile=True is no faster (and compiles for 5 minutes), nor
    are batches of 4 or 16 records for 8, padding to a multiple of 16, or packed batches of 3 rows for 1. Its LM head,
    which has no setting, costs most: without Triton it scores every position and adds up gradients in float32
    products.
    """
    from trl import SFTConfig, SFTTrainer  # here alone: the others shall not pay for its import

    SFTTrainer(
        model=model,
        args=SFTConfig(**common(task, folder), max_length=task.length, **batches),
        train_dataset=Dataset.from_dict(
            {"input_ids": [document.ids.tolist() for document in training], "labels": [labels(d) for d in training]}
        ),
        processing_class=tokenizer,
    ).train()


def trl_padded(model: PreTrainedModel, training: list[Document], tokenizer, task: Task, folder: str) -> None:
    """Batches of like lengths in an order by chance: what group_by_length makes of a large set. Of a set as small as
    here it would make worse ones, as it sorts shares of the set.
    """
    faster_attention(model, task)
    size = 8 if task.device == "cpu" else min(32, task.records)
    longest_first = sorted(training, key=lambda document: -len(document.ids))
    batches = [longest_first[at : at + size] for at in range(0, len(training), size)]
    whole = [batch for batch in batches if len(batch) == size]
    random.Random(0).shuffle(whole)
    ordered = [document for batch in whole + batches[len(whole) :] for document in batch]
    shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": task.records // size}
    trl(model, ordered, tokenizer, task, folder, train_sampling_strategy="sequential", **shape)


def trl_packed(model: PreTrainedModel, training: list[Document], tokenizer, task: Task, folder: str) -> None:
    """Best-fit decreasing. A batch is one long row: without FlashAttention its mask grows by the square of its rows."""
    flash = is_flash_attn_2_available()
    if flash:
        model.set_attn_implementation("flash_attention_2")
    else:
        faster_attention(model, task)
    rows = -(-rows_of(training, task) // task.updates)
    batch = next(n for n in (8, 4, 2, 1) if rows % n == 0) if flash else 1
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch}
    trl(model, training, tokenizer, task, folder, packing=True, **shape)


def dolly(model: PreTrainedModel, training: list[Document], tokenizer, task: Task, folder: str) -> None:
    from dolly.trainer import train  # here alone, as TRL

    config = TrainConfig(
        epochs=1,
        batch_tokens=rows_of(training, task) * task.length // task.updates,
        learning_rate=task.learning_rate,
        schedule="constant",
        warmup=0.0,
        evaluations=1,
        dtype=task.dtype,
        gradient_checkpointing="off",
    )
    train(model, training, [], task.length, tokenizer.pad_token_id, config)


SYSTEMS = {"2023": dolly_2023, "trl-padded": trl_padded, "trl-packed": trl_packed, "dolly": dolly}


# ---- the measurement -------------------------------------------------------------------------------------------------


class Meter:
    """Within it, counts the real tokens that reach a model, and takes the time of the updates after the warm-up.

    The clock hangs on the optimizer and the count on the model: it is the same for every system.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, updates: int):
        self.model, self.pad_id, self.marks, self.updates, self.taken = model, pad_id, (WARM_UP, updates), 0, []
        self.tokens = torch.zeros((), dtype=torch.long, device=model.device)

    def __enter__(self):
        counting = self.model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.hooks = [counting, register_optimizer_step_post_hook(self.updated)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def count(self, model, args, kwargs) -> None:
        self.tokens += (kwargs["input_ids"] != self.pad_id).sum()

    def updated(self, *_) -> None:
        self.updates += 1
        if self.updates in self.marks:
            tokens = self.tokens.item()  # waits for the device
            self.taken.append((time.perf_counter(), time.process_time(), tokens))

    def between(self) -> tuple[float, float, int]:
        """Seconds, seconds of processor time, and real tokens from the end of the first update to that of the last."""
        begin, end = self.taken
        return tuple(after - before for before, after in zip(begin, end, strict=True))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, documents: list[Document]) -> float:
    """Mean loss in nats of an answer token, each document alone, in float32."""
    summed = 0.0
    for document in documents:
        ids = torch.tensor(document.ids[None], dtype=torch.long, device=model.device)
        targets = torch.tensor(labels(document)[1:], device=model.device)
        logits = model.eval()(ids, use_cache=False).logits[0, :-1]
        summed += F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED).item()
    return summed / sum(document.answer_tokens() for document in documents)


def flops(model: PreTrainedModel, documents: list[Document]) -> float:
    """Floating-point operations of training on a token: 6 for each weight, and those of causal attention."""
    shape = model.config
    lengths = np.array([len(document.ids) for document in documents])
    attention = 6 * shape.num_hidden_layers * shape.hidden_size * (lengths**2).sum() / lengths.sum()
    return 6 * model.num_parameters() + float(attention)


def documents_of(task: Task) -> tuple[list[Document], list[Document]]:
    """Training and held-out ones."""
    parts = json.loads(Path(task.documents).read_text(encoding="utf-8"))
    made = {
        name: [Document(np.array(ids, dtype=np.int32), np.array(learned, dtype=bool)) for ids, learned in rows]
        for name, rows in parts.items()
    }
    return made["training"], made["heldout"]


def measure(task: Task) -> dict:
    """Raises `RuntimeError` when the system did other updates than it was to, or saw other tokens."""
    torch.set_num_threads(task.threads)
    disable_progress_bars()
    training, heldout = documents_of(task)
    model, tokenizer = build(task.model, task.device)
    meter = Meter(model, tokenizer.pad_token_id, task.updates)
    with tempfile.TemporaryDirectory() as folder, meter:
        SYSTEMS[task.system](model, training, tokenizer, task, folder)
    seen, real = meter.tokens.item(), sum(len(document.ids) for document in training)
    if (meter.updates, seen) != (task.updates, real):
        raise RuntimeError(f"{meter.updates} updates saw {seen} tokens, but {task.updates} were to see {real}")
    seconds, cpu_seconds, tokens = meter.between()
    if task.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
    trained, _ = build(task.model, task.device)  # without what a system has put around its forward pass
    trained.load_state_dict(model.state_dict())
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "peak_gib": peak,
        "heldout_loss": heldout_loss(trained, heldout),
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "flops_per_token": flops(trained, training),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
