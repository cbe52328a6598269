"""Adapters: small matrices trained beside the frozen ones of the layers (LoRA, arXiv:2106.09685), by peft.

The control tokens need rows of their own in the embedding and the head: the mean of all rows, which they begin with,
has the mean of all logits, and the mean is never the greatest, so no answer would end. Each table gets an adapter for
these rows: W + B A, where A (the embedding's B) are the changed rows, and the other factor, frozen, only says which
they are. It is an adapter like the others, which peft, transformers and vLLM load. peft's `trainable_token_indices`
copies both tables in every forward pass, takes the gradient of all their rows and forgets the head's bias (GPT-J, Phi).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dolly.prompt import CONTROL_TOKENS

ADAPTER = "default"  # peft's name for the only one


def add_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[int],
    rank: int,
    alpha: int | None = None,
) -> PeftModel:
    """Freezes `model` and puts adapters of `rank` beside all matrices of its layers, and some for the control tokens.

    The adapters are float32 whatever the weights are; their products count `alpha / rank` times (by default twice).
    They change nothing yet, but that `new_tokens`, for which there must be rows, have the mean of those before them. A
    tokenizer without control tokens, for plain texts, needs no rows.
    """
    alpha = 2 * rank if alpha is None else alpha
    vocabulary = tokenizer.get_vocab()
    rows = [vocabulary[token] for token in CONTROL_TOKENS if token in vocabulary]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    targets = [name for module, name in names.items() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    tables = [names[embedding], names[head]] if rows else []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets + tables,
        rank_pattern=dict.fromkeys(tables, len(rows)),
        alpha_pattern=dict.fromkeys(tables, len(rows) * alpha / rank),  # one scale for all: vLLM knows no other
    )
    with _without_advice():
        adapted = get_peft_model(model, config)
    if Path(model.name_or_path, "config.json").is_file():
        config.base_model_name_or_path = str(Path(model.name_or_path).resolve())
    if not rows:
        return adapted

    first, last = model.get_input_embeddings(), model.get_output_embeddings()  # by now with adapters
    which = F.one_hot(torch.tensor(rows, device=first.weight.device), len(first.weight)).float()
    with torch.no_grad():
        first.lora_embedding_A[ADAPTER].copy_(which).requires_grad_(False)
        first.lora_embedding_B[ADAPTER].copy_(_to_the_mean(first.weight, rows, new_tokens).T * rank / alpha)
        last.lora_B[ADAPTER].weight.copy_(which.T).requires_grad_(False)
        if last.weight is first.weight:
            last.lora_A[ADAPTER] = TiedRows(first)
        else:
            last.lora_A[ADAPTER].weight.copy_(_to_the_mean(last.weight, rows, new_tokens) * rank / alpha)
    return adapted


def _to_the_mean(table: torch.Tensor, rows: list[int], new: list[int]) -> torch.Tensor:
    """What turns the rows of `new` into the mean of those before them, and 0 for the others of `rows`: [rows, size]."""
    change = torch.zeros(len(rows), table.shape[1], device=table.device)
    for at, row in enumerate(rows):
        if row in new:
            change[at] = table[: min(new)].mean(0, dtype=torch.float32) - table[row]
    return change


class TiedRows(nn.Module):
    """The rows that an embedding's adapter trains, for the head that is tied to it: [tokens, size]."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._embedding = [embedding]  # in a list, for it is no part of this module

    @property
    def weight(self) -> torch.Tensor:
        return self._embedding[0].lora_embedding_B[ADAPTER].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *args):
        """Nothing: the embedding loads them."""


def base_of(name: str) -> str:
    """The model that the adapters of a folder or Hub id were trained on."""
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_adapters(model: PreTrainedModel, name: str) -> PeftModel:
    """Puts the adapters of a folder or Hub id on their base. Raises `ValueError` if some are missing."""
    with _without_advice():
        adapted = get_peft_model(model, PeftConfig.from_pretrained(name))
    if missing := adapted.load_adapter(name, ADAPTER, torch_device=str(model.device)).missing_keys:
        raise ValueError(f"it lacks {len(missing)} of the adapters, {missing[0]} among them")
    return adapted


def merged(model: PeftModel) -> PreTrainedModel:
    """The base of `model`, which is used up, with the adapters added to its weights: it computes the same.

    Weights in 4 bits are unpacked, and the adapters added to what these stood for in training. Added to the weights as
    they were before (`load_base` once more), they gave the embedded base a held-out loss 0.003 nats higher.
    """
    base = model.get_base_model()
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    with _without_advice(), torch.no_grad():
        if isinstance(last, LoraLayer) and last.base_layer.weight is first.base_layer.weight:
            base.set_output_embeddings(last.base_layer)  # tied: one table, changed once
        if getattr(base, "hf_quantizer", None) is not None:
            for name, layer in list(base.named_modules()):
                if isinstance(layer, LoraLayer) and hasattr(layer.base_layer, "quant_state"):
                    base.set_submodule(name, _unpacked(layer))
            base.hf_quantizer.remove_quantization_config(base)
        return model.merge_and_unload()


def _unpacked(layer: LoraLayer) -> nn.Module:
    """The matrix in 4 bits under `layer`, of the class that the model is made of, with the adapters added."""
    packed = layer.base_layer
    weight = dequantize_module_weight(packed)
    weight = (weight.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype)
    with torch.device("meta"):
        if packed.source_cls is Conv1D:
            plain = Conv1D(packed.out_features, packed.in_features)
        else:
            plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if packed.source_cls is Conv1D else weight, requires_grad=False)
    if packed.bias is not None:
        plain.bias = nn.Parameter(packed.bias.to(weight.dtype), requires_grad=False)
    return plain


@contextmanager
def _without_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft sets it as each layer needs
        warnings.filterwarnings("ignore", "Model (with|has) `tie_word_embeddings=True`")  # seen to here
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which peft reads
        yield
