"""A copy of a package that llama.cpp converts to GGUF, for Ollama and everything else that runs llama.cpp.

Two things of the package are lost on llama.cpp, and stand in its way: the post-processor that puts a plain string in
the prompt, for `convert_hf_to_gguf.py` knows a tokenizer by the ids of one text; and control tokens that take in the
white space around them, which it does not do. So the copy encodes a text as the base did, and its chat template writes
no white space around the control tokens: the ids of a chat are those that were trained.
"""

import json
import shutil
from pathlib import Path

from dolly.errors import UserError
from dolly.prompt import ANSWER, CONTROL_TOKENS, END, INSTRUCTION, RESPONSE, STOP, TURN

UNKNOWN = {"codegen", "gpt_neo", "gptj", "opt"}  # model types that the converter does not take, of likely bases
LEFT_OUT = ("train.yaml", "history.json", "*.png")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def prepare(package: Path, folder: Path) -> None:
    """Writes the copy. Raises `UserError` for what is no package of Dolly's, or of a kind that llama.cpp does not take,
    and for a folder that cannot be made."""
    try:
        *jsons, template = ((package / name).read_text(encoding="utf-8") for name in FILES)
        config, tokenizer, settings = map(json.loads, jsons)
    except (OSError, ValueError) as error:
        hint = "; adapters alone cannot be converted: train without --no-merge" * _holds_adapters(package)
        raise UserError(f"{package} is not the folder of a model that Dolly trained ({error}){hint}.") from None
    if settings.get("additional_special_tokens") != list(CONTROL_TOKENS):
        raise UserError(f"{package} is not the folder of a model that Dolly trained: it lacks the control tokens.")
    if config["model_type"] in UNKNOWN:
        raise UserError(f"llama.cpp does not take models of the type {config['model_type']}.")
    for spaced, bare in ((TURN, INSTRUCTION), (ANSWER, RESPONSE), (STOP, END)):
        template = template.replace(_escaped(spaced), _escaped(bare))
    for token in tokenizer["added_tokens"]:
        if token["content"] in CONTROL_TOKENS:
            token.update(lstrip=False, rstrip=False)
    first = tokenizer["post_processor"]["special_tokens"]["prompt"]
    tokenizer["post_processor"] = None
    if bos := settings.get("bos_token"):
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [_special(bos), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [_special(bos), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": first["ids"][:1], "tokens": first["tokens"][:1]}},
        }
    if config["model_type"] == "gpt_neox":  # transformers 5 writes it elsewhere
        config["rotary_pct"] = config["rope_parameters"]["partial_rotary_factor"]
    try:
        shutil.copytree(package, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The copy cannot be written to {folder}: {error.strerror}. Name a new folder.") from None


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n")


def _special(token: str) -> dict:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _holds_adapters(package: Path) -> bool:
    return (package / "adapter_config.json").exists()
