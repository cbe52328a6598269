"""Models: loading a base, giving it the control tokens, saving the package, loading a package to talk to.

The package is a plain transformers folder without code: `pipeline("text-generation", model=FOLDER)` gives a string
without white space at its ends and a list of messages the same ids, and stops at `### End`. A package of adapters
alone (see `dolly.adapters`) names its base, by Hub id or by the absolute path of a folder, and needs it to be loaded.
"""

import contextlib
import copy
import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, model_info, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import find_adapter_config_file, is_bitsandbytes_available

from dolly import launch
from dolly.errors import UserError
from dolly.loops import NoRepeatInAnswer
from dolly.prompt import CONTROL_TOKENS, dolly_tokenizer

MAX_SHARD = "5GB"
NEW = 256  # tokens of an answer at most, where the package does not say
AT_ONCE = 16  # prompts that are answered in one batch
ROW = 1024  # tokens of a row where --max-length is not given and the base can see that far
# https://huggingface.co/databricks/dolly-v2-3b/blob/main/instruct_pipeline.py
DOLLY_V2 = {"do_sample": True, "max_new_tokens": 256, "top_p": 0.92, "top_k": 0}
# What transformers raises for files that are missing, damaged, or do not fit together.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Weights in any format that transformers knows; a folder without such a file is a configuration to start from.
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth", "*.ckpt*", "*.h5", "*.msgpack", "*.gguf")
# Their attention is in float32 for this reason (modeling_gptj.py), or overflows (the card of microsoft/phi-2).
OVERFLOW_IN_FLOAT16 = {"codegen", "gpt_neo", "gptj", "phi"}
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


def row_length(name: str, asked: int | None) -> int:
    """Tokens of a row for a base: `--max-length`, else its window, at most `ROW`. Raises `UserError` for too many."""
    most = window(name)
    if asked and most and asked > most:
        raise UserError(f"--max-length {asked} is more than {name} sees at once ({most} tokens).")
    return asked or min(ROW, most or ROW)


def license_of(name: str) -> str | None:
    """What the card of a folder or Hub id says of its licence, as the Hub spells it."""
    card = Path(name) / "README.md"
    try:
        return ModelCard.load(card if Path(name).is_dir() else name).data.license
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return None


def overflows_in_float16(name: str) -> bool:
    """Whether activations of the model are known to exceed 65,504, or may, its weights being stored in bfloat16."""
    config = _load(AutoConfig, name)
    text = config.get_text_config()
    return text.model_type in OVERFLOW_IN_FLOAT16 or torch.bfloat16 in (config.dtype, text.dtype)


def starts_at_random(name: str) -> bool:
    """Whether a folder holds a configuration and no weights."""
    return Path(name, "config.json").is_file() and not any(any(Path(name).glob(pattern)) for pattern in WEIGHTS)


def load_base(name: str, dtype: torch.dtype = torch.float32, quantize: bool = False) -> PreTrainedModel:
    """A model to fine-tune with weights of `dtype`: float32 to train them (autocast lowers the products where the
    hardware is good at it), that of the products to freeze them under adapters.

    quantize: hold the matrices of the layers in 4 bits, NF4 with quantized constants (QLoRA, arXiv:2305.14314), on the
    current GPU where there is one. A folder that holds a configuration and no weights gives random ones, by torch's
    seed. Raises `UserError` where bitsandbytes is missing, or some of the weights.
    """
    if quantize and not is_bitsandbytes_available():
        raise UserError("--quantize needs bitsandbytes: pip install bitsandbytes")
    if starts_at_random(name):
        if quantize:
            raise UserError(f"{name} holds a configuration and no weights to quantize: leave --quantize out.")
        config = _load(AutoConfig, name)
        if launch.is_first():
            print(f"{name} holds a configuration and no weights: they start at random.")
        with _explained(name):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not quantize:
        return _load_model(name, dtype=dtype)
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = _load_model(name, dtype=dtype, quantization_config=in_4_bits)
    for module in model.modules():
        # A CPU with avx512_bf16 would pack the weights anew in the first evaluation, and these give no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_package(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fine-tuned model and its tokenizer, ready to answer, on the GPU where there is one.

    A package with the control tokens and no chat template is one like databricks/dolly-v2, whose prompt and sampling
    are in code beside it; that code is not run, what it says is known here. Raises `UserError` when the package does
    not exist or its tokenizer lacks the control tokens.
    """
    tokenizer = load_tokenizer(name)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in CONTROL_TOKENS if token not in vocabulary]:
        raise UserError(
            f"{name} was not trained with Dolly's prompt: its tokenizer lacks {', '.join(map(repr, missing))}. "
            f"Fine-tune it first: python train.py --base {name} --data YOUR.jsonl --output models/mine"
        )
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = _load_adapted(name, tokenizer, dtype) if _holds_adapters(name) else _load_model(name, dtype=dtype)
    if not tokenizer.chat_template:
        tokenizer = dolly_tokenizer(tokenizer, strips=False)
        tokenizer.model_max_length = window(name) or ROW
        model.generation_config = generation_defaults(tokenizer, model, **DOLLY_V2)
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def make_room(model: PreTrainedModel, base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Grows the embedding and the head if they have no rows for all tokens; the control tokens that `base` lacks.

    Bases pad their table (Pythia: 50,254 tokens in 50,304 rows); shrinking it to the tokenizer would lose the padding.
    """
    _grow(model, len(tokenizer))
    known = base.get_vocab()
    return [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS if token not in known]


def add_control_tokens(
    model: PreTrainedModel, base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Makes room for the control tokens that `base` lacks and gives them the mean embedding, to be trained from there.

    With adapters `dolly.adapters.add_adapters` does it instead, which leaves the rows of the base as they are.
    """
    if new := make_room(model, base, tokenizer):
        _set_to_mean(model, new, min(new))


def generation_defaults(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, **sampling) -> GenerationConfig:
    """How the package answers unless asked otherwise: `sampling`, and an end at `### End` or the base's own end."""
    ends = [tokenizer.eos_token_id]
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
    files: dict[str, str | bytes],
) -> None:
    """Writes the package and further `files`; it appears whole or not at all. Turns `model` to bfloat16, or
    saves its adapters alone, in float32, if it has some.

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
            if hasattr(model, "peft_config"):
                model.save_pretrained(beside, save_embedding_layers=False)
                defaults.save_pretrained(beside)
            else:
                model.to(torch.bfloat16).save_pretrained(beside, max_shard_size=MAX_SHARD)
            tokenizer.save_pretrained(beside)
            _for_transformers_4(beside / "tokenizer_config.json")
            for name, content in files.items():
                (beside / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            for path in [beside, *beside.iterdir()]:  # mkdtemp and safetensors make them readable by their owner only
                path.chmod(0o755 if path.is_dir() else 0o644)
            undo.pop_all()
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model cannot be saved in {folder}: {error}.") from None
    try:
        beside.replace(folder)  # over an empty folder, if there is one
    except OSError as error:
        raise UserError(f"The model is whole in {beside}, but could not be moved to {folder}: {error}.") from None


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool  # by itself, before the longest answer that is allowed


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], defaults: GenerationConfig
) -> list[Answer]:
    """One answer to each prompt as the chat would give it; the same ones every time."""
    torch.manual_seed(0)
    model.eval()
    made = []
    for at in range(0, len(prompts), AT_ONCE):
        batch = tokenizer(prompts[at : at + AT_ONCE], padding=True, return_tensors="pt").to(model.device)
        within = copy.deepcopy(defaults)
        within.max_new_tokens = min(
            defaults.max_new_tokens or NEW, tokenizer.model_max_length - batch.input_ids.shape[1]
        )
        own = LogitsProcessorList()
        if defaults.no_repeat_ngram_size:
            own.append(NoRepeatInAnswer(defaults.no_repeat_ngram_size, batch.input_ids.shape[1]))
            within.no_repeat_ngram_size = 0  # None would be the model's own
        ids = model.generate(**batch, generation_config=within, logits_processor=own)[:, batch.input_ids.shape[1] :]
        ends = torch.tensor(defaults.eos_token_id or tokenizer.eos_token_id, device=ids.device)
        ended = torch.isin(ids, ends).any(1).tolist()
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        made += [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]
    return made


def _for_transformers_4(path: Path) -> None:
    """The form of tokenizer_config.json that transformers 4 and 5 both read; 5 writes one that 4 refuses."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(loader, name: str, **options):
    _check_there(name)
    with _explained(name):
        return loader.from_pretrained(name, **options)


def _load_model(name: str, **options) -> PreTrainedModel:
    model, loaded = _load(AutoModelForCausalLM, name, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"{name} lacks weights of {type(model).__name__}: {named}. They would be random; "
            "the files are not whole, or are those of another kind of model."
        )
    return model


def _holds_adapters(name: str) -> bool:
    with _explained(name):  # a folder with a base as well is transformers' to put together
        return find_adapter_config_file(name) is not None and not Path(name, "config.json").exists()


def _load_adapted(name: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> PreTrainedModel:
    """The base of a package of adapters with these added to its weights."""
    from dolly import adapters  # peft takes three seconds to import

    with _explained(name):
        base = adapters.base_of(name)
    try:
        model = _load_model(base, dtype=dtype)
    except UserError as error:
        raise UserError(f"{name} holds adapters, which need the model that they were trained on. {error}") from None
    _grow(model, len(tokenizer))
    with _explained(name):
        model = adapters.merged(adapters.load_adapters(model, name))
    model.generation_config = _load(GenerationConfig, name)
    return model


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"The weights of {name} are a pickle that holds more than weights, and loading it could run any program. "
            "Take a version of the model with safetensors."
        ) from None
    except UNREADABLE as error:
        if getattr(error, "errno", None) in NO_ROOM:
            raise UserError(
                f"{name} finds no room in {HF_HUB_CACHE}: {error.strerror}. Make some there, or set HF_HOME to another "
                "folder; what has arrived is not fetched again."
            ) from None
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} does not hold a model that transformers can load ({type(error).__name__}: {said}). If files are "
            "missing or cut off, fetch them again; after a git clone, run `git lfs pull`."
        ) from None


def _grow(model: PreTrainedModel, rows: int) -> None:
    """Adds rows to the embedding and the head, the mean of those there, as transformers does but for its noise."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows > old:
        model.resize_token_embeddings(rows, mean_resizing=False)
        _set_to_mean(model, list(range(old, rows)), old)


@torch.no_grad()
def _set_to_mean(model: PreTrainedModel, rows: list[int], old: int) -> None:
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[rows] = layer.weight[:old].mean(0)
        if getattr(layer, "bias", None) is not None:
            layer.bias[rows] = layer.bias[:old].mean()


def _check_there(name: str) -> None:
    """Raises `UserError` for a model that is nowhere, in a moment; transformers would ask again and again for 45 s."""
    path = Path(name)
    if path.is_dir():
        return
    looks_local = path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and path.parent.is_dir())
    if looks_local or path.suffix == ".yaml" or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
        raise UserError(f"There is no folder {name} (looked in {Path.cwd()}).")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
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
