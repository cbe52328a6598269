"""The README's front matter is what a Space runs on, and its commands are what a newcomer types."""

import re
from importlib.metadata import metadata, version

import pytest
import yaml
from conftest import ROOT, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

README = (ROOT / "README.md").read_text(encoding="utf-8")
REQUIREMENTS = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
FRONT = yaml.safe_load(README.split("---")[1])


def test_the_space_gets_the_tested_gradio_and_a_python_that_everything_runs_on():
    assert FRONT["sdk"] == "gradio" and FRONT["sdk_version"] == version("gradio")
    assert (ROOT / FRONT["app_file"]).is_file()
    assert len(FRONT["short_description"]) <= 60
    for line in REQUIREMENTS:
        if line:
            needs = metadata(Requirement(line).name)["Requires-Python"] or ""
            assert FRONT["python_version"] in SpecifierSet(needs), line


def test_the_constraints_hold_what_is_installed_and_within_the_requirements():
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for line in REQUIREMENTS:
        if line:
            wanted = Requirement(line)
            assert pins[wanted.name] in wanted.specifier, line
            assert Version(version(wanted.name)).public == pins[wanted.name]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)|`((?:data|configs|dolly|tests)/[\w./]*)`", README))
def test_every_file_that_the_readme_names_exists(link):
    assert (ROOT / (link[0] or link[1])).exists()


def test_every_option_in_the_readme_exists():
    known = run("train.py", "--help").stdout + run("app.py", "--help").stdout
    for command in ("check", "evaluate", "review", "push", "push-data", "llama-cpp", "space"):
        known += run("-m", "dolly", command, "--help").stdout
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    options = {option for line in lines if not line.startswith("hf") for option in re.findall(r"(--[a-z-]+)", line)}
    assert {"--base", "--push-to-hub", "--private"} <= options
    assert not [option for option in options if option not in known]


def test_every_make_target_in_the_readme_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "model"} <= set(targets)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(targets)
