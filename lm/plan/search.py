"""Which mesh, remat and accumulation: all of them by formula, the best three by the compiler.

Order of steps:
1. Every way to write the devices as data x fsdp x tensor x sequence is built, with and without
   ZeRO-1 (sequence is 1 where rows are too short to share). The build refuses sizes that are not
   divisible.
2. Each mesh is tried with every remat, and with more and more accumulation until it fits.
3. The points that fit come first, in the order of the modelled time of a step, then of size.
4. The best points that share rows are also tried with every strategy and layout of the tokens,
   unless the configuration names one.
5. The best of all are compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kernels import dispatch
from kernels.primitives.time_shards import LAYOUTS
from lm import build as build_lib
from lm import layers as layer_lib
from lm import plan as plan_lib
from lm import targets
from lm.build import Build
from lm.config import Config, UserError
from lm.parallel import mesh as mesh_lib
from lm.parallel.rows import AUTO
from lm.plan import Launch, Plan, changes, memory, times, traffic
from lm.plan.changes import Values
from lm.plan.memory import Memory
from lm.plan.table import duration, rows, size
from lm.plan.times import Times
from lm.targets import Target

COMPILED = 3
MAX_TENSOR = 16
MIN_TOKENS = 2048  # the least tokens of a row that one of the devices sharing it holds
MARGIN = 0.9  # share of the usable memory that the formula may fill


class Point(NamedTuple):
    """`values` are the keys that differ from the configuration; `plan` is set if compiled."""

    values: Values
    memory: Memory
    times: Times | None
    fits: bool
    plan: Plan | None


def search(
    config: Config,
    target: Target,
    launch: Launch,
    report: Callable[[str], None],
    *,
    is_compiled: bool = True,
) -> tuple[Plan, list[Point]]:
    """The best plan that compiles and fits (or else the best), and all points, best first. Without
    `is_compiled` the best is chosen by formula.

    Args:
      report: is called with one line before each long piece of work.

    Raises:
      UserError: no mesh of these devices divides the sizes.
    """
    devices = targets.devices(target, is_compiled=is_compiled)
    report("searching by formula")
    points = sorted(by_formula(config, target, devices), key=_rank)
    shared = [point for point in points[:COMPILED] if point.values["mesh.sequence"] > 1]
    others = [x for point in shared for x in _of_strategies(config, point, target, devices)]
    points = sorted([*points, *others], key=_rank)
    if not points:
        raise UserError(
            f"no mesh of {len(devices)} devices divides the sizes of the run; change "
            f"data.batch_size={config.data.batch_size} or model.width={config.model.width}"
        )

    def planned(values: Values) -> Plan:
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        names = {flag.partition("=")[0] for flag in flags}
        given = [x for x in shlex.split(launch.flags) if x.partition("=")[0] not in names]
        flagged = launch._replace(flags=shlex.join([*given, *flags]))
        changed = changes.apply(config, values)
        return plan_lib.plan(changed, target, flagged, is_compiled=is_compiled, is_advised=False)

    if not is_compiled:
        return planned(points[0].values), points
    best: Plan | None = None
    for i, point in enumerate(points[:COMPILED]):
        report(f"compiling {i + 1} of {min(COMPILED, len(points))}: {_words(point.values)}")
        found = planned(point.values)
        if found.program and found.program.is_unsupported:
            report(f"refused: {found.program.refusal[:300]}")
        points[i] = point._replace(plan=found)
        if best is None or _order(found) < _order(best):
            best = found
    assert best is not None
    return best, points


def by_formula(config: Config, target: Target, devices: list[Any]) -> Iterator[Point]:
    """Every point whose sizes are divisible, in no particular order."""
    most = max(1, config.data.context_length // MIN_TOKENS)
    for values in _meshes(len(devices), most):
        yield from _of_values(config, values, target, devices)


def _of_values(config: Config, values: Values, target: Target, devices: list[Any]) -> list[Point]:
    try:
        built = build_lib.build(changes.apply(config, values), devices)
        return list(_of_mesh(built, values, target, devices))
    except UserError:  # sizes are not divisible
        return []


def _of_strategies(
    config: Config, point: Point, target: Target, devices: list[Any]
) -> Iterator[Point]:
    """The point with the other layout of the tokens; and with both layouts, the strategies that
    "auto" does not choose, for one label at a time. None if the configuration names a strategy.
    """
    if config.mesh.sequence_strategy != AUTO:
        return
    mesh = {key: value for key, value in point.values.items() if key.startswith("mesh.")}
    for layout in LAYOUTS:
        at = {**mesh, "mesh.sequence_layout": layout}
        if layout != config.mesh.sequence_layout:
            yield from _of_values(config, at, target, devices)
        for strategy in _strategies(config):
            yield from _of_values(
                config, {**at, "mesh.sequence_strategy": strategy}, target, devices
            )


def _strategies(config: Config) -> Iterator[str]:
    """The values of mesh.sequence_strategy for one label: the strategies of its main op."""
    for label, layer in layer_lib.check(config.model).items():
        op = layer.calls["main"][0].op
        yield from (f"{label}={one.name}" for one in dispatch.get(op).sequence)


def _of_mesh(built: Build, values: Values, target: Target, devices: list[Any]) -> Iterator[Point]:
    """Every remat on one mesh (`values`), with 1, 2, 4, ... microbatches and with the
    configuration's number, up to the first that fits: more would only take longer.
    """
    config = built.config
    rows = config.batches.of(0) // build_lib.batch_ways(built.mesh)
    doubled = {2**n for n in range(rows.bit_length())}
    for remat in dict.fromkeys([config.model.remat, "none", "dots", "full"]):
        for accumulation in sorted({config.run.accumulation} | doubled):
            changed: dict[str, Any] = {"model.remat": remat, "run.accumulation": accumulation}
            if remat != "named" and config.model.kept:
                changed["model.kept"] = {}
            here = _changed(built, changed)
            if here is None:
                continue
            measured = memory.measure(here.config, devices)
            needs = memory.estimate(here, measured)
            modelled = times.estimate(here, target, needs, measured, traffic.formula(here))
            budget = target.chip.usable_bytes
            fits = budget is None or needs.total <= MARGIN * budget
            yield Point({**values, **changed}, needs, modelled, fits, None)
            if fits:
                break


def _changed(built: Build, values: Values) -> Build | None:
    """The build with keys changed that change neither shapes nor shardings; None if rows are not
    divisible. Its compiled functions are still the old ones; they are not used here.
    """
    accumulation = values["run.accumulation"]
    ways = build_lib.batch_ways(built.mesh) * accumulation
    if built.config.batches.of(0) % ways:
        return None
    return dataclasses.replace(built, config=changes.apply(built.config, values))


def _meshes(devices: int, most: int) -> Iterator[dict[str, Any]]:
    """The meshes of `devices`, where at most `most` of them share a row."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    names = [f"mesh.{axis}" for axis in mesh_lib.AXES]
    for tensor, ranks, fsdp in itertools.product(divisors, divisors, divisors):
        data, rest = divmod(devices, tensor * ranks * fsdp)
        if rest or tensor > MAX_TENSOR or ranks > most:
            continue
        sizes = dict(zip(names, (data, fsdp, tensor, ranks), strict=True))
        parallel = {"mesh.stream_over_tensor": tensor > 1}
        for zero1 in (False, True) if data > 1 else (False,):
            yield {**sizes, **parallel, "mesh.zero1": zero1}


def _rank(point: Point) -> tuple[bool, float]:
    if not point.fits or point.times is None:
        return not point.fits, point.memory.total
    return False, point.times.step


def _order(found: Plan) -> tuple[bool, float]:
    if found.fits is False or found.times is None:
        return found.fits is False, found.total
    return False, found.times.step


def table(points: list[Point], limit: int = 12) -> str:
    """A table of the best points; times are modelled, not measured."""
    lines = [("", "by formula", "fits", "step, modelled", "compiled", "fits", "step, modelled")]
    for point in points[:limit]:
        found = point.plan
        lines.append(
            (
                _words(point.values),
                size(point.memory.total),
                "yes" if point.fits else "no",
                duration(point.times.step) if point.times else "-",
                _compiled(found) if found else "",
                {True: "yes", False: "no", None: "-"}[found.fits] if found else "",
                duration(found.times.step) if found and found.times else "",
            )
        )
    return rows(lines)


def _compiled(found: Plan) -> str:
    is_unsupported = found.program is not None and found.program.is_unsupported
    return "refused" if is_unsupported else size(found.total)


def _words(values: Values) -> str:
    """Keys as words. What is off or 1 is left out; a strategy is just "label=name"."""
    shown = {key.split(".")[1]: value for key, value in values.items()}
    return " ".join(
        name if value is True else value if name == "sequence_strategy" else f"{name}={value}"
        for name, value in shown.items()
        if value is True or value not in (False, 1, {})
    )


def to_json(points: list[Point], limit: int = 24) -> list[dict[str, Any]]:
    """The best points, as plain values."""
    return [
        {
            "values": dict(point.values),
            "bytes": point.memory.total,
            "fits": point.fits,
            "step_seconds": point.times.step if point.times else None,
            "compiled_bytes": point.plan.program.total
            if point.plan and point.plan.program
            else None,
            "compiled_fits": point.plan.fits if point.plan else None,
        }
        for point in points[:limit]
    ]
