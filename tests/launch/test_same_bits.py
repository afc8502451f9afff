"""Two checkouts are compared bit for bit, and differences are named. Stand-in checkouts write what
espalier train would; a slow test compares two real checkouts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from launch import cli
from lm.config import flatten, to_mapping
from lm.studies import same_bits
from lm.studies.same_bits import Run

ROOT = Path(__file__).resolve().parents[2]
BASE = """
class Config:
    def to_dict(self):
        return {"model": {"pattern": "b", "width": 1}, "mesh": {"sequence_parallel": False}}

def get_config():
    return Config()
"""
TRAIN = """
import json, sys
from pathlib import Path

flags = dict(flag.split("=", 1) for flag in sys.argv[1:])
pattern, workdir = flags["--config.model.pattern"], Path(flags["--workdir"])
steps = int(flags["--config.run.length"].split()[0])
if pattern == "broken":
    sys.exit("error: it does not train")
workdir.mkdir(parents=True)
record = lambda i: {"step": i, "tokens": i, "train/loss": len(pattern) / (i + 2), "time/s": id(i)}
records = [record(i) for i in range(steps)]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + chr(10) for x in records))
meta = workdir / "checkpoints" / str(steps) / "meta" / "metadata"
meta.parent.mkdir(parents=True)
meta.write_text(json.dumps({"digest": {"step": steps, "params/w": 7}}))
"""


def checkout(root: Path, mixers: str = "a,b", train: str = TRAIN, base: str = BASE) -> Path:
    """Makes a folder with the minimum that counts as a checkout."""
    (root / "lm" / "mixers").mkdir(parents=True)
    for name in ["__init__", *mixers.split(",")]:
        (root / "lm" / "mixers" / f"{name}.py").touch()
    for name, text in (("lm/__init__", ""), ("launch/train", train), ("experiments/base", base)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.py").write_text(text)
    (root / ".gitignore").write_text("__pycache__\n")
    return root


def start(*arguments: str | Path, here: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.same_bits", *map(str, arguments)]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)


def pair(old: Path, new: Path) -> tuple[same_bits.Checkout, same_bits.Checkout]:
    return same_bits.look(old), same_bits.look(new)


def found(
    old: Path, new: Path, folder: Path, *, group: str = "mixers", mixers: str = "a,b"
) -> dict[str, list[str]]:
    asked = same_bits.cases([group], mixers.split(","))
    verdicts = same_bits.compare(pair(old, new), asked, folder, steps=3, added=["params/new*"])
    return {case: differences for case, differences, *_ in verdicts}


def test_equal_and_unequal_mixers_are_told_apart(tmp_path: Path) -> None:
    old, new = checkout(tmp_path / "old"), checkout(tmp_path / "new")
    assert found(old, new, tmp_path / "1") == {"mixer a": [], "mixer b": []}
    path = new / "launch" / "train.py"
    path.write_text(TRAIN.replace("(i + 2)", "(i + 2 + 1e-15 * (pattern == 'b') * (i == 1))"))
    differences = found(old, new, tmp_path / "2")
    assert differences["mixer a"] == []
    assert differences["mixer b"] == [
        "step 1, train/loss: 0.3333333333333333 != 0.33333333333333326"
    ]
    path.write_text(TRAIN.replace(": 7", ": 8, 'params/new': 1, 'opt_state/x': 2"))
    assert found(old, new, tmp_path / "3", mixers="a") == {
        "mixer a": [
            "only this checkout has opt_state/x",
            "1 of 2 final arrays, the first params/w",
        ]
    }


def test_a_checkout_that_fails_is_named(tmp_path: Path) -> None:
    old, new = checkout(tmp_path / "old"), checkout(tmp_path / "new")
    differences = found(old, new, tmp_path / "runs", mixers="broken")
    message = [f"{side} fails: error: it does not train" for side in (old, new)]
    assert differences == {"mixer broken": message}


def test_each_checkout_spells_a_case_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASE.replace("sequence_parallel", "later")
    train = TRAIN.replace("if pattern", "assert '--config.mesh.later' in flags\nif pattern")
    old, new = checkout(tmp_path / "old"), checkout(tmp_path / "new", train=train, base=base)
    case = same_bits.Case("switched", {"model.pattern": "a", "mesh.later": True})

    def compared(old_name: str, new_name: str) -> list[str]:
        names = {"mesh.sequence_parallel": old_name, "mesh.later": new_name}
        spellings = {
            key: lambda values, name=name: values | {name: values.pop("mesh.later")}
            for key, name in names.items()
        }
        monkeypatch.setattr(same_bits, "SPELLINGS", spellings)
        runs = same_bits.compare(pair(old, new), [case], tmp_path, steps=2, added=[])
        return next(iter(runs)).differences

    assert compared("mesh.sequence_parallel", "mesh.later") == []
    (message,) = compared("mesh.sequence_parallel", "mesh.latest")
    assert message == f"{new} fails: AssertionError"


@pytest.mark.parametrize(
    "case", same_bits.cases(same_bits.GROUPS, ["softmax", "gla"]), ids=lambda case: case.name
)
def test_a_case_is_a_configuration_of_this_checkout(case: same_bits.Case, tmp_path: Path) -> None:
    here = same_bits.Checkout(ROOT, frozenset(), frozenset(), "", "")
    values = same_bits._values(here, case, tmp_path, 20)
    values_of_flags = flags.FlagValues()
    config = cli.config_flag(flag_values=values_of_flags)
    given = [f"--config.{key}={value}" for key, value in values.items()]
    cli.parse(["train", f"--config={ROOT}/experiments/base.py", *given], values_of_flags)
    found = flatten(to_mapping(cli.load_config(config.value)))
    assert {key: found[key] for key in case.changes} == dict(case.changes)


def test_runs_of_a_commit_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = checkout(tmp_path / "old"), checkout(tmp_path / "new")
    identity = {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-C", old, *words], check=True, env=os.environ | identity)
    assert len(same_bits.look(old).commit) == 40
    assert same_bits.look(new).commit == ""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert found(old, new, tmp_path / "runs", mixers="a") == {"mixer a": []}
    (kept,) = (tmp_path / "runs" / same_bits.look(old).commit).glob("mixer-a-*")
    before = (kept / "metrics.jsonl").stat().st_mtime_ns
    assert found(old, new, tmp_path / "runs", mixers="a") == {"mixer a": []}
    assert (kept / "metrics.jsonl").stat().st_mtime_ns == before
    program = old / "launch" / "train.py"
    written = program.stat().st_mtime_ns
    program.write_text(TRAIN.replace("(i + 2)", "(i + 3)"))
    os.utime(program, ns=(written, written + 1))  # the change is within the same second
    assert found(old, new, tmp_path / "runs", mixers="a")["mixer a"], "changed files count"


def test_differences_in_order() -> None:
    nan = float("nan")
    old = Run([{"step": 1, "x": nan, "gone": 1}, {"step": 2, "x": 1.0}], {"params/w": 1, "p": 2})
    new = Run([{"step": 1, "x": nan}], {"params/w": 1, "q": 2})
    assert same_bits.differences(old, new, ["q"]) == [
        "only the other checkout has gone",
        "only the other checkout has p",
        "2 records != 1",
    ]
    assert same_bits.differences(old, old) == []


def test_cases_of_every_group() -> None:
    names = [case.name for case in same_bits.cases(same_bits.GROUPS, ["a", "b"])]
    wanted = ["mixer a", "mixer b", "mesh data=2", "mesh fsdp=2", "mesh tensor=2", "accumulation=2"]
    assert set(wanted) <= set(names)
    (whole,) = (c for c in same_bits.cases(["meshes"], ["a", "b"]) if c.num_devices == 8)
    assert whole.changes["model.pattern"] == "a,b"
    with pytest.raises(
        same_bits.UserError, match="--cases=mesh is not a group; did you mean 'mesh"
    ):
        same_bits.cases(["mesh"], ["a"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "name one other checkout: espalier same_bits OTHER_CHECKOUT"),
        (["{tmp}"], "{tmp} is not a checkout: it has no launch/train.py; name another folder"),
        (["{tmp}/old"], "{tmp}/old shares no mixer with this checkout; name another"),
        (["{tmp}/some", "--mixers=b"], "--mixers=b: not in both checkouts; known: gla, softmax"),
        (["{tmp}/bad"], "{tmp}/bad: experiments/base.py cannot be read: NameError: name 'x' is"),
    ],
)
def test_mistakes(given: list[str], message: str, tmp_path: Path) -> None:
    checkout(tmp_path / "old")
    checkout(tmp_path / "some", mixers="gla,softmax")
    checkout(tmp_path / "bad", base="x")
    done = start(*(text.format(tmp=tmp_path) for text in given))
    assert done.returncode == 2
    assert f"error: {message.format(tmp=tmp_path)}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_changed_constant_is_found_in_a_real_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy changes a constant of one mixer: that mixer is named, and the other is equal."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    for name in ("kernels", "lm", "launch", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    path = tmp_path / "copy" / "lm" / "mixers" / "retnet.py"
    text = path.read_text()
    assert "2.0 ** (-5.0" in text
    path.write_text(text.replace("2.0 ** (-5.0", "2.0 ** (-5.000001"))
    arguments = tmp_path / "copy", "--mixers=softmax,retnet", "--cases=mixers", "--steps=3"
    done = start(*arguments)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mixer softmax: equal: 3 records, ")
    assert lines[1].startswith("mixer retnet: step ")
    assert lines[2] == "1 of 2 equal, bit for bit"
