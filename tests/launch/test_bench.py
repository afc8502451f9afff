"""launch.bench: every case runs on a tiny model, the step written by hand equals our step, and the
file says what was run where. No test checks a time.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.base import get_config
from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import (
    bare,
    compile,
    decode,
    evaluation,
    matmul_fraction,
    memory,
    ops,
    problem,
    recurrences,
    schedules,
    timing,
)
from launch.benchmarks import train_step as train_step_case
from launch.benchmarks.problem import Options, Sizes
from launch.benchmarks.timing import Goal, Result
from lm.build import Build
from lm.families import SCHEDULES
from tests.lm import tiny

ROOT = Path(__file__).parents[2]
SMALL = Sizes(
    num_layers=2,
    width=32,
    ffn_dim=48,
    vocab_size=384,
    batch_size=2,
    context_length=24,
    depths=(1, 2),
    squares=(16,),
)
SHORT = Case({"B": 1, "T": 64, "H": 2, "G": 2, "K": 16, "V": 16})


def options(precision: str = "float32") -> Options:
    base = get_config().to_dict()
    return Options(
        base=base,
        pairs=2,
        precision=precision,
        sizes=SMALL,
        cases=(SHORT,),
        compiler_options={"xla_backend_optimization_level": 0},
    )


create, compiled_step = problem.built, problem.compiled_step  # the fixture replaces both


@functools.cache
def built(mixer: str, precision: str = "float32") -> Build:
    return create(options(precision), mixer)


@functools.cache
def step(mixer: str, precision: str = "float32") -> Any:
    return compiled_step(options(precision), built(mixer, precision))


@pytest.fixture
def one_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks one mixer, with a step that is compiled once for all tests."""
    monkeypatch.setattr(problem, "MIXERS", ("stickbreaking",))
    monkeypatch.setattr(problem, "built", lambda _, mixer: built(mixer))
    monkeypatch.setattr(problem, "compiled_step", lambda _, __: step("stickbreaking"))


def check_times(result: Result, sides: set[str], number: int = 2) -> None:
    assert set(result.samples) == sides
    for samples in result.samples.values():
        assert len(samples) == number
        assert min(samples) > 0
    assert result.value > 0
    assert result.by_medians is not None


@pytest.mark.parametrize(
    ("mixer", "precision"),
    [
        ("stickbreaking", "float32"),
        pytest.param("softmax", "float32", marks=pytest.mark.slow),
        pytest.param("softmax", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_step_by_hand_is_our_step(mixer: str, precision: str) -> None:
    """Losses and parameters agree over two steps; the moments are not zero in the second."""
    one = built(mixer, precision)
    batch = one.put(problem.batch(SMALL))
    token_bytes = one.put_replicated(problem.token_bytes(SMALL))
    ours = tiny.state(one)
    by_hand = bare.init(one, ours.params)
    bare_step = tiny.compiled(jax.jit(bare.create(one)), by_hand, batch)
    start = by_hand.params
    for _ in range(2):
        ours, metrics = step(mixer, precision)(
            ours, batch, token_bytes, built(mixer, precision).numbers
        )
        by_hand, loss = bare_step(by_hand, batch)
        tolerance = 1e-6 if precision == "float32" else 1e-3
        assert float(loss) == pytest.approx(float(metrics["train/loss"]), rel=tolerance)
    params = bare.init(one, ours.params).params
    for a, b, before in zip(*map(jax.tree.leaves, (params, by_hand.params, start)), strict=True):
        moved = np.linalg.norm(a - before)
        assert moved > 0
        assert np.linalg.norm(a - b) < (1e-3 if precision == "float32" else 0.1) * moved


def test_train_step(one_mixer: None) -> None:
    (result,) = train_step_case.run(options())
    check_times(result, {"ours", "bare"})
    assert result.facts["form"] == "chunked"


def test_matmul_fraction(one_mixer: None) -> None:
    (result,) = matmul_fraction.run(options())
    check_times(result, {"step", "matmul 16", "matmuls of a layer"})
    flops = result.facts["flops"]
    assert flops["matmul 16"] == 2 * 16**3
    weights = 4 * 32 * 32 + 3 * 32 * 48
    assert flops["matmuls of a layer"] == 6 * 48 * weights
    assert flops["step"] > 6 * 48 * (2 * weights + 32 * 384), "attention is counted too"


def test_ops() -> None:
    results = ops.run(options())
    assert [r.name.split("/")[-1] for r in results] == [
        "stickbreaking over softmax",
        "stickbreaking over jax.nn",
        "softmax over jax.nn",
    ]
    for result in results:
        check_times(result, set(result.name.split("/")[-1].split(" over ")))
        assert result.goal is None, "goals hold for long sequences"


def test_memory(one_mixer: None) -> None:
    step, *others = memory.run(options())
    assert step.name == "memory/step/stickbreaking"
    assert {r.name for r in others} == {"memory/op/softmax", "memory/op/stickbreaking"}
    assert step.facts["temporary_bytes"] > 0
    assert step.facts["unit"] == "B T vocab"
    # A sequence of one tile has all its attention weights in memory at once.
    assert all(r.value >= 1 for r in others)


def test_compile_takes_a_fresh_step_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: the call is the same as in the other cases."""
    seen: list[Any] = []
    monkeypatch.setattr(problem, "MIXERS", ("stickbreaking",))
    monkeypatch.setattr(problem, "built", lambda *arguments: (arguments[2], object()))
    monkeypatch.setattr(problem, "compiled_step", lambda _, fresh: seen.append(fresh))
    rows: list[Any] = []
    generation = lambda _, fresh, count: rows.append((count, fresh))
    monkeypatch.setattr(problem, "compiled_generation", generation)
    step, generated = compile.run(options())
    check_times(step, {"1 layers", "2 layers"})
    check_times(generated, {"1 prompts", "8 prompts"})
    assert (step.name, generated.name) == (
        "compile/stickbreaking",
        "compile/generate/stickbreaking",
    )
    assert [depth for depth, _ in seen] == [1, 2, 1, 2, 2, 1]
    assert [count for count, _ in rows] == [1, 8, 1, 8, 8, 1]
    assert len(set(seen)) == len(set(rows)) == 6


def test_order_alternates_after_one_warm_run() -> None:
    seen: list[str] = []
    sides = {name: lambda name=name: seen.append(name) for name in "AB"}
    samples = timing.interleave(sides, 3)
    assert "".join(seen) == "AB" + "AB" + "BA" + "AB"
    assert [len(x) for x in samples.values()] == [3, 3]


def test_ratio_of_lower_quartiles() -> None:
    samples = {"a": [4.0, 2.0, 100.0, 2.0, 4.0], "b": [1.0, 1.0, 2.0, 50.0, 2.0], "c": [7.0]}
    result = timing.ratio("x", samples, ("a", "b"), Goal("<=", 1.9))
    assert (result.value, result.by_medians) == (2.0, 2.0)
    found = result.to_mapping()
    assert found["goal"] == {"relation": "<=", "bound": 1.9, "met": False}
    assert found["samples"] == {"a": samples["a"], "b": samples["b"]}
    assert found["lower_quartiles"] == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize(
    ("relation", "met"), [("<", [True, False, False]), ("<=", [True, True, False])]
)
def test_goals(relation: Any, met: list[bool]) -> None:
    assert [Goal(relation, 1.0).is_met(x) for x in (0.5, 1.0, 1.5)] == met
    assert Goal(">=", 0.5).is_met(0.5)


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "launch.bench", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command itself on a tiny case that compiles quickly."""
    script = (
        "from launch import bench, cli; from launch.benchmarks import ops, problem, timing\n"
        "from kernels.contract import Case\n"
        f"case = Case({SHORT.dims!r})\n"
        "ops.run = lambda o: ops._compare(case, o.pairs)\n"
        "cli.run(bench.main)\n"
    )
    out = tmp_path / "new folder" / "cpu.json"
    command = [sys.executable, "-c", script, "--cases=ops", "--pairs=3", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Without a terminal, the case and every row have a line each.
    assert [line.split("/")[0] for line in done.stderr.splitlines()] == ["ops"] * 4
    assert "stickbreaking over jax.nn" in done.stdout
    found = json.loads(out.read_text())
    assert found["command"].startswith("espalier bench --cases=ops --pairs=3")
    assert set(found["versions"]) == {"jax", "jaxlib", "flax", "optax", "numpy", "python"}
    assert isinstance(found["dirty"], bool)
    for key in ("commit", "date", "device", "cpu"):
        assert found[key]
    assert (found["pairs"], found["precision"]) == (3, "float32")
    assert len(found["results"]) == 3
    for result in found["results"]:
        assert all(len(x) == 3 for x in result["samples"].values())
        assert len(result["lower_quartiles"]) == len(result["medians"]) == 2
    assert [p.name for p in out.parent.iterdir()] == ["cpu.json"]


def test_a_case_that_cannot_run_here_is_refused_before_others_run(tmp_path: Path) -> None:
    """The file of an earlier run is kept."""
    out = tmp_path / "kept.json"
    out.write_text("kept")
    command = [sys.executable, "-m", "launch.bench", "--cases=train_step,kernels", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --cases=kernels needs a GPU or a TPU")
    assert len(done.stderr.splitlines()) == 1
    assert out.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cases=memory,train_stop", "error: --cases: no case 'train_stop'; "),
        ("--pairs=0", "error: "),
        ("--precision=float16", "error: "),
    ],
)
def test_mistakes(flag: str, message: str) -> None:
    done = bench(flag)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_every_op_is_compared_with_softmax_and_recurrent_ops_are_linear() -> None:
    lengths = recurrences.Lengths(beside=32, growth=(16, 32))
    dims = {"B": 1, "H": 2, "G": 2, "K": 8, "V": 8}
    results = recurrences.run(options(), lengths, dims)
    beside = [r for r in results if "/T32/" in r.name]
    growth = [r for r in results if "/growth/" in r.name]
    ops = {r.name.split("/")[-1].split()[0] for r in beside}
    assert ops == set(dispatch.names()) - {"softmax"}
    for result in beside:
        assert result.name.endswith(" over softmax")
        check_times(result, {result.name.split("/")[-1].removesuffix(" over softmax"), "softmax"})
    recurrent = {n for n in dispatch.names() if dispatch.get(n).state.growth == "constant"}
    assert {r.name.split("/")[-1].split()[0] for r in growth} == recurrent
    assert all(r.goal == Goal("<=", 2.2) for r in growth)


def test_only_decoding_with_a_constant_state_has_a_goal() -> None:
    """The mixer whose state does not grow has a goal; the other has none."""
    flat, growing = decode.run(options(), (8, 32), ("retnet", "softmax"))
    assert flat.goal is not None
    assert flat.goal.is_met(1.0)
    assert not flat.goal.is_met(1.2)
    assert growing.goal is None
    assert flat.facts["state_bytes"][8] == flat.facts["state_bytes"][32]
    assert growing.facts["state_bytes"][8] < growing.facts["state_bytes"][32]
    assert set(flat.samples) == {"8 tokens", "32 tokens"}


def test_schedules_as_a_share_of_a_step() -> None:
    found = [*schedules.run(options())]
    assert [result.name for result in found] == [f"schedules/{x}" for x in SCHEDULES.names()]
    for result in found:
        rate, log, train = (timing.quartile(result.samples[x]) for x in ("rate", "log", "train"))
        assert result.value == pytest.approx((rate + log) / train)
        assert 0 < rate < train


def test_evaluation_as_a_share_of_a_run(one_mixer: None) -> None:
    (found,) = evaluation.run(options())
    ratio = timing.quartile(found.samples["score"]) / timing.quartile(found.samples["train"])
    # With 48 tokens a batch: four evaluations of 32,768 tokens in a run of a million tokens.
    batches, steps = 4 * 683, 20834
    assert (found.facts["batches"], found.facts["steps"]) == (batches, steps)
    assert found.value == pytest.approx(ratio * batches / steps)
