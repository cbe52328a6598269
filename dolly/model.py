"""Models: loading a base, giving it the control tokens, saving the package, loading a package to talk to.

The package is a plain transformers folder without code: `pipeline("text-generation", model=FOLDER)` gives a string
without white space at its ends and a list of messages the same ids, and stops at `### End`.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, model_info, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dolly.errors import UserError
from dolly.prompt import CONTROL_TOKENS, END

MAX_SHARD = "5GB"
# What transformers raises for files that are missing, damaged, or do not fit together.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # transformers imports DeepSpeed, which else warns of the missing GPU


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises `UserError` when there is none to be had."""
    return _load(AutoTokenizer, name)


def window(name: str) -> int | None:
    """Tokens that the model of a folder or Hub id can see at once; None when its configuration does not say."""
    return getattr(_load(AutoConfig, name).get_text_config(), "max_position_embeddings", None)


def license_of(name: str) -> str | None:
    """What the card of a folder or Hub id says of its licence, as the Hub spells it."""
    card = Path(name) / "README.md"
    try:
        return ModelCard.load(card if Path(name).is_dir() else name).data.license
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return None


def load_base(name: str) -> PreTrainedModel:
    """A model to fine-tune, with float32 weights; autocast lowers the products where the hardware is good at it."""
    return _load(AutoModelForCausalLM, name, dtype=torch.float32)


def load_package(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fine-tuned model and its tokenizer, ready to answer, on the GPU where there is one.

    Raises `UserError` when the package does not exist or its tokenizer lacks the control tokens.
    """
    tokenizer = load_tokenizer(name)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in CONTROL_TOKENS if token not in vocabulary]:
        raise UserError(
            f"{name} was not trained with Dolly's prompt: its tokenizer lacks {', '.join(map(repr, missing))}. "
            f"Fine-tune it first: python train.py --base {name} --data YOUR.jsonl --output models/mine"
        )
    cuda = torch.cuda.is_available()
    model = _load(AutoModelForCausalLM, name, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def add_control_tokens(
    model: PreTrainedModel, base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gives tokens that `tokenizer` has and `base` lacks the mean embedding, growing the table only when it is full.

    Bases pad their table (Pythia: 50,254 tokens in 50,304 rows); shrinking it to the tokenizer would lose the padding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    known = base.get_vocab()
    new = [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS if token not in known]
    if not new:
        return
    old = min(len(base), rows)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[new] = layer.weight[:old].mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[new] = layer.bias[:old].mean()


def generation_defaults(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, **sampling) -> GenerationConfig:
    """How the package answers unless asked otherwise: `sampling`, and an end at `### End` or the base's own end."""
    ends = [tokenizer.convert_tokens_to_ids(END)]
    base_end = model.config.get_text_config().eos_token_id
    for end in base_end if isinstance(base_end, list) else [base_end]:
        if end is not None and end not in ends:
            ends.append(end)
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **sampling)


def save_package(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    defaults: GenerationConfig,
    files: dict[str, str],
) -> None:
    """Writes the package and further text `files`; it appears whole or not at all. Turns `model` to bfloat16.

    Raises `UserError` when the folder cannot be written, and says where the model is when it is whole elsewhere.
    """
    model.generation_config = defaults
    model.config.get_text_config().eos_token_id = defaults.eos_token_id[0]
    model.config.get_text_config().pad_token_id = defaults.pad_token_id
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, beside, ignore_errors=True)
            model.to(torch.bfloat16).save_pretrained(beside, max_shard_size=MAX_SHARD)
            tokenizer.save_pretrained(beside)
            _for_transformers_4(beside / "tokenizer_config.json")
            for name, text in files.items():
                (beside / name).write_text(text, encoding="utf-8")
            for path in [beside, *beside.iterdir()]:  # mkdtemp and safetensors make them readable by their owner only
                path.chmod(0o755 if path.is_dir() else 0o644)
            undo.pop_all()
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model cannot be saved in {folder}: {error}.") from None
    try:
        beside.replace(folder)  # over an empty folder, if there is one
    except OSError as error:
        raise UserError(f"The model is whole in {beside}, but could not be moved to {folder}: {error}.") from None


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], defaults: GenerationConfig
) -> list[str]:
    """One answer to each prompt as the package would give it; the same ones every time."""
    if not prompts:
        return []
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    room = tokenizer.model_max_length - batch.input_ids.shape[1]
    torch.manual_seed(0)
    within = copy.deepcopy(defaults)
    within.max_new_tokens = min(defaults.max_new_tokens, room)
    ids = model.eval().generate(**batch, generation_config=within)
    return [
        text.strip() for text in tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    ]


def _for_transformers_4(path: Path) -> None:
    """The form of tokenizer_config.json that transformers 4 and 5 both read; 5 writes one that 4 refuses."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", list(CONTROL_TOKENS))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(loader, name: str, **options):
    _check_there(name)
    try:
        return loader.from_pretrained(name, **options)
    except UNREADABLE as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} does not hold a model that transformers can load ({type(error).__name__}: {said}). If files are "
            "missing or cut off, fetch them again; after a git clone, run `git lfs pull`."
        ) from None


def _check_there(name: str) -> None:
    """Raises `UserError` for a model that is nowhere, in a moment; transformers would ask again and again for 45 s."""
    path = Path(name)
    if path.is_dir():
        return
    looks_local = path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and path.parent.is_dir())
    if looks_local or path.suffix == ".yaml" or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
        raise UserError(f"There is no folder {name} (looked in {Path.cwd()}).")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"There is no folder {name}, and no model of that name on the Hugging Face Hub that you may read. "
            "Check the spelling; for a private or gated model log in with `hf auth login`."
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"There is no folder {name}, and the Hugging Face Hub cannot be asked for a model of that name ({error}). "
            "Check the spelling and the network."
        ) from None
