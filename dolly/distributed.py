"""Training in several processes: the accelerator, what each of them computes, the whole model at the end.

`torchrun` or `accelerate launch` starts them; each holds all weights (DDP) or a share of them (DeepSpeed's ZeRO).
"""

import contextlib
import math
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dolly.config import TrainConfig

PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PATIENCE = timedelta(hours=2)  # the first process answers sample prompts, and saves, while the others wait for it


@dataclass(frozen=True)
class Alone:
    """What the loss needs of an accelerator, for one process outside of a run."""

    device: torch.device
    products: str
    num_processes: int = 1
    process_index: int = 0

    def autocast(self):
        return torch.autocast(self.device.type, getattr(torch, self.products), enabled=self.products != "float32")

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return sums


def accelerator_of(config: TrainConfig, products: str) -> Accelerator:
    """The accelerator of this process for matrix products in `products`: alone, DDP, or DeepSpeed as configured."""
    plugin, cuda = deepspeed_plugin(config, products) if config.deepspeed else None, torch.cuda.is_available()
    handlers = [
        InitProcessGroupKwargs(backend="gloo" if plugin and not cuda else None, timeout=PATIENCE),
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    made = Accelerator(
        mixed_precision=PRECISION[products],
        cpu=not cuda and not plugin,  # `cpu` would be DDP to accelerate; DeepSpeed finds its device
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    if plugin:
        # transformers would shard models while loading, and have all processes generate together.
        unset_hf_deepspeed_config()
    return made


def deepspeed_plugin(config: TrainConfig, products: str) -> DeepSpeedPlugin:
    """ZeRO of the configured stage: weights in 16 bits where the products are, their master copy in float32."""
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop scales the loss, and says which micro-batch is the last
            "gradient_clipping": config.max_grad_norm,
            "bf16": {"enabled": products == "bfloat16"},
            "fp16": {"enabled": products == "float16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": int(config.deepspeed.removeprefix("zero")),
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
        zero3_init_flag=False,
    )


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model, last: bool):
    """Around a micro-batch: the processes exchange gradients in the last one of an update only."""
    accelerator.sync_gradients = last
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def share(rows: list[list[int]], processes: int, rank: int, micro_rows: int) -> list[list[list[int]]]:
    """The micro-batches of one process. Each gets as many of the same size, else the others would wait for ever;
    where the rows do not suffice, rows without documents stand in.
    """
    each = math.ceil(len(rows) / processes)
    mine = rows[rank::processes]
    mine = mine + [[]] * (each - len(mine))
    return [mine[at : at + micro_rows] for at in range(0, each, micro_rows)]


def whole(accelerator: Accelerator, prepared, model: PreTrainedModel) -> PreTrainedModel | None:
    """The trained model on its own in the first process, None in the others: every process has to call it.

    prepared: what `accelerator.prepare` made of `model`. Weights that ZeRO-3 holds in pieces are gathered.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return model if accelerator.is_main_process else None
    state = accelerator.get_state_dict(prepared)
    if not accelerator.is_main_process:
        return None
    alone = AutoModelForCausalLM.from_config(model.config, dtype=next(iter(state.values())).dtype)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model  # takes three seconds

        alone = get_peft_model(alone, model.peft_config["default"])
    alone.load_state_dict(state)
    return alone
