"""notebooks/*.ipynb are committed clean, and their cells run in a new process. What they call
before anything is installed runs with stand-ins. The address of the repository has one place.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from launch import notebook
from lm import metrics
from lm.report import compared
from lm.run import checkpoint

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ESPALIER, COMPARE = ROOT / "notebooks" / "espalier.ipynb", ROOT / "notebooks" / "compare.ipynb"
STEPS = 6
# Runs the cells as a kernel does, but does not display the last value of a cell.
EXECUTE = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
namespace = {"__name__": "__main__"}
for number, source in enumerate(sources):
    exec(compile(source, f"<code cell {number}>", "exec"), namespace)
"""
# The study of compare.ipynb at a smaller size, with the fewest seeds that give a verdict.
SMALL_STUDY = f"""
from experiments.compare import config

def get_config():
    study = config.get_config("minutes")
    study.run.model.update(width=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn_dim=96)
    study.run.data.tokenizer.update(kind="bytes", vocab_size=257)
    study.run.data.update(context_length=64, batch_size=4)
    study.run.run.length = "{STEPS} steps"
    study.run.evaluate.max_tokens = 4096
    study.seeds = (0, 1, 2)
    study.timing_rounds = 1
    study.decode_contexts = (64,)
    return study
"""
name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


@name
def test_notebooks_are_clean(path: Path) -> None:
    """Cells are short, are plain Python without magics, and have no outputs."""
    for cell in cells(path):
        source = "".join(cell["source"])
        assert source.strip()
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile(source, "cell", "exec")
            assert source.count("\n") < 25


def test_both_notebooks_begin_with_the_same_cells() -> None:
    """The form and the set-up must be in each notebook, as there is no checkout yet."""
    assert len(NOTEBOOKS) == 2
    first, second = map(code, NOTEBOOKS)
    assert first[:2] == second[:2]


def execute(path: Path, folder: Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {
        "ESPALIER_NOTEBOOK_STEPS": str(STEPS),
        "ESPALIER_NOTEBOOK_WORKDIR": str(folder / "a run"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "MPLBACKEND": "agg",
    }
    return subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path)],
        check=False,
        cwd=cwd,
        env=os.environ | env | more,
        capture_output=True,
        text=True,
    )


@name
def test_a_notebook_outside_a_checkout_asks_for_one(path: Path, tmp_path: Path) -> None:
    done = execute(path, tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("No checkout here: set REPOSITORY above")


@name
def test_drive_outside_colab_is_one_line_before_any_work(path: Path, tmp_path: Path) -> None:
    asked = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    assert text.count("DRIVE = False") == 1
    asked.write_text(text.replace("DRIVE = False", "DRIVE = True"), encoding="utf-8")
    done = execute(asked, tmp_path, ROOT / "notebooks", ESPALIER_NOTEBOOK_WORKDIR="")
    assert done.returncode == 1
    assert done.stderr == (
        "DRIVE = True works only on Colab, which mounts Google Drive; set DRIVE = False.\n"
    )


@pytest.mark.slow
def test_the_first_notebook_trains_evaluates_and_generates(tmp_path: Path) -> None:
    done = execute(ESPALIER, tmp_path, ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    assert checkpoint.steps(tmp_path / "a run")[-1] == STEPS
    records = metrics.read(tmp_path / "a run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert "eval/stdlib/loss" in records[-1]
    for shown in ("bits_per_byte", "loss at", "def read(self, size=-1):\n", "class Queue:\n"):
        assert shown in done.stdout


@pytest.mark.slow
def test_the_second_notebook_compares_and_gives_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL_STUDY)
    small = {"ESPALIER_NOTEBOOK_STUDY": str(tmp_path / "small.py")}
    done = execute(COMPARE, tmp_path, ROOT / "notebooks", **small)
    assert done.returncode == 0, done.stderr
    found = compared.load(tmp_path / "a run" / "compare.json")
    assert [row.pattern for row in found.rows] == ["softmax", "stickbreaking"]
    assert all(row.curve is not None and len(row.curve.bits) == 3 for row in found.rows)
    assert found.facts["command"] == "notebooks/compare.ipynb"
    (verdict,) = found.verdicts
    assert verdict.outcome in ("better", "worse", "same")
    assert verdict.p is not None
    for shown in (verdict.sentence, "tokens per second.\n", "bytes of state after 64 tokens.\n"):
        assert shown in done.stdout
    assert (tmp_path / "a run" / "compare.html").exists()


# What runs before anything is installed: launch/notebook.py.


class Calls(list[list[str]]):
    """A stand-in for subprocess.run that records pip's arguments."""

    def __call__(self, command: list[str], *, check: bool) -> None:
        assert check
        assert command[:3] == [sys.executable, "-m", "pip"]
        self.append(command[3:])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(subprocess, "run", found)
    return found


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the module google.colab; returns the places where it mounted a Drive."""
    mounted: list[str] = []
    package, drive = ModuleType("google.colab"), ModuleType("google.colab.drive")

    def mount(place: str) -> None:
        (Path(place) / "MyDrive").mkdir(parents=True)
        mounted.append(place)

    vars(drive)["mount"] = mount
    vars(package)["drive"] = drive
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    monkeypatch.delenv("ESPALIER_NOTEBOOK_WORKDIR", raising=False)
    return mounted


@pytest.mark.parametrize(
    ("device", "extra"),
    [("accel0", "tpu"), ("vfio/0", "tpu"), ("nvidiactl", "gpu"), ("vfio/vfio", ""), ("null", "")],
)
def test_accelerators(tmp_path: Path, device: str, extra: str) -> None:
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert notebook.accelerator(tmp_path) == extra
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not extra or extra in extras["optional-dependencies"]


def test_installs_nothing_where_nothing_is_missing(calls: Calls) -> None:
    notebook.install("gpu")
    assert calls == []


@pytest.mark.parametrize(("extra", "project"), [("", "."), ("tpu", ".[tpu]"), ("gpu", ".[gpu]")])
def test_installs_what_is_missing(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, extra: str, project: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    notebook.install(extra)
    assert calls == [["install", "--quiet", "-c", "constraints.txt", "-e", project]]


@pytest.mark.usefixtures("colab")
def test_on_colab_it_always_installs_and_removes_old_cuda_plugins(calls: Calls) -> None:
    notebook.install("gpu")
    removed, installed = calls
    assert removed[:3] == ["uninstall", "--quiet", "--yes"]
    assert set(removed[3:]) == {"jax-cuda12-plugin", "jax-cuda12-pjrt"}
    assert installed[-1] == ".[gpu]"


@pytest.mark.usefixtures("colab")
def test_another_numpy_in_the_kernel_asks_to_restart(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    with pytest.raises(SystemExit, match="restart the session"):
        notebook.install("")
    assert len(calls) == 1


def test_the_folder_of_a_run(
    colab: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert notebook.workdir("minutes", on_drive=False) == Path("runs/minutes")
    assert colab == []
    on_drive = notebook.workdir("minutes", on_drive=True, mount=tmp_path / "drive")
    assert on_drive == tmp_path / "drive" / "MyDrive" / "espalier" / "minutes"
    assert colab == [str(tmp_path / "drive")]
    assert capsys.readouterr().out.splitlines()[-1] == f"The run is kept in {on_drive}"
    monkeypatch.setenv("ESPALIER_NOTEBOOK_WORKDIR", "elsewhere")
    assert notebook.workdir("minutes", on_drive=False) == Path("elsewhere")
    with pytest.raises(SystemExit, match="=elsewhere name two folders"):
        notebook.workdir("minutes", on_drive=True, mount=tmp_path / "drive")
    assert len(colab) == 1


# The repository's address.


def addresses(root: Path) -> dict[str, str]:
    """Place -> its address, "" if it has none. pyproject.toml, which is authoritative, is first."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"pyproject.toml": project.get("urls", {}).get("Repository", "")}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        (form,) = (source for source in code(path) if "\nREPOSITORY = " in source)
        (value,) = (
            node.value
            for node in ast.parse(form).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REPOSITORY"
        )
        found[path.name] = ast.literal_eval(value)
    for file, key in (("docs/mkdocs.yml", "repo_url"), ("CITATION.cff", "repository-code")):
        if (root / file).exists():
            values = yaml.safe_load((root / file).read_text(encoding="utf-8"))
            found[file] = values.get(key, "")
    return found


def test_all_addresses_of_the_repository_agree() -> None:
    found = addresses(ROOT)
    assert {"espalier.ipynb", "compare.ipynb", "docs/mkdocs.yml"} < found.keys()
    differing = {place: x for place, x in found.items() if x != found["pyproject.toml"]}
    assert not differing, f"pyproject.toml has {found['pyproject.toml']!r}"


def test_every_place_of_an_address_is_read(tmp_path: Path) -> None:
    """The test above finds an address that is planted in any place."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "docs").mkdir()
    planted = {
        "pyproject.toml": '[project]\nurls.Repository = "planted"\n',
        "docs/mkdocs.yml": "repo_url: planted\n",
        "CITATION.cff": "repository-code: planted\n",
    }
    for file, text in planted.items():
        (tmp_path / file).write_text(text)
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        held = json.dumps(f'REPOSITORY = "{addresses(ROOT)[path.name]}"')[1:-1]
        assert text.count(held) == 1
        path.write_text(text.replace(held, json.dumps('REPOSITORY = "planted"')[1:-1]))
    assert set(addresses(tmp_path).values()) == {"planted"}
    assert len(addresses(tmp_path)) == 5
