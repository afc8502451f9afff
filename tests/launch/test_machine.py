"""The header of a result file has the command that makes it, without paths of the machine."""

from __future__ import annotations

import sys

import pytest

from launch.benchmarks import machine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workdir=/home/me/runs/x", "--seeds=0,1"], "--workdir=DIR --seeds=0,1"),
        (["--workdir", "runs/x"], "--workdir DIR"),
        (["--config=experiments/a.py:grid,/data/text"], "--config=experiments/a.py:grid,DATA"),
        (["--config=experiments/a.py:/data/text"], "--config=experiments/a.py:DATA"),
        (["--table=/tmp/a b/sweep.jsonl"], "--table=sweep.jsonl"),
        (["--table=/tmp/a/sweep.jsonl"], "--table=sweep.jsonl"),
        (["--table=../../x/sweep.jsonl"], "--table=sweep.jsonl"),
        (["--prompt=a,/b"], "--prompt=a,/b"),
        (["power", "/tmp/a/sweep.jsonl"], "power sweep.jsonl"),
        (["--out=~/fit.json", "experiments/a.jsonl"], "--out=fit.json experiments/a.jsonl"),
        (["--config.data.sources.x.path=/a/b/*.txt"], "'--config.data.sources.x.path=*.txt'"),
    ],
)
def test_commands_are_recorded_without_paths_of_the_machine(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *given])
    assert machine.describe("x")["command"] == f"espalier x {message}"
