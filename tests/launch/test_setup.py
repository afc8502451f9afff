"""The set-up of the scripts, with stand-ins for Python: which one is used, what is
installed when.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Answers like Python {version}; logs what it has to install or run.
STAND_IN = """#!/bin/sh
case "$*" in
  *version_info\\[:3\\]*) echo {version} ;;
  *version_info\\[:2\\]*) exit {too_old} ;;
  "-c import pip") ;;
  *) printf '%s\\n' "$*" >>log ;;
esac
"""


def stand_in(path: Path, version: str, too_old: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN.format(version=version, too_old=int(too_old)))
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("pyproject.toml", "constraints.txt", ".python-version"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    return folder


def call(
    script: Path, *arguments: str, cwd: Path = Path("/"), **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_a_python_too_old_is_one_line(checkout: Path, script: str) -> None:
    old = stand_in(checkout.parent / "python old", "3.9.1", too_old=True)
    done = call(checkout / "launch" / script, ESPALIER_PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python >= 3.12 is needed; found: ")
    assert "python old is 3.9.1;" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["quickstart", "test"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_installs_nothing(checkout: Path, script: str, flag: str) -> None:
    stand_in(checkout / ".venv" / "bin" / "python", "3.12.1", too_old=False)
    done = call(checkout / "launch" / script, "-x", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"launch/{script} [")
    assert not (checkout / "log").exists()


def test_no_python_is_one_line(checkout: Path) -> None:
    done = call(checkout / "launch" / "test", ESPALIER_PYTHON="/absent/python")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "found: none" in done.stderr


def test_an_old_environment_is_named(checkout: Path) -> None:
    stand_in(checkout / ".venv" / "bin" / "python", "3.11.4", too_old=True)
    done = call(checkout / "launch" / "test")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert ".venv is 3.11.4; remove .venv" in done.stderr


def test_installs_once_and_again_when_the_pins_change(checkout: Path) -> None:
    stand_in(checkout / ".venv" / "bin" / "python", "3.12.1", too_old=False)
    command = stand_in(checkout / ".venv" / "bin" / "espalier", "3.12.1", too_old=False)
    command.write_text(command.read_text().replace(">>log", f">>'{checkout}/log'"))
    install = "-m pip install --quiet -c constraints.txt -e "
    train = f"train --config=quickstart --workdir={checkout}/runs/quickstart --suggest"
    log = checkout / "log"

    done = call(checkout / "launch" / "quickstart", "--workdir=else where")
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [f"{install}.", f"{train} --workdir=else where"]
    words = train.replace(" checkout", "\\ checkout")
    program = str(checkout / ".venv/bin/espalier").replace(" ", "\\ ")
    assert f"+ {program} {words} --workdir=else\\ where" in done.stderr
    assert "pip install -c constraints.txt -e '.[gpu]'  (TPU: '.[tpu]')" in done.stdout

    log.unlink()
    assert call(checkout / "launch" / "quickstart", cwd=checkout).returncode == 0
    assert log.read_text().splitlines() == [train.replace(f"{checkout}/", "")]

    log.unlink()
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# another pin\n")
    assert call(checkout / "launch" / "test", "-k", "some words").returncode == 0
    fast = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert log.read_text().splitlines() == [f"{install}.[data,dev]", f"{fast} -k some words"]


def test_an_interrupted_run_of_all_tests_goes_on(checkout: Path) -> None:
    """A test file that passed is not run again until something changes; one that failed is."""
    python = stand_in(checkout / ".venv" / "bin" / "python", "3.12.1", too_old=False)
    failing = 'case "$*" in *test_b.py*) echo "$*" >>log; exit 1 ;; esac\n'
    python.write_text(python.read_text().replace("#!/bin/sh\n", "#!/bin/sh\n" + failing))
    for name in ("test_a.py", "test_b.py", "test_c.py"):
        (checkout / "tests" / name).touch()
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    (checkout / ".gitignore").write_text(".cache/\n.venv/\nlog\n")

    def run_all() -> tuple[int, list[str]]:
        done = call(checkout / "launch" / "test", "--all")
        lines = (checkout / "log").read_text().splitlines()
        (checkout / "log").unlink()
        return done.returncode, sorted(x.split("tests/")[1] for x in lines if "pytest" in x)

    every = ["test_a.py", "test_b.py", "test_c.py"]
    assert run_all() == (1, every)
    assert run_all() == (1, ["test_b.py"])
    (checkout / "tests" / "test_c.py").write_text("changed = True\n")
    assert run_all() == (1, every)
    python.write_text(python.read_text().replace(failing, ""))
    assert run_all() == (0, ["test_b.py"])
    assert run_all() == (0, every)
