"""Small models and tokenizers of the families that Dolly supports, built here: no test needs a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Tokenizer,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

ROOT = Path(__file__).parent.parent
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2}
CONFIGS = {
    "gpt_neox": (GPTNeoXConfig, SMALL | {"max_position_embeddings": 256}),
    "gptj": (GPTJConfig, SMALL_GPT | {"n_positions": 256, "rotary_dim": 8}),
    "gpt2": (GPT2Config, SMALL_GPT | {"n_positions": 256}),
    "llama": (LlamaConfig, SMALL | {"max_position_embeddings": 256, "num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, SMALL | {"max_position_embeddings": 256, "num_key_value_heads": 1, "head_dim": 16}),
}
FAMILIES = sorted(CONFIGS)
QUESTION, ANSWER = "Which fruit is yellow?", "The banana."  # what `packages` have learned by heart


def texts() -> list[str]:
    lines = (ROOT / "data" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:3000:10]
    rows = map(json.loads, lines)
    return [row["instruction"] + "\n" + row["response"] for row in rows if "response" in row]


def byte_level(split: pre_tokenizers.PreTokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **options)


def sentencepiece_like(prepend: str) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: a word mark before words, byte fallback, and a first token that begins every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer.train_from_iterator(
        (word for text in texts() for word in text.split()),
        trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3], show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    for token in special[3:]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def base_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`gpt_neox`: the embedded base's; `gpt2`: of that class, with no padding token; `llama`, `mistral`; `qwen3`."""
    if kind == "gpt2":
        made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
        spec = json.loads(made.backend_tokenizer.to_str())["model"]
        return GPT2Tokenizer(vocab=spec["vocab"], merges=[tuple(merge) for merge in spec["merges"]])
    if kind == "qwen3":
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return byte_level(pre_tokenizers.Sequence([split, byte]), pad_token="<|padding|>")
    if kind in ("llama", "mistral"):
        return sentencepiece_like("always" if kind == "llama" else "first")
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "data" / "base")


def save_base(folder: Path, family: str, rows: int | None = None, **changes) -> Path:
    """A random model of a family with a tokenizer of its kind, saved as a base; `rows` sets its embedding's size."""
    tokenizer = base_tokenizer({"gptj": "gpt2"}.get(family, family))
    kind, options = CONFIGS[family]
    torch.manual_seed(0)
    config = kind(vocab_size=rows or len(tokenizer), **options | changes)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*args, timeout=120, **env) -> subprocess.CompletedProcess:
    """A command of the project's as a user types it, from the project's folder."""
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=os.environ | alone | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def packages(bases, tmp_path_factory) -> dict[str, Path]:
    """Of each family a model that has learned two answers by heart."""
    import train

    folder = tmp_path_factory.mktemp("packages")
    rows = [{"instruction": QUESTION, "response": ANSWER}, {"instruction": "Which is red?", "response": "The cherry."}]
    (folder / "fruit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    for family in FAMILIES:
        options = {
            "base": bases[family], "data": folder / "fruit.jsonl", "output": folder / family, "validation": 0,
            "epochs": 60, "max_length": 128, "batch_tokens": 256, "learning_rate": 1e-2, "dtype": "float32",
            "temperature": 0, "max_new_tokens": 40,
        }  # fmt: skip
        train.main([part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))])
    return {family: folder / family for family in FAMILIES}
