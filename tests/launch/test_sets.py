"""Sets for launch.evaluate: --source adds one to those of the run, --text evaluates it alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import sets
from lm.config import DataConfig, UserError, from_mapping
from lm.evaluation import statistics
from lm.evaluation.evaluate import Result
from lm.evaluation.scoring import Cost
from tests.lm import launched
from tests.lm.test_config import SOURCE, values


@pytest.fixture
def data() -> DataConfig:
    return from_mapping(values({"data.sources": {"mine": SOURCE}})).data


def test_sources_are_added_and_a_text_is_evaluated_alone(data: DataConfig) -> None:
    found = sets.added(data, ["a:x.txt", "b:memory://y/*.jsonl"]).sources
    assert list(found) == ["mine", "a", "b"]
    assert (found["b"].path, found["b"].valid_fraction, found["b"].weight) == (
        "memory://y/*.jsonl",
        1.0,
        0.0,
    )
    assert list(sets.alone(data, "x.txt").sources) == ["text"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mine:x"], "--source=mine:... is a source of the run; choose another name"),
        (["a:x", "a:y"], "--source gives the name 'a' twice; choose another name"),
        (["x.txt"], "--source='x.txt' must be NAME:PATH with a word as NAME"),
        (["a b:x"], "--source='a b:x' must be NAME:PATH with a word as NAME"),
    ],
)
def test_mistakes(data: DataConfig, given: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sets.added(data, given)
    assert str(caught.value) == message


def test_mistakes_of_a_text_name_the_flag() -> None:
    with pytest.raises(UserError, match=r"^--text='x' matches no file; y$"), sets.by_flag():
        raise UserError("data.sources.text.path='x' matches no file; y")
    with pytest.raises(UserError, match=r"^cannot read x: damaged$"), sets.by_flag():
        raise UserError("cannot read x of data.sources.text: damaged")


def test_the_line_of_a_text() -> None:
    """Two documents have 100 and 300 bytes, 200 and 500 bits, 40 and 100 tokens."""
    bits, size, tokens = np.array([200.0, 500.0]), np.array([100.0, 300.0]), np.array([40, 100])
    numbers = {
        "bpb": statistics.ratio(bits, size, keep_units=True),
        "bpb/text": statistics.ratio(bits, size),
        "loss/text": statistics.ratio(bits * math.log(2), tokens),
    }
    line = sets.line(Result(numbers, Cost(140, 0.0, 0.0)), "x.txt")
    assert line.startswith("x.txt: 1.7500 bits per byte (95 %: ")
    assert line.endswith("), perplexity 32 (3.4657 nats per token); 140 tokens, 400 bytes")
    one = {name: statistics.ratio([700.0], [400.0], keep_units=True) for name in numbers}
    assert " (95 %" not in sets.line(Result(one, Cost(1, 0.0, 0.0)), "x.txt")


@pytest.mark.slow
def test_a_text_has_the_numbers_of_the_same_text_as_a_source(tmp_path: Path) -> None:
    run, text, out = tmp_path / "run", tmp_path / "x.txt", tmp_path / "out.json"
    text.write_text("the quick brown fox\n" * 30)
    short = {"run.length": "20 steps", "checkpoint.every": "20 steps"}
    env = os.environ | launched.environment()

    def command(module: str, *flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{module}", *flags],
            capture_output=True,
            text=True,
            env=env,
            cwd=launched.ROOT,
            check=True,
        )
        return done.stdout

    command("train", *launched.arguments(**short), f"--workdir={run}")
    (line,) = command("evaluate", f"--checkpoint={run}", f"--text={text}").splitlines()
    whole = ["--max_tokens=100000", f"--source=same:{text}", f"--out={out}"]
    printed = json.loads(command("evaluate", f"--checkpoint={run}", *whole, "--json"))
    written = json.loads(out.read_text())
    assert printed == {"checkpoint": str(run)} | written
    numbers = written["tasks"]["bits_per_byte"]["numbers"]
    loss, bits = numbers["loss/same"]["value"], numbers["bpb/same"]["value"]
    assert line.startswith(f"{text}: {bits:.4f} bits per byte, perplexity {math.exp(loss):.4g} (")
    assert line.endswith(" 600 tokens, 599 bytes")
