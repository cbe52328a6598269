"""What the Hub accepts in the front matter of a README.md, as its documentation of cards has it."""

import re
from collections.abc import Iterator

import yaml

HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community unknown
other
"""


def mistakes(card: str, kind: str) -> Iterator[str]:
    """What the Hub would refuse in a card; kind: model, dataset or space."""
    if not card.startswith("---\n"):
        return
    try:
        front = yaml.safe_load(card.split("---\n")[1]) or {}
    except yaml.YAMLError as error:
        yield f"YAML: {error}"
        return
    rules = {
        "license": lambda value: value in re.findall(r"\S+", LICENSES),
        "license_name": lambda value: re.fullmatch(r"[a-z0-9-.]+", value),
        "language": lambda value: all(re.fullmatch(r"[a-z]{2,3}", code) for code in listed(value)),
        "tags": lambda value: isinstance(value, list) and all(isinstance(tag, str) for tag in value),
        "datasets": lambda value: all(re.fullmatch(HUB_ID, name) for name in listed(value)),
        "base_model": lambda value: all(re.fullmatch(HUB_ID, name) for name in listed(value)),
        "base_model_relation": lambda value: value in ("adapter", "finetune", "merge", "quantized"),
        "pipeline_tag": lambda value: value == "text-generation",
        "task_categories": lambda value: set(value) <= {"text-generation", "question-answering"},
        "size_categories": lambda value: all(re.fullmatch(r"(\d+[KM]?<)?n[<>]\d+[KM]", size) for size in value),
        "model-index": lambda value: all(map(whole_result, value)),
    }
    if kind == "space":
        rules = {"sdk": lambda value: value == "gradio", "short_description": lambda value: len(value) <= 60}
        yield from (f'"{key}" is required' for key in ("sdk", "app_file") if key not in front)
    yield from (
        f'"{key}" is not valid: {front[key]!r}'
        for key, holds in rules.items()
        if key in front and not holds(front[key])
    )


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


def whole_result(model: dict) -> bool:
    """Whether an entry of model-index has what the Hub asks for."""
    return isinstance(model["name"], str) and all(
        {"type"} <= result["task"].keys()
        and {"type", "name"} <= result["dataset"].keys()
        and all({"type", "value"} <= metric.keys() for metric in result["metrics"])
        for result in model["results"]
    )
