"""launch.bench --cases=peers_cpu: our step and generation beside a program of others, here played
by a script.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from experiments.base import get_config
from launch.benchmarks import huge_pages, peer_model, peers_cpu
from launch.benchmarks.peers_cpu import Prompts, Steps
from launch.benchmarks.problem import Options, Sizes
from launch.benchmarks.timing import Goal
from lm.config import UserError

SIZES = Sizes(num_layers=1, width=16, num_heads=2, ffn_dim=32, vocab_size=300)
ACTOR = """
import sys
log = open(__file__ + ".log", "a", buffering=1)
print("ready made 1.0", flush=True)
for line in sys.stdin:
    print(*sys.argv[1:], line.strip(), file=log)
    print(2e-3 * int(line.split()[1]), flush=True)
"""


def options(python: str = "") -> Options:
    base = get_config().to_dict()
    return Options(base=base, pairs=2, precision="float32", sizes=SIZES, peer_python=python)


def test_each_side_is_timed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "actor.py"
    script.write_text(ACTOR)
    monkeypatch.setattr(peers_cpu, "SCRIPT", script)
    goals = {"softmax": Goal("<=", 1.0), "gla": None}
    asked = (Steps(2, 16, goals, 2),), (Prompts(2, 4, 3, Goal("<=", 0.5)),)
    rows = {row.name: row for row in peers_cpu.run(options(), *asked)}
    assert {name.rpartition(" over ")[0] for name in rows} == {
        "steps/T16/softmax",
        "steps/T16/gla",
        "products/T16/ours",
        "generate/B2-4+3/ours",
        "generate/B2-4+3/first, ours",
    }
    for name, row in rows.items():
        assert math.isfinite(row.value)
        assert row.facts["peer"] == "made 1.0"
        assert {len(x) for x in row.samples.values()} == {1 if "first" in name else 2}
    (best,) = {name for name in rows if name.startswith("steps/T16/gla over torch")}
    assert rows[best].goal is None
    assert rows[best.replace("gla", "softmax")].goal == goals["softmax"]
    rates = rows[best].facts["tokens_per_second"]
    assert {"ours, softmax", "ours, gla", "by hand, softmax", "torch eager"} < set(rates)
    lines = [line.rsplit(maxsplit=2) for line in Path(f"{script}.log").read_text().splitlines()]
    assert {sizes for sizes, _, _ in lines} == {"1 16 2 32 300"}
    passes = {which for _, which, _ in lines}
    assert passes == {"eager:2,16", "compiled:2,16", "products:2,16", "generate:2,4,3"}


def test_products_are_those_of_the_model() -> None:
    """6 FLOPs a token and parameter: every matrix is in the list once."""
    sizes = Sizes()
    count = sum(inner * outer for inner, outer in peers_cpu._weights(sizes))
    assert count == 8_388_608  # as launch/benchmarks/problem.py counts


def test_without_a_peer_nothing_is_measured() -> None:
    """This environment has no torch, and `missing` is not a Python."""
    for python, reason in ((sys.executable, "no module torch"), ("missing", "No such file")):
        with pytest.raises(UserError, match=reason) as message:
            peers_cpu.check(options(python))
        assert "--peer_python" in str(message.value)


def test_every_pass_that_is_asked_for_exists() -> None:
    assert set(peer_model.KINDS) == {"eager", "compiled", "generate", "products"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's variable")
def test_huge_pages_are_compared_in_two_processes() -> None:
    """The processes are real; a step of 16 tokens says nothing about pages."""
    sizes = Sizes(num_layers=1, width=64, batch_size=1, context_length=16)
    given = Options(base=get_config().to_dict(), pairs=2, precision="float32", sizes=sizes)
    result = huge_pages._compare(given, "softmax")
    assert result.name == "huge_pages/softmax"
    assert {side: len(x) for side, x in result.samples.items()} == {
        "huge pages": 2,
        "as glibc does": 2,
    }
    assert math.isfinite(result.value)
