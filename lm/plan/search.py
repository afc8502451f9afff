"""Which mesh, remat and accumulation: every one by formula, the best three by the compiler.

Order of steps: every way to write the devices as data x fsdp x tensor x sequence (with and without
ZeRO-1; of rows too short to share, sequence is 1) is built, which refuses sizes that do not divide;
each gets every remat and more and more accumulation, until it fits; those that fit come first,
ordered by the modelled time of a step, then the smallest. The best that share rows get every
strategy and layout of the tokens besides, unless the configuration names one; the best of all are
compiled.
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
MIN_TOKENS = 2048  # of a row that a device has where devices share it
MARGIN = 0.9  # share of the usable memory that the formula may fill


class Point(NamedTuple):
    """`values` are the keys that differ; `plan` where it was compiled."""

    values: Values
    memory: Memory
    times: Times | None
    fits: bool
    plan: Plan | None


def search(
    config: Config,
    target: Target,
    launch: Launch,
    told: Callable[[str], None],
    *,
    is_compiled: bool = True,
) -> tuple[Plan, list[Point]]:
    """The best plan that compiles and fits (else the best), and all points, best first; without
    `is_compiled` the best by formula.

    Args:
      told: hears a line before each long piece of work.

    Raises:
      UserError: no mesh of these devices divides the sizes.
    """
    devices = targets.devices(target, is_compiled=is_compiled)
    told("searching by formula")
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
        told(f"compiling {i + 1} of {min(COMPILED, len(points))}: {_words(point.values)}")
        found = planned(point.values)
        if found.program and found.program.is_unsupported:
            told(f"refused: {found.program.refusal[:300]}")
        points[i] = point._replace(plan=found)
        if best is None or _order(found) < _order(best):
            best = found
    assert best is not None
    return best, points


def by_formula(config: Config, target: Target, devices: list[Any]) -> Iterator[Point]:
    """Every point whose sizes divide, in no order."""
    most = max(1, config.data.context_length // MIN_TOKENS)
    for values in _meshes(len(devices), most):
        yield from _of_values(config, values, target, devices)


def _of_values(config: Config, values: Values, target: Target, devices: list[Any]) -> list[Point]:
    try:
        built = build_lib.build(changes.apply(config, values), devices)
        return list(_of_mesh(built, values, target, devices))
    except UserError:  # sizes that do not divide
        return []


def _of_strategies(
    config: Config, point: Point, target: Target, devices: list[Any]
) -> Iterator[Point]:
    """The other layout of the tokens of rows, and with both the strategies that "auto" does not
    take, of one label at a time; none where the configuration names a strategy.
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
    """What mesh.sequence_strategy may say of one label: those of the main op."""
    for label, layer in layer_lib.check(config.model).items():
        op = layer.calls["main"][0].op
        yield from (f"{label}={one.name}" for one in dispatch.get(op).sequence)


def _of_mesh(built: Build, values: Values, target: Target, devices: list[Any]) -> Iterator[Point]:
    """Every remat of one mesh, which `values` say, with one microbatch, two, four, ... and as many
    as the configuration has, up to the first that fits: more only take longer.
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
    """The build with keys that change neither shapes nor shardings; None where rows do not divide.
    Its compiled functions are the old ones and not used here.
    """
    accumulation = values["run.accumulation"]
    ways = build_lib.batch_ways(built.mesh) * accumulation
    if built.config.batches.of(0) % ways:
        return None
    return dataclasses.replace(built, config=changes.apply(built.config, values))


def _meshes(devices: int, most: int) -> Iterator[dict[str, Any]]:
    """At most so many devices share a row."""
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
    """The best points; times are modelled, not measured."""
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
    """Keys as words: what is off or 1 is left out. Of strategies "label=name" is enough."""
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
