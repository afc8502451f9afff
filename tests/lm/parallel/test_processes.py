"""Several processes train as one would, end together, and can be resumed by any other number."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from lm import metrics
from lm.config import UserError
from lm.mapping import MISTAKE, UNFINISHED
from lm.parallel import processes, watch
from lm.parallel.processes import Start
from lm.run import checkpoint
from tests.lm import lab as lab_lib
from tests.lm import launched
from tests.lm.lab import Lab, assert_equal_runs, records

STEPS = 12
PATIENCE = 4.0
TIMEOUT = 180.0
CHANGES: dict[str, Any] = {
    "mesh.data": 8,
    "data.batch_size": 8,
    "optimizer.eps": 1e-3,  # Adam must not make a step of its full size from rounding error
    "run.length": f"{STEPS} steps",
    "evaluate.every": "6 steps",
    "checkpoint.every": "4 steps",
    "checkpoint.keep_last": 20,
    "log.samples": "('the ',)",
    "log.sample_tokens": 3,
}


MESHES: list[dict[str, Any]] = [{}, {"mesh.data": 1, "mesh.sequence": 8}]
HYBRID = {"model.pattern": "stickbreaking,gated_deltanet", "model.num_layers": 2}
HEADS = {"model.num_heads": 8, "model.num_kv_heads": 8}
SHARED_ROWS: list[tuple[int, int, dict[str, Any]]] = [
    (2, 4, MESHES[1] | HYBRID),
    (2, 4, MESHES[1] | HEADS | {"mesh.sequence_strategy": "all_to_all"}),
    (2, 4, MESHES[1] | {"mesh.sequence_layout": "zigzag", "run.accumulation": 2}),
    (4, 2, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.sequence": 4}),
]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(
    workdir: Path, num: int, devices: int, changes: dict[int, dict[str, Any]] | None = None
) -> list[subprocess.Popen[str]]:
    """Starts `num` processes with `devices` each. `changes` holds those of some processes."""
    port, found = free_port(), []
    for i in range(num):
        keys = CHANGES | (changes or {}).get(i, {})
        command = [*launched.command(workdir)[:3], *launched.arguments(**keys)]
        command += [f"--workdir={workdir}", f"--patience={PATIENCE}"]
        if num > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num}"]
            command += [f"--process_id={i}"]
        env = os.environ | launched.environment() | {"JAX_NUM_CPU_DEVICES": str(devices)}
        pipe = subprocess.PIPE
        found.append(
            subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, cwd=launched.ROOT, env=env
            )
        )
    return found


def outcome(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, list[str]]]:
    """For each process: its exit status, what it printed, and its error lines."""
    found = []
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for process, (out, err) in zip(started, outputs, strict=True):
        expected = (0, MISTAKE, UNFINISHED, -signal.SIGKILL)
        assert process.returncode in expected, err
        assert "Traceback" not in err, err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        found.append((process.returncode, out, errors))
    return found


def trained(workdir: Path, num: int, devices: int, changes: dict[str, Any] | None = None) -> Path:
    """A run to its end. Only the first process reports. `changes` apply to all processes."""
    message = outcome(start(workdir, num, devices, dict.fromkeys(range(num), changes or {})))
    assert [(status, errors) for status, _, errors in message] == [(0, [])] * num
    assert [f"report: {workdir}/report.html" in out for _, out, _ in message] == [
        i == 0 for i in range(num)
    ]
    return workdir


def assert_close(a: Path, b: Path, rel: float = 1e-6) -> None:
    """The losses of every step and evaluation are close."""
    ours, theirs = records(a), records(b)
    assert [x["step"] for x in ours] == [x["step"] for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for key in (k for k in x if k == "train/loss" or k.startswith("eval/")):
            assert x[key] == pytest.approx(y[key], rel=rel, abs=0), (x["step"], key)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the devices of two processes share: the rows of a batch, or the tokens of every row."""
    return request.param


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("one") / "run", 1, 8)


@pytest.fixture(scope="module")
def two(mesh: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("two") / "run", 2, 4, mesh)


@pytest.fixture(scope="module")
def killed(mesh: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, the second of which was killed after a checkpoint."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    started = start(workdir, 2, 4, {0: mesh, 1: mesh})
    while not any(x["step"] >= 6 for x in metrics.read(workdir)):
        assert all(process.poll() is None for process in started)
    started[1].kill()
    (status, _, errors), (other, _, none) = outcome(started)
    assert (status, other, none) == (UNFINISHED, -signal.SIGKILL, [])
    (line,) = errors
    assert "is gone; start all processes again with the same command" in line
    assert checkpoint.steps(workdir) == [4]
    return workdir


def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    assert_close(one, two)
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    assert (two / "report.html").exists()
    assert checkpoint.steps(two) == checkpoint.steps(one)
    assert len(list((two / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("num", "devices", "changes"), SHARED_ROWS, ids=str)
def test_processes_share_the_tokens_of_rows(
    tmp_path: Path, num: int, devices: int, changes: dict[str, Any]
) -> None:
    """Several kinds of layer and strategy, and four processes of which pairs hold the same rows."""
    several = trained(tmp_path / "several", num, devices, changes)
    assert_close(trained(tmp_path / "one", 1, 8, changes), several)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_it_was(
    mesh: dict[str, Any], killed: Path, two: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    assert_equal_runs(trained(tmp_path / "run", 2, 4, mesh), two)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 4])
def test_a_killed_run_goes_on_in_one_process(
    killed: Path, two: Path, tmp_path: Path, devices: int
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    (started,) = start(tmp_path / "run", 1, devices, {0: {"mesh.data": -1}})
    _, err = started.communicate(timeout=TIMEOUT)
    assert started.returncode == 0, err
    assert f"'data': {devices}, 'fsdp': 1, 'tensor': 1, 'sequence': 1}} of 1: the same" in err
    assert_close(tmp_path / "run", two)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[:1], indirect=True, ids=str)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_stops_all(two: Path, tmp_path: Path, signum: int) -> None:
    """All processes stop at the same step and save. Resumed, the run ends as it would have."""
    workdir = tmp_path / "run"
    started = start(workdir, 2, 4)
    launched.interrupt(started[1], workdir, signum=signum, step=2)
    (status, out, errors), (other, nothing, none) = outcome(started)
    assert (status, other, errors, none) == (UNFINISHED, UNFINISHED, [], [])
    assert "stopped at step" in out
    assert "stopped" not in nothing
    assert 2 < checkpoint.steps(workdir)[-1] < STEPS
    assert_equal_runs(trained(workdir, 2, 4), two)


@pytest.mark.parametrize("mesh", MESHES[:1], indirect=True, ids=str)
def test_a_mistake_of_one_ends_all(two: Path, tmp_path: Path) -> None:
    """A mistake of the second process, and one of the first, which reads the folder before the
    second does.
    """
    message = outcome(start(tmp_path / "run", 2, 4, {1: {"seed": 5}}))
    line = "process 1 has config seed=5, process 0 0; start all of them with the same command"
    assert [status for status, _, _ in message] == [2, 2]
    assert [errors for *_, errors in message] == [
        [f"error: process 1 of 2: {line}"],
        [f"error: {line}"],
    ]
    changed: dict[str, Any] = {"optimizer.beta1": 0.8}
    message = outcome(start(two, 2, 4, {0: changed, 1: changed}))
    assert [status for status, _, _ in message] == [2, 2]
    line = f"--workdir={two} holds a run with another config (optimizer.beta1: 0.9 -> 0.8)"
    assert [len(errors) for *_, errors in message] == [1, 1]
    assert message[0][2][0].startswith(f"error: {line}")
    assert message[1][2][0].startswith(f"error: process 0 of 2: {line}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "first"),
    [
        ("sizes", "{'data': 4, 'fsdp': 2, 'tensor': 1, 'sequence': 1}"),
        ("sequence", "{'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 2}, contiguous, by auto,"),
    ],
)
def test_elastic(tmp_path: Path, meshes: str, first: str) -> None:
    """A run that moves has the losses of a run that stays, from batches that are equal bit for bit.

    "sizes" moves from 8 devices to 4, then 2. "sequence" moves from 2 that share the tokens of rows
    to 4 of them, then 1.
    """
    lab_lib.write_corpus(tmp_path / "corpus")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.lm.elastic", str(tmp_path), meshes]
    done = subprocess.run(
        command, check=False, cwd=launched.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "moved", tmp_path / "whole")
    moved, whole = ((tmp_path / f"{name}.batches").read_text() for name in ("moved", "whole"))
    assert moved == whole
    assert len(whole.splitlines()) == STEPS
    assert checkpoint.steps(tmp_path / "moved") == [4, 8, lab_lib.DECAY_START, STEPS]
    message = [line for line in done.stderr.splitlines() if "summed in another order" in line]
    assert len(message) == 2
    assert f"from mesh {first} of 1 processes" in message[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("one", "a:1", None, None), "--num_processes is missing: --coordinator, --num_"),
        (("one", None, 2, 0), "--coordinator is missing"),
        (("one", "a:1", 2, None), "--process_id is missing"),
        (("one", "a:1", 2, 2), "--process_id=2 with --num_processes=2; number .* from 0 to 1"),
        (("one", "a", 2, 0), "--coordinator=a is not HOST:PORT"),
        (("auto", "a:1", 2, 0), "--processes=auto and --coordinator=a:1 exclude each other"),
    ],
    ids=str,
)
def test_wrong_flags(flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processes.choose(*flags)


def test_flags() -> None:
    assert processes.choose("one", None, None, None) is None
    assert processes.choose("auto", None, None, None) == Start()
    assert processes.choose("one", "a:1", 3, 2) == Start("a:1", 3, 2)


@pytest.mark.parametrize(("patience", "later"), [(3.0, 100), (30.0, 100), (300.0, 600)])
def test_heartbeats_of_jax_come_later(
    patience: float, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise JAX would give up a process before the patience that was asked for is over."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: found.update(options))
    processes._initialize(Start("a:1", 2, 0), patience)
    assert found["heartbeat_timeout_seconds"] == later > patience


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--processes=auto"],
            "error: --processes=auto: no TPU pod and no Slurm job found; set --coordinator, "
            "--num_processes, --process_id",
        ),
        (["--num_processes=0"], "error: flag --num_processes=0: "),
        (["--processes=two"], "error: flag --processes=two: "),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    command = [*launched.command(tmp_path / "run"), *flags]
    process = launched.start(command)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "run").exists()


def test_alone() -> None:
    """A single process waits for no other, and agrees with itself."""
    with processes.joined(None, 3.0), watch.one_fate(), processes.first_alone():
        processes.wait()
        assert processes.agree({"a": 1}) == {"a": 1}
        assert processes.gather("x") == ["x"]
        processes.check_equal("config", {"a": (1,)})
    assert (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)


def test_memory_that_runs_out_is_explained(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(call: int, args: Any) -> None:
        if call == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 GiB")

    with pytest.raises(UserError, match="too little memory for this run") as caught:
        lab.run(tmp_path / "run", step=fail)
    assert "\n" not in str(caught.value)
    message = capsys.readouterr().err
    assert "largest buffers of a device (estimated)" in message
    assert "each by itself, by the formula" in message
