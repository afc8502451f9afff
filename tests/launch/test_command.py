"""The console command `espalier`: what it lists and what it starts, from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import command, presets, shell

ROOT = Path(__file__).resolve().parents[2]
SHADOW = "raise ImportError('not this one')\n"


MINE = """
from experiments import own, quickstart

def get_config():
    config = quickstart.get_config()
    config.seed = own.seed
    return config
"""


def call(
    folder: Path,
    *words: str,
    program: tuple[str, ...] = (str(ROOT / "espalier.py"),),
    path: str = "",
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    line = [sys.executable, *program, *words]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


def shadowed(folder: Path, *names: str) -> Path:
    """A folder of the user with packages that have our names."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(SHADOW)
    return folder


def test_every_command_has_a_line_of_its_own() -> None:
    names = command.names()
    assert {"train", "evaluate", "compare", "report"} <= set(names)
    assert not {"cli", "ends", "overrides", "presets", "command", "shell"} & set(names)
    message = command.listing().splitlines()
    for name in names:
        (line,) = [line for line in message if line.split()[:1] == [name]]
        assert len(line) <= 80, line
        assert command.summary(command.HERE / f"{name}.py")[0].isupper()
        assert "`" not in command.summary(command.HERE / f"{name}.py")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's variable")
@pytest.mark.parametrize("chosen", ["", "glibc.malloc.check=0"])
def test_it_asks_for_huge_pages_unless_the_user_chose_otherwise(
    chosen: str, tmp_path: Path
) -> None:
    """The command that runs prints its own environment; it is started with a file of the user's."""
    show = "import os, sys; print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.no_site)"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("")
    (tmp_path / "launch" / "ends.py").write_text("def at_once(): pass\n")
    (tmp_path / "launch" / "command.py").write_text(f"def run(words): exec({show!r})\n")
    shutil.copy(ROOT / "espalier.py", tmp_path)
    env = {"PATH": "/usr/bin:/bin"} | ({"GLIBC_TUNABLES": chosen} if chosen else {})
    line = [sys.executable, "-S", "espalier.py", "a b", "--c=d"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"{chosen or 'glibc.malloc.hugetlb=1'} ['a b', '--c=d'] 1\n", done.stderr


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_without_a_command_it_lists_the_commands(words: tuple[str, ...], tmp_path: Path) -> None:
    done = call(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == command.listing() + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "'trian' is not a command of espalier; did you mean 'train'?"),
        (("coord-check",), "did you mean 'coord_check'?"),
        (("zzz",), "espalier alone lists them"),
        (("cli",), "'cli' is not a command"),
        (("train", "--config=quickstart"), "missing flag --workdir"),
        (("train", "--config=quickstrat", "--workdir=x"), "did you mean 'quickstart'?"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = call(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_a_command_has_the_flags_of_its_module(tmp_path: Path) -> None:
    """It also starts in a folder of the user that has packages with our names."""
    folder = shadowed(tmp_path, "launch", "lm", "kernels", "experiments")
    done = call(folder, "recipe", "--parameters=1e7", "--tokens=2e8", path=str(folder))
    assert done.returncode == 0, done.stderr
    again = call(ROOT, "--parameters=1e7", "--tokens=2e8", program=("-m", "launch.recipe"))
    assert done.stdout == again.stdout


@pytest.mark.parametrize("name", ["lm", "kernels"])
def test_another_package_of_our_name_is_one_line(name: str, tmp_path: Path) -> None:
    """`python -m` looks in the current folder first."""
    shadowed(tmp_path, name)
    done = call(tmp_path, "--config=quickstart", program=("-m", "launch.train"), path=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: `import {name}` finds {tmp_path}/{name}, not Espalier's {ROOT}/{name}" in (
        done.stderr
    )


def test_presets_are_files_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds where the user has a package `experiments`, which stays imported."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "experiments" / "own.py").write_text("seed = 5\n")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    import experiments as users

    for name in ("quickstart:softmax", "compare:smoke", "hypergradient"):
        path, values = presets.read(name)
        assert path.is_relative_to(ROOT / "experiments")
        assert values
    assert sys.modules["experiments"] is users
    assert presets.read(str(tmp_path / "mine.py"))[1].seed == 5


def test_printed_commands_work_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work with the environment activated, not activated, and without an installed command."""
    scripts = tmp_path / "an environment" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert shell.line("train", ["--a=b c"]).endswith("/espalier.py train '--a=b c'")
    assert shell.enter() is None

    for name in ("espalier", "activate", "activate.fish", "activate.csh"):
        (scripts / name).touch(mode=0o755)
    assert shell.line("train", ["--a"]) == "'an environment/bin/espalier' train --a"
    for user, message in (("bash", ". "), ("sh", ". "), ("fish", "source "), ("tcsh", "source ")):
        monkeypatch.setenv("SHELL", f"/bin/{user}")
        file = {"fish": "activate.fish", "tcsh": "activate.csh"}.get(user, "activate")
        assert shell.enter() == f"{message}'an environment/bin/{file}'"
    config = ("--config=quickstart", "--config.seed=3")
    message = shell.next_lines(tmp_path / "runs" / "a", config)
    assert message.splitlines()[1].startswith("  source ")

    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin:/bin")
    assert shell.line("train", ["--a"]) == "espalier train --a"
    assert shell.enter() is None
    message = shell.next_lines(tmp_path / "runs" / "a", config).splitlines()
    assert message[1].split()[0] == "espalier"
    assert "--checkpoint=runs/a " in message[2]
    again = "espalier train --config=quickstart:softmax --config.seed=3 --workdir=runs/other "
    assert again in message[-1]
    assert "softmax" not in shell.next_lines(tmp_path / "runs" / "a", ("--config=mine.py",))
