"""Version, change log and citation agree, and the dev extra suffices to run the tests."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import lm

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"kernels", "lm", "launch", "experiments", "tests", "espalier"}
# Tests of some tiers import these, behind `importorskip` or a marker.
ELSEWHERE = {"jax_triton", "transformers", "torch", "lm_eval", "tokamax", "datasets", "triton"}
ELSEWHERE |= {"ml_dtypes"}  # installed with jax


def names(requirements: list[str]) -> set[str]:
    """Names of distributions, as "ruff" in "ruff>=0.1; marker"."""
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def test_the_version_has_one_home() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lm.__version__"}
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    command = [sys.executable, str(ROOT / "espalier.py"), "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == f"espalier-lm {lm.__version__}\n"


def test_the_change_log_begins_with_what_is_not_released() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert heads[0] in ("Unreleased", lm.__version__)
    assert lm.__version__ in heads


def test_the_citation_says_what_its_format_requires() -> None:
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= values.keys()
    assert values["license"] == PROJECT["project"]["license"]


def test_the_dev_extra_brings_what_tests_import() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert f"{PROJECT['project']['name']}[data]" in extras["dev"]
    asked = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["data"]]
    known = importlib.metadata.packages_distributions()
    missing = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.append(node.module or "")
            for module in {name.split(".")[0] for name in modules}:
                if module in OURS | ELSEWHERE | set(sys.stdlib_module_names):
                    continue
                found = {one.lower().replace("_", "-") for one in known.get(module, [module])}
                if not found & names(asked):
                    missing[module] = str(path.relative_to(ROOT))
    assert not missing


@pytest.mark.parametrize("page", ["AGENTS.md", "CHANGELOG.md"])
def test_what_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"(?<![\w/])((?:launch|lm|tests|docs)/[a-z_/]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"-m launch\.([a-z_]+)", text):
        assert (ROOT / "launch" / f"{command}.py").exists(), command


def test_agents_fits_one_page() -> None:
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) <= 80
