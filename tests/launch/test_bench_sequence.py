"""launch.bench --cases=sequence on a small layer, and its table and pictures."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from kernels import dispatch
from launch import numbers
from launch.benchmarks import sequence, tables
from launch.benchmarks import sequence_page as page
from lm.config import UserError
from tests.launch.test_bench import options


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "names", lambda: ("gated_linear",))
    monkeypatch.setattr(sequence, "MIXERS", {"gated_linear": "gla"})
    monkeypatch.setattr(sequence, "SETTINGS", {})
    monkeypatch.setattr(sequence, "SHARING", (8,))
    monkeypatch.setattr(sequence, "LONGER", (8,))
    monkeypatch.setitem(sequence.LAYER, "data.context_length", 2048)


def test_programs_send_what_is_declared(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "MIXERS", {})
    found = {r.name: r for r in sequence.run(options())}
    states = found["sent/gated_linear by states contiguous"]
    assert states.value == 0.0
    assert states.facts["program"]["calls"] == {"all_gather": 2}
    assert found["fixed/gated_linear by states contiguous"].value == 1.0
    assert found["balance/zigzag"].value == 0.0
    assert found["balance/contiguous"].value > 10


def test_a_program_that_uses_other_collectives_misses_its_goal(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "MIXERS", {})
    counted = sequence.programs.collectives

    def twice(*args: Any) -> list[Any]:
        return [x._replace(bytes=x.bytes // 2, times=2 * x.times) for x in counted(*args)]

    monkeypatch.setattr(sequence.programs, "collectives", twice)
    found = [r for r in sequence.run(options()) if r.name.startswith("sent/")]
    assert all(r.value >= 1 for r in found)


@pytest.mark.slow
def test_memory_of_a_layer(small: None) -> None:
    found = {r.name: r for r in sequence.run(options()) if r.name.startswith("memory/")}
    assert all(r.value < 0.3 for r in found.values())
    assert len(found) == sum(len(s.layouts) for s in dispatch.get("gated_linear").sequence)


def test_too_few_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match="JAX found 1; on a CPU set JAX_NUM_CPU_DEVICES=8"):
        sequence.check(options())


def test_the_pictures_show_the_committed_numbers() -> None:
    for path, svg in tables.pictures(numbers.ROOT).items():
        assert (numbers.ROOT / path).read_text() == svg, "run espalier numbers"


def test_the_table_holds_every_row() -> None:
    path = numbers.ROOT / "results/bench/sequence.json"
    results = json.loads(path.read_text())["results"]
    message = page.table(results)
    rows = [r for r in results if r["name"].startswith(("sent/", "memory/"))]
    assert message.count("\n| ") == len(rows) + 2  # the headers of both tables
    assert all(r["goal"] is None or r["goal"]["met"] for r in results)
