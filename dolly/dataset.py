"""A data set on the Hub: the file of records as it is, and a card that says what is in it."""

import shlex
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from dolly.errors import UserError
from dolly.hub import check_write, upload
from dolly.records import Record, explain, read_records
from dolly.report import counts, table, verbatim

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
SHOWN = 3  # records

USE = """\
```python
from datasets import load_dataset

records = load_dataset("{repo_id}", split="train")
```

To fine-tune a model on it with Dolly:

```bash
python train.py --base EleutherAI/pythia-410m --data {repo_id} --output models/mine
```
"""


def push_data(path: Path, name: str, private: bool, license: str | None = None) -> str:
    """Uploads a file of records with its card and returns the URL of the data set.

    A README.md beside the file is its card if its front matter names the file. Raises `UserError` for a file with
    records that cannot be read and as `hub.check_write` does, `PushError` for an upload that broke off.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    records, broken = read_records(str(path))
    if broken:
        remedy = f"Mend them first; python -m dolly check {shlex.quote(str(path))} tells more."
        raise UserError(explain(broken, str(path), len(records) + len(broken), remedy))
    repo_id = check_write(name, private, "dataset")
    command = ["python", "-m", "dolly", "push-data", str(path), repo_id]
    command += ["--private"] * private + (["--license", license] if license else [])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / path.name)
        card = own_card(path) or data_card(repo_id, path.name, records, license)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        remedy = f"{path} is as it was. This sends what has not arrived yet:\n  {shlex.join(command)}"
        return upload(Path(folder), repo_id, "dataset", private, remedy)


def own_card(path: Path) -> str | None:
    """The README.md beside a file of records, if it is the card of this file."""
    card = path.parent / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeError, yaml.YAMLError):
        return None
    configs = front.get("configs") or [] if isinstance(front, dict) else []
    return text if any(path.name in str(config.get("data_files")) for config in configs) else None


def data_card(repo_id: str, file: str, records: list[Record], license: str | None) -> str:
    """The text of a README.md with the counts of the records and the first of them."""
    title = repo_id.split("/")[-1]
    conversations = sum(len(record.messages) > 3 for record in records)
    facts = DatasetCardData(
        pretty_name=title,
        license=license,
        task_categories=["text-generation"],
        size_categories=[next((size for most, size in SIZES if len(records) < most), "n>10M")],
        tags=["instruction-tuning", "dolly"],
        configs=[{"config_name": "default", "data_files": file}],
    )
    parts = [f"# {title}", f"{len(records):,} records to fine-tune a language model on, in `{file}`."]
    if conversations:
        parts[-1] += f" {conversations:,} are conversations of several exchanges."
    categories = Counter(record.category for record in records)
    if len(categories) > 1:
        parts.append(table(("category", "records"), counts(categories)))
    parts += ["## The first records", *(verbatim(_shown(record)) for record in records[:SHOWN])]
    parts += ["## How to use it", USE.format(repo_id=repo_id).strip()]
    if license is None:
        parts.append("No licence is stated.")
    body = "\n\n".join(parts)
    return str(DatasetCard(f"---\n{facts.to_yaml()}\n---\n\n{body}\n"))


def _shown(record: Record) -> str:
    return record.text or "\n\n".join(f"{m['role']}: {m['content']}" for m in record.messages)
