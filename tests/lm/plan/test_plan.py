"""Plans on CPU devices: formulas against the compiler, the order of a search, launch lines,
mistakes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lm import plan as plan_lib
from lm import targets
from lm.build import build
from lm.config import Config, UserError
from lm.parallel import mesh as mesh_lib
from lm.plan import Launch, memory, page, program, search, table, traffic
from tests.lm import tiny

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = Launch("--config=x.py", "run")
MODES: dict[str, dict[str, Any]] = {
    "dp": {"mesh.data": 4},
    "zero1": {"mesh.data": 4, "mesh.zero1": True},
    "zero3": {"mesh.data": 1, "mesh.fsdp": 4},
    "tp": {"mesh.data": 2, "mesh.tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_state_is_what_the_compiler_updates_in_place(mode: str) -> None:
    config = tiny.config(MODES[mode] | {"model.remat": "full"})
    built = build(config, jax.devices()[:4])
    compiled = program.create(built)
    needs = memory.estimate(built, memory.measure(config, jax.devices()[:4]))
    assert compiled.state is not None
    assert needs.state == pytest.approx(compiled.state, rel=0.01)
    assert compiled.batch == pytest.approx(needs.batch, rel=0.3)  # XLA drops unread fields
    sent = sum(flow.bytes for flow in traffic.formula(built))
    # The CPU backend writes a reduce-scatter as an all-reduce, which sends twice as much.
    assert 0.5 < sent / sum(flow.bytes for flow in compiled.flows) < 1.3


def test_zero3_holds_a_part_of_the_state() -> None:
    sizes = []
    for ways in (1, 2, 4):
        config = tiny.config({"mesh.data": 1, "mesh.fsdp": ways})
        sizes.append(memory.shard_bytes(build(config, jax.devices()[:ways]).abstract_state))
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)
    assert sizes[0] / sizes[2] == pytest.approx(4, rel=0.01)


def test_a_data_parallel_step_sends_its_gradients_once() -> None:
    """It sends 2 (R-1)/R of every parameter, four bytes each, for any number of microbatches."""
    for accumulation in (1, 2):
        changes = {"mesh.data": 2, "run.accumulation": accumulation}
        built = build(tiny.config(changes), jax.devices()[:2])
        count = plan_lib.parameters(built)["by role"]["total"]
        (flow,) = traffic.formula(built)
        assert flow == ("all-reduce", ("data",), 4 * count)


def test_gathers_of_zero3_repeat_with_the_microbatches() -> None:
    sums = []
    for accumulation in (1, 2):
        changes = {"mesh.data": 1, "mesh.fsdp": 2, "run.accumulation": accumulation}
        built = build(tiny.config(changes), jax.devices()[:2])
        sums.append(sum(flow.bytes for flow in traffic.formula(built)))
    assert sums[1] == pytest.approx(2 * sums[0])


def plan_of(changes: dict[str, Any], *, is_compiled: bool = False) -> plan_lib.Plan:
    target = targets.parse("cpu-4")
    return plan_lib.plan(tiny.config(changes), target, LAUNCH, is_compiled=is_compiled)


ROWS = {"data.batch_size": 64}


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("v4-8", "v5p-8", "v6e-4", "tpu7x-8")]


@pytest.mark.parametrize("name", ["v5e-4", "h100-4", "cpu-64", *SLOW])
def test_formulas_need_no_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler of any target a plan by formula works. A plan for the CPU needs no more
    devices than there are.
    """
    found_spec = importlib.util.find_spec
    absent = ("libtpu", "jax_plugins")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda module, *rest: None if module.startswith(absent) else found_spec(module, *rest),
    )
    target = targets.parse(name)
    config = tiny.config({"mesh.data": target.devices} | ROWS)
    found = plan_lib.plan(config, target, LAUNCH, is_compiled=False)
    assert found.memory.total > found.memory.state > 0
    assert {flow.axes for flow in found.flows} == {("data",)}
    assert (found.times is None) == (name == "cpu-64")
    devices = targets.devices(target, is_compiled=False)
    hosted = tiny.config({"mesh.data": target.devices, "optimizer.memory": "host"} | ROWS)
    assert memory.estimate(build(hosted, devices), memory.measure(hosted, devices)).host > 0


def test_a_plan_is_printed_and_written() -> None:
    found = plan_of({"mesh.data": 4}, is_compiled=True)
    written = json.loads(json.dumps(plan_lib.to_json(found)))
    assert written["target"]["topology"] == "4"
    assert found.program is not None
    assert written["program"]["state"] == pytest.approx(written["memory"]["state"], rel=0.01)
    assert written["total"] == found.program.total
    assert written["config"]["mesh"]["data"] == 4
    by_part = found.parameters["by part"]
    assert by_part["total"] == found.parameters["by role"]["total"]
    assert set(by_part) == {"embedding", "mixer", "mlp", "norm", "total"}
    assert [row.at for row in found.schedule] == ["start", "after warm-up", "before decay", "end"]
    assert found.saving.bytes == pytest.approx(12 * by_part["total"], rel=0.01)
    assert found.fits is None
    assert found.times is None
    text = table.text(found)
    for part in ("cpu-4: 4 chips", "all-reduce over data", "after warm-up", "espalier train"):
        assert part in text
    assert "not modelled" in text


LINES = {
    "cpu-4": "JAX_NUM_CPU_DEVICES=4 espalier train --config=x.py --workdir=run",
    "h100-8": "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 espalier train --config=x.py --workdir=run",
    "h100-64": "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 sbatch --nodes=8 --ntasks-per-node=8 "
    "--gpus-per-node=8 --time=24:00:00 launch/slurm.sh --config=x.py --workdir=run",
    "v5p-256": "launch/tpu_pod.sh --name=v5p256 --zone=ZONE --restart -- --config=x.py "
    "--workdir=/shared/runs/run --data_dir=/shared/data",
}


CODE = "import shlex, sys; from launch import cli, plan; cli.parse(sys.argv, plan.flags.FLAGS); "
CODE += "print(shlex.join(cli.config_words()))"


def test_flags_of_the_configuration_are_kept_however_they_are_written() -> None:
    words = "--target v5e-16 --config base --config.mesh.data 2 -config.seed=-3 "
    words += "--search --config.mesh.zero1 --workdir runs/x --noconfig.model.unroll "
    command = [sys.executable, "-c", CODE, *words.split(), "--config.init_from=a b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shlex.split(done.stdout) == [
        "--config=base",
        "--config.mesh.data=2",
        "--config.seed=-3",
        "--config.mesh.zero1=True",
        "--config.model.unroll=False",
        "--config.init_from=a b",
    ], done.stderr


@pytest.mark.parametrize("name", LINES)
def test_launch_lines(name: str) -> None:
    assert plan_lib.launch_line(targets.parse(name), LAUNCH, {}) == LINES[name]


def mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the right shape that repeats one device."""
    grid: Any = np.array([jax.devices()[0]] * (data * fsdp * tensor))
    grid = grid.reshape(data, fsdp, tensor, 1)
    return Mesh(grid, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)


def test_bandwidth_depends_on_the_hosts_a_group_spans() -> None:
    gpus = targets.parse("h100-64")
    grid = mesh(2, 8, 4)
    assert traffic.bandwidth(("tensor",), grid, gpus) == 450e9  # inside a host
    assert traffic.bandwidth(("data",), grid, gpus) == 50e9  # each GPU has its own adapter
    assert traffic.bandwidth(("fsdp",), grid, gpus) == 100e9  # two adapters of a host
    assert traffic.bandwidth((), grid, gpus) == 400e9  # all adapters of a host
    tpus = targets.parse("v5e-64")
    assert traffic.bandwidth(("data",), grid, tpus) == tpus.chip.link_bandwidth


@pytest.mark.slow
def test_a_search_tries_every_mesh_that_divides() -> None:
    config = tiny.config({"data.batch_size": 4, "model.num_kv_heads": 1})
    points = list(search.by_formula(config, targets.parse("cpu-2"), jax.devices()[:2]))
    meshes = {tuple(point.values[f"mesh.{axis}"] for axis in mesh_lib.AXES) for point in points}
    # One key-value head cannot be split over two devices, and rows of so few tokens are not.
    assert meshes == {(2, 1, 1, 1), (1, 2, 1, 1)}
    assert {p.values["model.remat"] for p in points} == {"none", "dots", "full"}
    assert {p.values["run.accumulation"] for p in points} == {1, 2}  # a device has two rows
    assert "remat=full" in search.table(points, limit=len(points))
    assert math.isfinite(json.loads(json.dumps(search.to_json(points)))[0]["bytes"])


def small(config: Config, usable: int | None) -> tuple[plan_lib.Plan, list[search.Point]]:
    """A search by formula for a device with this many usable bytes."""
    target = targets.parse("cpu-1")
    target = dataclasses.replace(target, chip=dataclasses.replace(target.chip, usable_bytes=usable))
    launch = LAUNCH._replace(flags="--config=x.py --config.run.accumulation=3")
    return search.search(config, target, launch, lambda message: None, is_compiled=False)


def test_a_search_takes_the_first_accumulation_that_fits() -> None:
    """The configuration's own accumulation is among those that are tried. If nothing fits, the
    smallest plan comes first. A flag is not repeated.
    """
    config = tiny.config({"data.batch_size": 12, "run.accumulation": 3, "model.num_layers": 1})
    found, points = small(config, 1)
    assert not any(point.fits for point in points)
    assert points[0].memory.total == min(point.memory.total for point in points)
    assert {point.values["run.accumulation"] for point in points} == {1, 2, 3, 4}
    assert found.launch.count("--config.run.accumulation=") == 1
    everything = small(config, None)[1]
    assert {point.values["run.accumulation"] for point in everything} == {1}


class Refusing:
    """A step that every compiler refuses."""

    def lower(self, *arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError(
            "UNIMPLEMENTED: no such\n  collective (1.00G exceeds 0.5G)"
        )


def test_what_a_compiler_does_not_support_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(tiny.config({"mesh.data": 4}), jax.devices()[:4])
    refused = program.create(dataclasses.replace(built, step=Refusing()))
    assert refused.refusal == "UNIMPLEMENTED: no such collective (1.00G exceeds 0.5G)"
    assert (refused.total, refused.is_unsupported) == (None, True)
    monkeypatch.setattr(program, "create", lambda built: refused)
    found = plan_of({"mesh.data": 4}, is_compiled=True)
    assert (found.fits, found.remedy) == (False, {})
    text = table.text(found)
    assert "REFUSED by the compiler\nthe compiler: UNIMPLEMENTED: no such" in text
    full = dataclasses.replace(refused, refusal="RESOURCE_EXHAUSTED: 1.00G exceeds 0.5G")
    assert not full.is_unsupported


def some_points(*_: Any) -> list[search.Point]:
    needs = dict.fromkeys((f.name for f in dataclasses.fields(memory.Memory)), 1)
    values = [{"mesh.data": 2, "mesh.sequence": 1, "run.accumulation": n} for n in (1, 2)]
    return [search.Point(v, memory.Memory(**needs), None, True, None) for v in values]


def test_a_search_goes_on_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, message = program.create, [], []

    def create(built: Any) -> program.Program:
        calls.append(built.config.run.accumulation)
        refused = real(dataclasses.replace(built, step=Refusing()))
        return refused if len(calls) == 1 else dataclasses.replace(refused, refusal="", total=1)

    monkeypatch.setattr(search, "by_formula", some_points)
    monkeypatch.setattr(program, "create", create)
    target = targets.parse("cpu-2")
    best, points = search.search(tiny.config(), target, LAUNCH, message.append)
    assert calls == [1, 2]
    assert best is points[1].plan
    assert best.fits is None
    assert any(line.startswith("refused: UNIMPLEMENTED") for line in message)
    lines = search.table(points).splitlines()
    assert [("refused" in line) for line in lines] == [False, True, False]
    assert search.to_json(points)[0]["compiled_bytes"] is None


def test_a_search_by_formula_alone_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "by_formula", some_points)
    monkeypatch.setattr(program, "create", None)
    target = targets.parse("cpu-2")
    best, points = search.search(tiny.config(), target, LAUNCH, print, is_compiled=False)
    assert best.program is None
    assert "--config.mesh.data=2" in best.launch
    assert all(point.plan is None for point in points)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 3}, "mesh data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices"),
        ({"mesh.data": 1, "mesh.tensor": 4}, "divisible by 4"),
        ({"mesh.data": 4, "data.batch_size": 6}, r"6 rows do not divide over data\*fsdp = 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_values(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(changes)


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.plan", "--config=base", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_launcher_writes_a_plan(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    done = launched("--target=cpu-8", "--nocompile", f"--output={output}", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    assert "cpu-8: 8 chips" in done.stdout
    written = json.loads(output.read_text())
    assert written["launch"].endswith(
        "espalier train --config=base --config.seed=3 --workdir=runs/planned"
    )


def test_the_launcher_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    done = launched("--target=v5p-255", f"--output={output}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --target=v5p-255: no such machine; did you mean 'v5p-25")
    assert done.stderr.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=LICENSE/plan.json"], "error: --output=LICENSE/plan.json: File exists; choose"),
        (["--config.model.kept={'mixr': 'device'}"], "error: unknown tensor model.kept.mixr; did"),
        (["--workdir=gs://b/run"], "error: --workdir=gs://b/run is an address; name a path"),
    ],
    ids=str,
)
def test_mistakes_are_reported_before_any_work(flags: list[str], message: str) -> None:
    done = launched("--target=cpu-8", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_the_committed_page_is_that_of_the_committed_plans() -> None:
    folder = ROOT / "experiments" / "plans"
    paths = sorted(folder.glob("*.json"))
    assert paths
    assert page.page(paths) == (folder / "plans.md").read_text(encoding="utf-8")


def test_a_file_that_is_not_a_plan_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "x.json"
    for content in ("{", "[]", "{}"):
        wrong.write_text(content)
        with pytest.raises(
            UserError, match=r"x\.json is not a plan; name files that espalier plan"
        ):
            page.page([wrong])
    with pytest.raises(UserError, match="No such file"):
        page.page([tmp_path / "absent.json"])
