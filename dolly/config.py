"""The settings of a training run: one typed dataclass, from which the command line and the YAML files are generated.

A value is the command line's, else the YAML file's (`--config`), else the default below. All mistakes of both are
reported together, before anything is loaded.
"""

import argparse
import difflib
import tempfile
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from dolly.errors import UserError


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    base: str = setting("data/base", "model to fine-tune: a folder, or an id on the Hugging Face Hub")
    data: str = setting("data/instructions.jsonl", "records: .jsonl, .json, .csv, .parquet, .txt or a Hub id")
    extra_data: str | None = setting(None, "more records to learn from, none of which is held out")
    output: str = setting("models/dolly", "folder to write; it must not exist or be empty")
    validation: float = setting(0.05, "share of the records held out to measure the result")
    max_length: int | None = setting(None, "tokens of the longest record (the base's limit, at most 1024)")
    bad_records: typing.Literal["stop", "drop"] = setting(
        "stop", "records that are broken, empty or longer than max_length"
    )

    epochs: int = setting(3, "passes over the records")
    max_steps: int | None = setting(None, "stop after so many updates")
    batch_tokens: int = setting(8192, "tokens of one update, padding included")
    micro_batch_tokens: int = setting(4096, "tokens of one forward pass, at least one row: less needs less memory")
    learning_rate: float = setting(1e-5, "highest learning rate")
    schedule: typing.Literal["cosine", "linear", "constant"] = setting("cosine", "learning rate after warm-up")
    warmup: float = setting(0.03, "share of the updates with a rising learning rate")
    weight_decay: float = setting(0.0, "decay of the matrices")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm")
    optimizer: typing.Literal["adamw", "adamw-8bit"] = setting(
        "adamw", "8bit: a quarter of its memory, by bitsandbytes"
    )
    seed: int = setting(0, "of the order of the records, and of dropout")
    evaluations: int = setting(4, "how often to measure the held-out loss after the first time")
    checkpoint_every: int = setting(200, "updates between two checkpoints, 0 for none; they are kept until the end")
    resume: bool = setting(False, "go on from the newest checkpoint of the run that was to write --output")

    lora_rank: int = setting(0, "train adapters of this rank beside every matrix of the layers; 0 trains all weights")
    lora_alpha: int | None = setting(None, "scale of the adapters, in ranks (2 * lora_rank)")
    quantize: bool = setting(False, "hold the weights under the adapters in 4 bits (QLoRA, by bitsandbytes)")
    merge: bool = setting(True, "add the adapters to the weights at the end; else the package holds them alone")

    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the matrix products; auto: by hardware"
    )
    gradient_checkpointing: typing.Literal["auto", "on", "off"] = setting(
        "auto", "compute the layers again for the gradient instead of keeping them; auto: where memory asks for it"
    )
    compile: bool = setting(False, "compile the layers with torch.compile")
    deepspeed: typing.Literal["zero1", "zero2", "zero3"] | None = setting(
        None, "share optimizer (1), gradients (2), weights (3) among the processes"
    )

    max_new_tokens: int = setting(256, "longest answer by default")
    temperature: float = setting(0.7, "0 always takes the likeliest word")
    top_p: float = setting(0.9, "sample from the likeliest words of this total share")
    repetition_penalty: float = setting(1.0, "above 1 discourages words already used")
    no_repeat_ngram_size: int = setting(
        0, "no passage of so many tokens comes twice, not even the question's; 0: any may"
    )

    push_to_hub: str | None = setting(None, "NAME or OWNER/NAME to push the model to at the end")
    private: bool = setting(False, "make the pushed repository private")


ROOT = Path(__file__).parent.parent
# The first setting of each group of --help.
GROUPS = {
    "base": "model and data",
    "epochs": "training",
    "lora_rank": "adapters",
    "dtype": "hardware",
    "max_new_tokens": "the model's own sampling",
    "push_to_hub": "hub",
}
# The least and the greatest value of a number, and a value that is allowed besides.
RANGES = {
    "validation": (0, 0.5), "max_length": (16, None), "epochs": (1, None), "max_steps": (1, None),
    "batch_tokens": (1, None), "micro_batch_tokens": (1, None), "learning_rate": (0, 1), "warmup": (0, 1),
    "weight_decay": (0, 1), "max_grad_norm": (1e-6, 1e6), "seed": (0, 2**63 - 1), "evaluations": (1, None),
    "checkpoint_every": (0, None), "lora_rank": (0, 4096), "lora_alpha": (1, None),
    "max_new_tokens": (1, None), "temperature": (0.01, 5, 0), "top_p": (0.01, 1), "repetition_penalty": (0.5, 3),
    "no_repeat_ngram_size": (0, None),
}  # fmt: skip

EXAMPLES = """examples:
  python train.py --config configs/demo.yaml
  python train.py --data my.csv --output models/mine --epochs 2
  python train.py --base EleutherAI/pythia-410m --data my.jsonl --output models/mine --push-to-hub mine
"""


def parse(argv: list[str]) -> TrainConfig:
    """The configuration of a command line. The default `base` and `data` are found from any folder.

    Raises `UserError` naming every key that is unknown, given twice or has a bad value, and an unfit output folder.
    """
    options = _parser().parse_args(argv)
    problems: list[str] = []
    known, config = {f.name: f for f in fields(TrainConfig)}, {}
    values = {name: (f.default, _option(name)) for name, f in known.items()}
    if options.config is not None:
        values |= _read(options.config, problems)
    given = {name: value for name, value in vars(options).items() if name != "config" and value is not None}
    values |= {name: (value, _option(name)) for name, value in given.items()}

    for name, (value, where) in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{where} is not a setting{meant}")
            continue
        try:
            optional = value is None and known[name].default is None
            config[name] = None if optional else _convert(value, _kind(known[name]), RANGES.get(name))
        except ValueError as error:
            problems.append(f"{where} {error}, not {value!r}")
    if "output" in config and (unfit := _unfit(Path(config["output"]))):
        problems.append(f"{values['output'][1]}: {config['output']} {unfit}; name another folder")
    problems += _at_odds(config)
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        listed = "\n  ".join(problems)
        raise UserError(f"the settings have {count}:\n  {listed}\n`python train.py --help` lists all.")

    for name in ("base", "data"):
        if config[name] == known[name].default and not Path(config[name]).exists():
            config[name] = str(ROOT / config[name])
    return TrainConfig(**config)


def _at_odds(config: dict) -> list[str]:
    """What two settings say that do not go together."""
    alone = [] if config.get("lora_rank") else ["lora_alpha", "quantize", "merge"]
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    said = [name for name in alone if config.get(name, defaults[name]) != defaults[name]]
    problems = [f"{_option(name)} is about adapters: give --lora-rank too, 16 for example" for name in said]
    if config.get("quantize") and config.get("deepspeed") == "zero3":
        problems.append("--quantize keeps the weights whole in each process: use --deepspeed zero2 instead of zero3")
    return problems


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unfit(folder: Path) -> str | None:
    """Why the package cannot be put in place as `folder`: it is written beside it and then renamed."""
    try:
        if folder.is_symlink():
            return "is a symbolic link"
        if folder.exists() and not folder.is_dir():
            return "is a file"
        if folder.exists() and folder.samefile(Path.cwd()):
            return "is the current folder"
        if folder.exists() and any(folder.iterdir()):
            return "exists and is not empty"
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=parent).cleanup()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    return None


def _parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tunes a causal language model on records of instructions and answers, and writes a package "
        "that transformers loads and app.py chats with.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_argument("--config", metavar="FILE", help="YAML file with any of these settings (configs/demo.yaml)")
    group = cli
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = cli.add_argument_group(GROUPS[f.name])
        kind, option = _kind(f), _option(f.name)
        default = "" if f.default in (None, False) else f" (default: {f.default})"
        text = (f.metadata["help"] + default).replace("%", "%%")
        if kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = "{" + ",".join(typing.get_args(kind)) + "}" if typing.get_origin(kind) is typing.Literal else None
            group.add_argument(option, metavar=choices or f.name.split("_")[-1].upper(), help=text)
    return cli


def _read(path: str, problems: list[str]) -> dict[str, tuple[object, str]]:
    """The values of a YAML file by the text of their keys, each with the place that it stands at."""
    values, lines = {}, {}
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        pairs = [] if root is None else root.value
        if root and not (isinstance(root, yaml.MappingNode) and all(isinstance(key.value, str) for key, _ in pairs)):
            problems.append(f"{path} does not hold `setting: value` lines")
            return {}
        for key, node in pairs:
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                problems.append(f"{path}, line {line}: {name} is given already in line {lines[name]}")
            lines[name] = line
            values[name] = (loader.construct_object(node, deep=True), f"{path}, line {line}: {name}")
    except OSError as error:
        problems.append(f"--config {path!r} cannot be read ({error.strerror})")
    # What PyYAML raises for `!!bool x` (KeyError), `!!timestamp x` (AttributeError), 2001-99-99 and a very deep list.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        problems.append(f"{path} is not valid YAML: {' '.join(str(error).split())}")
    return values


def _kind(f) -> type:
    """The type of a field without its `| None`."""
    kinds = [kind for kind in typing.get_args(f.type) if kind is not type(None)]
    return f.type if typing.get_origin(f.type) is typing.Literal or not kinds else kinds[0]


def _convert(value, kind, limits: tuple[float | None, ...] | None):
    """A value of the command line (text) or of YAML as `kind`; `ValueError` says what it must be."""
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"must be {' or '.join(typing.get_args(kind))}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if kind is str:
        if not isinstance(value, str) or not value:
            raise ValueError("must be text")
        return value
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = kind(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number") from None
    low, high, *besides = limits
    if number in besides or (number >= low and (high is None or number <= high)):
        return number
    either = "".join(f"be {value} or " for value in besides)
    raise ValueError(f"must be at least {low}" if high is None else f"must {either}lie between {low} and {high}")
