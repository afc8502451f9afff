"""The run folder: one live process, one configuration, whole files or none."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from lm import files
from lm.config import UserError
from lm.run import record
from tests.lm.lab import Lab, assert_equal_runs, copy, meta, records

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from lm.run import record
with record.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_recorded_command_can_be_pasted() -> None:
    started = [str(Path(cli.__file__).parent / "train.py"), "--workdir=a"]
    assert record._command(started) == ["espalier", "train", "--workdir=a"]
    assert record._command(["/b/mine.py", "--x=1"]) == ["mine.py", "--x=1"]


def test_a_folder_in_use_is_refused(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """The error names the process. The folder is free as soon as that process ends, however it
    ends.
    """
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as caught, record.locked(workdir):
        pass
    assert f"in use by process {holder.pid} on " in str(caught.value)
    assert str(caught.value).endswith("; stop it or choose another workdir")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with record.locked(workdir):
        assert (workdir / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        again = record.locked(workdir)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), again:
            pass
    with record.locked(workdir):
        pass


COMMANDS = ("train", "recall", "compare")


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(COMMANDS, 2)))
def test_a_folder_of_another_command_is_refused(tmp_path: Path, first: str, second: str) -> None:
    """Another command writes nothing there, and its own command goes on. Any command may begin in
    an empty folder.
    """
    workdir = tmp_path / "run"

    def enter(command: str) -> None:
        if command == "train":
            with record.locked(workdir):
                (workdir / "result").touch()
        else:
            cli.workdir(str(workdir), command)
            (workdir / "result").touch()

    enter(first)
    before = {path.name: path.read_bytes() for path in workdir.iterdir()}
    message = f"{workdir} was made by espalier {first}, not by espalier {second} .*; choose another"
    with pytest.raises(UserError, match=message):
        enter(second)
    assert {path.name: path.read_bytes() for path in workdir.iterdir()} == before
    enter(first)
    for path in workdir.iterdir():
        if path.name != files.MARK:
            path.unlink()
    enter(second)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    move = "move away what is in the way", "a file is in the way: move it away"
    reasons = f"File exists; {move[0]}", f"Not a directory; {move[1]}"
    for workdir, reason in zip(("file", "file/run"), reasons, strict=True):
        with pytest.raises(UserError) as caught, record.locked(tmp_path / workdir):
            pass
        line = str(caught.value)
        assert line.startswith(f"--workdir={tmp_path / workdir}: {reason}")
    (tmp_path / "file").rename(tmp_path / "away")
    for workdir in ("file", "other"):
        with record.locked(tmp_path / workdir):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), record.locked(tmp_path / "run"):
        pass


def changes(lab: Lab, given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        record.check_unchanged(lab.whole, lab.config(given))
    return str(caught.value)


def test_another_configuration_is_refused(lab: Lab) -> None:
    line = changes(lab, {"schedule": {"family": "cosine", "warmup": "256 tokens"}})
    assert "(schedule.family: 'power' -> 'cosine')" in line
    line = changes(lab, {"optimizer.beta1": 0.8, "model.tied_embeddings": False})
    assert "model.tied_embeddings: True -> False; optimizer.beta1: 0.9 -> 0.8)" in line
    assert line.endswith("; choose a new workdir")
    many = {f"optimizer.{k}": 0.5 for k in ("beta1", "beta2", "eps", "weight_decay", "clip_norm")}
    line = changes(lab, many | {"optimizer.max_skipped": 2, "seed": 3})
    assert " and 2 more); choose" in line
    assert "\n" not in line


def test_options_that_do_not_change_the_result_may_change(lab: Lab, tmp_path: Path) -> None:
    free = {
        "run.length": "99 steps",
        "evaluate.every": "1 steps",
        "log.samples": ("x",),
        "checkpoint.keep_last": 1,
        "run.accumulation": 2,
        "mesh.fsdp": 2,
        "mesh.zero1": True,
        "model.remat": "named",
        "model.kept": {"x": "host"},
        "optimizer.memory": "host",
    }
    record.check_unchanged(lab.whole, lab.config(free))
    record.check_unchanged(tmp_path / "new", lab.config({"seed": 3}))
    assert "data.batch_size: 4 -> 8" in changes(lab, {"data.batch_size": 8})


def test_a_damaged_record_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a configuration"):
        record.check_unchanged(tmp_path, lab.config())
    assert record.recorded(lab.whole, "tokenizer", "kind") == "bytes"
    for text in ("{", "[]", "{}", '{"tokenizer": 3}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json is damaged; restore it, or remove it"):
            record.recorded(tmp_path, "tokenizer", "kind")


@pytest.mark.parametrize("name", record.WRITTEN)
def test_a_removed_file_is_written_again(
    lab: Lab, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The messages above say to remove a damaged file."""
    workdir = copy(lab.whole, tmp_path / "run")
    before = (workdir / name).read_text()
    (workdir / name).unlink()
    assert lab.run(workdir).finished
    assert f"{workdir} lacks {name}: written anew" in caplog.messages
    after = (workdir / name).read_text()
    assert name == "run.json" or after == before
    assert_equal_runs(workdir, lab.whole)


def test_describe(lab: Lab) -> None:
    about = json.loads((lab.whole / "run.json").read_text())
    assert about["versions"].keys() >= {"jax", "flax", "python"}
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert len(about["commit"].removesuffix("-dirty")) == 40
    assert about["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert about["tokenizer"]["vocab_size"] == 257
    assert about["decay_start"] is None


def test_a_record_that_cannot_be_written(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full from the start, the error reaches the launcher, and the run goes on when
    there is space.
    """

    write = record.files.replace

    def fail(path: Path, text: str) -> None:
        if path.name == "config.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(record.files, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            lab.run(tmp_path)
    assert not (tmp_path / "config.json").exists()
    lab.run(tmp_path)
    assert meta(tmp_path) == meta(lab.whole)


def test_copies_are_runs_of_their_own(lab: Lab, tmp_path: Path) -> None:
    with record.locked(lab.whole):
        workdir = copy(lab.whole, tmp_path / "run")
        assert lab.run(workdir).finished
    assert records(workdir) == records(lab.whole)
