"""Stand-ins for srun, scontrol, gcloud and launch.train that log their calls."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Each stand-in appends {"name", "argv", "env"} to log, then runs the code `answer`.
STAND_IN = """import json, os, signal, subprocess, sys, time
here = {here!r}
name, argv = os.path.basename(sys.argv[0]).removesuffix(".py"), sys.argv[1:]
kept = {{k: v for k, v in os.environ.items() if k.startswith(("TPU_", "JAX_"))}}
with open(here + "/log", "a") as file:
    file.write(json.dumps({{"name": name, "argv": argv, "env": kept}}) + "\\n")

def next_answer(kind):
    \"\"\"Takes the first line from a file of answers; the last line is kept.\"\"\"
    with open(here + "/" + kind) as file:
        first, *rest = file.read().splitlines()
    if rest:
        with open(here + "/" + kind, "w") as file:
            file.write("".join(x + "\\n" for x in rest))
    return first

{answer}
"""
# Runs the command as srun does, in as many processes as the file `tasks` says, and forwards
# SIGTERM. If the file `twice` exists, it sends SIGTERM a second time, as Slurm itself does.
SRUN = """
command = argv[next(i for i, x in enumerate(argv) if not x.startswith("-")):]
tasks = int(next_answer("tasks")) if os.path.exists(here + "/tasks") else 1
job = {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost"}
def start(task):
    place = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
    return subprocess.Popen(command, env=os.environ | job | place)
children = [start(task) for task in range(tasks)]
times = 2 if os.path.exists(here + "/twice") else 1
def forward(signum, frame):
    for _ in range(times):
        for child in children:
            child.send_signal(signum)
        time.sleep(0.3)
signal.signal(signal.SIGTERM, forward)
sys.exit(max(child.wait() for child in children))
"""
# Trains until SIGTERM as launch.train does (a second SIGTERM has its default effect), or ends with
# the status in the file `status`.
TRAINING = """
if os.path.exists(here + "/status"):
    sys.exit(int(next_answer("status")))
stop = []
before = signal.getsignal(signal.SIGTERM)
def handle(signum, frame):
    stop.append(signum)
    signal.signal(signum, before)
signal.signal(signal.SIGTERM, handle)
open(here + "/started", "w").close()
while not stop or os.path.exists(here + "/hangs"):
    time.sleep(0.01)
time.sleep(0.8)  # saving
open(here + "/saved", "w").close()
sys.exit(int(next_answer("ends")) if os.path.exists(here + "/ends") else 75)
"""
SCONTROL = """
if "show" in argv:
    print("JobId=42 JobName=espalier JobState=" + next_answer("state") + " Reason=None")
elif os.path.exists(here + "/hangs"):
    os.remove(here + "/hangs")  # requeueing a job ends it
"""
# The file `trains` has a line for each start of a run: a status, and maybe a line to print.
GCLOUD = """
if "describe" in argv:
    print(next_answer("state"))
elif "create" in argv:
    sys.exit(int(next_answer("create")))
elif "ssh" in argv and "launch.train" in argv[-1]:
    status, *line = next_answer("trains").split(" ", 1)
    print(*line)
    sys.exit(int(status))
elif "ssh" in argv:
    sys.exit(int(next_answer("prepares")))
"""


class Bench(NamedTuple):
    """A checkout with a space in its name, a folder of stand-ins, and the log of their calls."""

    checkout: Path
    here: Path

    def answers(self, **files: str) -> None:
        for name, text in files.items():
            (self.here / name).write_text(text)

    def calls(self, name: str) -> list[dict[str, Any]]:
        log = self.here / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.checkout / "launch" / script), *arguments],
            cwd=self.checkout,
            env={"PATH": f"{self.here}:/usr/bin:/bin", "HOME": str(self.here), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err


def stand_in(path: Path, here: Path, answer: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    program = path.with_name(f"{path.name}.py")
    program.write_text(STAND_IN.format(here=str(here), answer=answer))
    # The interpreter is not in a #! line, where a path must not have a space.
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{program}' \"$@\"\n")
    path.chmod(0o755)


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def free_job() -> int:
    """A job number from which JAX derives a free port."""
    for number in range(1, 4096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 65536 - 4096 + number)):
                return number
    raise AssertionError("every port is taken")


def create(folder: Path) -> Bench:
    """Makes a git checkout of what the scripts need, and the stand-ins."""
    checkout, here = folder / "a checkout", folder / "bin"
    checkout.mkdir()
    shutil.copytree(
        ROOT / "launch", checkout / "launch", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "constraints.txt", ".python-version", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "experiments").mkdir()
    (checkout / "experiments" / "x.py").touch()
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "all")
    for name, answer in (("srun", SRUN), ("scontrol", SCONTROL), ("gcloud", GCLOUD)):
        stand_in(here / name, here, answer)
    stand_in(checkout / ".venv" / "bin" / "python", here, TRAINING)
    return Bench(checkout, here)
