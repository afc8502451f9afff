"""Every command of the README, CONTRIBUTING and the guides is right: each is parsed. The slow tier
runs the commands of a page in their order, at a smaller size.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import command as command_lib
from tests.launch import documents, stand_ins
from tests.launch.documents import PAGES, ROOT, Command

# Beginnings of commands that no test here runs, and the reason.
NOT_RUN = {
    "launch/quickstart": "installs; tests/launch/test_setup.py runs it with a stand-in for Python",
    "launch/test": "would run these tests within themselves",
    ". .venv/bin/activate": "changes the shell it is typed in",
    ".venv/bin/": "checks of the code, which launch/test's set-up brings; they need the checkout",
    "python -m venv": "makes an environment for torch",
    "../torch/bin/pip": "installs torch",
    "sbatch": "needs Slurm; tests/launch/test_launchers.py runs the script with stand-ins",
    "launch/tpu_pod.sh": "needs a pod; tests/launch/test_launchers.py runs it with stand-ins",
    "espalier eval_harness": "names tasks of the reader's; tests/lm/interop runs the harness",
    "espalier compare --config=compare:cpu": "takes three hours; compare:smoke is run",
    "espalier plan --config=plans:1b_long": "the compiler takes minutes; tests/aot compiles",
}
# Every training run is short and its model is small; what a page sets itself wins.
SMALL = {
    "config.model.width": "64",
    "config.model.num_heads": "2",
    "config.model.num_kv_heads": "2",
    "config.model.head_dim": "32",
    "config.model.ffn_dim": "128",
    "config.data.context_length": "256",
    "config.data.tokenizer.vocab_size": "512",
    "config.evaluate.max_tokens": "1024",
    "config.log.sample_tokens": "8",
    "config.run.length": "40 steps",
    "config.schedule.warmup": "4 steps",
    "config.checkpoint.every": "25 percent",
}

# Run folders that a page may use without making them, as the guide to the first run makes them.
MADE = {
    name: Command("", {}, ("espalier", *words, f"--workdir=runs/{name}"))
    for name, words in {
        "quickstart": ("train", "--config=quickstart"),
        "softmax": ("train", "--config=quickstart:softmax"),
    }.items()
}


def all_commands() -> list[Command]:
    return [found for page in PAGES for found in documents.commands(page)]


def reason(found: Command) -> str | None:
    return next((why for start, why in NOT_RUN.items() if str(found).startswith(start)), None)


def is_flags(found: Command) -> bool:
    """Whether the line has flags alone, as an example of what a run accepts."""
    return found.words[0].startswith("--config.")


def test_pages_have_commands() -> None:
    assert len([found for found in all_commands() if found.is_ours]) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_in_a_block(page: Path) -> None:
    assert not documents.unfenced(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_can_be_parsed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their commands, flags, presets, files and overrides exist."""
    monkeypatch.chdir(tmp_path)
    for name in ("experiments", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for found in documents.commands(page):
        words = found.words
        if is_flags(found):
            words = ("espalier", "train", "--config=quickstart", "--workdir=runs/x", *words)
        config = next((x for x in words if re.match(r"--config=runs/.*\.py$", x)), None)
        if config:  # an earlier command writes this experiment
            words = tuple("--config=quickstart" if x == config else x for x in words)
        if words[0] == "espalier":
            documents.check(words)
        elif words[0].startswith("launch/"):
            assert os.access(ROOT / words[0], os.X_OK), found
        else:
            assert reason(found), f"{page.name}: no test runs {found}, and NOT_RUN does not say why"


def test_commands_that_are_not_run_are_still_in_the_pages() -> None:
    for start in NOT_RUN:
        assert any(str(found).startswith(start) for found in all_commands()), start


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("espalier trian --config=quickstart", "trian"),
        ("espalier train --config=quickstart --workdri=x", "unknown flag --workdri"),
        ("espalier train --config=quickstrat --workdir=x", "did you mean 'quickstart'"),
        ("espalier train --config=quickstart --workdir=x --config.model.widht=3", "widht"),
        ("espalier train --config=quickstart --workdir=x --config.run.length=3", "run.length"),
    ],
)
def test_a_wrong_command_is_found(words: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        documents.check(tuple(shlex.split(words)))


def small(found: Command) -> list[str]:
    """The command as it is run here: training is short, and small unless the page sets a size."""
    name, *rest = found.words[1:] or ["help"]
    rest = [re.sub(r"^(--config.run.length=).* tokens$", r"\g<1>40 steps", word) for word in rest]
    given = {word.lstrip("-").partition("=")[0] for word in rest}
    more: list[str] = []
    trains = name in ("train", "sweep", "autolrs", "prepare") or "--experiment=" in str(found)
    if trains and "init_from" not in str(found):
        config = next((x for x in rest if x.startswith("--config=")), "")
        if "runs/" not in config:
            more = [f"--{key}={value}" for key, value in SMALL.items() if key not in given]
    if name == "autolrs":
        more = [*more, "--config.run.length=80 steps", "--first_stage=30"]
    if name == "sweep":
        rest = [re.sub(r"run.length=.*", "run.length=20 steps,40 steps", word) for word in rest]
        more = [word for word in more if "run.length" not in word]
    return [name, *rest, *more]


def is_missing(name: str, run: list[Command]) -> bool:
    """Whether commands read a run folder that no earlier command makes."""
    first = next((x for x in run if re.search(rf"\bruns/{name}\b", str(x))), None)
    return first is not None and f"--workdir=runs/{name}" not in first.words


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """They run in a copy of the tracked files and leave no file that git would add."""
    run = [x for x in documents.commands(page) if x.is_ours and reason(x) is None]
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    tracked = stand_ins.git(ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    stand_ins.git(checkout, "init", "-q")
    stand_ins.git(checkout, "add", "-A")
    stand_ins.git(checkout, "commit", "-q", "-m", "all")
    env = os.environ | {"ESPALIER_DATA": str(tmp_path / "data"), "JAX_NUM_CPU_DEVICES": "1"}
    before = [make for name, make in MADE.items() if is_missing(name, run)]
    wrong = []
    for found in [*before, *run]:
        words = [_kept(word, checkout) for word in small(found)]
        line = [sys.executable, str(checkout / "espalier.py"), *words]
        ended = subprocess.run(
            line, cwd=checkout, env=env | found.env, capture_output=True, text=True
        )
        # Status 1 is that of a study whose verdict is no.
        if ended.returncode not in (0, 1) or "Traceback" in ended.stderr:
            wrong.append(f"{shlex.join(words)}\n{ended.stderr[-2000:]}")
        if left := stand_ins.git(checkout, "status", "--porcelain"):
            wrong.append(f"{shlex.join(words)} leaves {left}")
    assert not wrong, "\n\n".join(wrong)


def _kept(word: str, checkout: Path) -> str:
    """Replaces the step of a checkpoint, as runs are shorter here."""
    found = re.fullmatch(r"(--config.decay_from=)(runs/\w+/checkpoints)/\d+", word)
    if not found:
        return word
    names = [path.name for path in (checkout / found[2]).iterdir()]
    return f"{found[1]}{found[2]}/{sorted(int(x) for x in names if x.isdigit())[-2]}"


def test_presets_and_commands_that_pages_name_exist() -> None:
    """Commands that are named in a sentence."""
    known = set(command_lib.names())
    for page in PAGES:
        for name in re.findall(r"`espalier ([a-z]\w*)", page.read_text(encoding="utf-8")):
            assert name in known, f"{page.name}: espalier {name}"
