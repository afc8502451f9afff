"""What a run would be on a machine, before the machine is there: size, memory, communication, time,
launch.

    plan(config, target, launch) -> Plan      compiles the real step (lm/build.py) for the target

Formulas (memory.py, traffic.py, times.py) are shown beside the compiler's own numbers (program.py);
where the two are far apart, the compiler is right. Times are modelled, never measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import jax

from kernels import dispatch
from lm import build as build_lib
from lm import mup, optimizers, targets
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, to_mapping
from lm.parallel import mesh as mesh_lib
from lm.plan import changes, memory, program, time_axis, times, traffic
from lm.plan.changes import Values
from lm.plan.memory import Memory
from lm.plan.program import Program
from lm.plan.time_axis import Split
from lm.plan.times import Times
from lm.plan.traffic import Flow
from lm.targets import Target

KERNELS = {"tpu": "pallas_tpu", "gpu": "triton_gpu"}  # the form written for a platform
SPARE = 0.9  # share of the usable memory that a remedy may fill
ATTEMPTS = 3  # remedies that are compiled
SHARED = PurePosixPath("/shared")  # represents the folder that all workers of a pod mount
# Checkpoints: bytes/s that a host writes (assumed), and hours between failures of one host: there
# were 419 unexpected interruptions in 54 days on 16,384 GPUs of 2,048 hosts (Llama 3, arXiv
# 2407.21783, table 5).
WRITE_RATE = 1e9
HOST_HOURS = 54 * 24 * 2048 / 419


class FormRecord(NamedTuple):
    """The layers of one label that use an op's form. `substituted` says why the form is not the
    platform's own kernel; "" where it is.
    """

    label: str
    layers: int
    op: str
    form: str
    reason: str
    substituted: str


class Rate(NamedTuple):
    """The learning rates of all roles at one point of the run."""

    at: str
    tokens: float
    rates: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints: bytes of one, and how often to write one. The interval is sqrt(2 save M), with M
    the time between failures of any host (Young 1974); steps are None without a step time.
    """

    bytes: int
    seconds: float
    interval_seconds: float
    interval_steps: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`fits` is None for a target whose memory is not known (a CPU), and False for a step that its
    compiler refuses, whatever the reason. Where the run does not fit, `remedy` holds keys to
    change, and `mended` the step compiled with them; None where the formula finds no change that is
    enough, or nothing is compiled.
    """

    config: Config
    target: Target
    mesh: Mapping[str, int]
    parameters: Mapping[str, Mapping[str, int]]
    tokens_per_step: int
    flops_per_step: float
    memory: Memory
    program: Program | None
    fits: bool | None
    flows: tuple[Flow, ...]
    splits: tuple[Split, ...]
    times: Times | None
    schedule: tuple[Rate, ...]
    saving: Saving
    forms: tuple[FormRecord, ...]
    launch: str
    remedy: Values
    mended: Program | None

    @property
    def total(self) -> int:
        """Bytes on one device: the compiler's number if there is one, else the formula's."""
        return _total(self.memory, self.program)


class Launch(NamedTuple):
    """The flags of the run as written, "--config=x.py --config.a.b=1", and its workdir."""

    flags: str
    workdir: str


def plan(
    config: Config,
    target: Target,
    launch: Launch,
    *,
    is_compiled: bool = True,
    is_advised: bool = True,
) -> Plan:
    """The plan of a run; without `is_compiled` from formulas alone.

    Raises:
      UserError: a mesh that does not fit the target's devices, sizes that do not divide, a compiler
      that is not installed.
    """
    devices = targets.devices(target, is_compiled=is_compiled)
    built = build_lib.build(config, devices)
    measured = memory.measure(config, devices)
    needs = memory.estimate(built, measured)
    compiled = program.create(built) if is_compiled else None
    flows = traffic.formula(built)
    known = list(compiled.flows) if compiled and not compiled.refusal else flows
    modelled = times.estimate(built, target, needs, measured, known)
    fits = _fits(target, needs, compiled)
    remedy, mended = ({}, None)
    if fits is False and is_advised and not (compiled and compiled.is_unsupported):
        remedy, mended = _mend(config, target, devices, needs, compiled)
    return Plan(
        config=config,
        target=target,
        mesh=dict(built.mesh.shape),
        parameters=parameters(built),
        tokens_per_step=config.tokens_per_step,
        flops_per_step=build_lib.flops_per_token(built) * config.tokens_per_step,
        memory=needs,
        program=compiled,
        fits=fits,
        flows=tuple(flows),
        splits=time_axis.splits(built),
        times=modelled,
        schedule=schedule(built),
        saving=saving(built, target, modelled),
        forms=forms(built),
        launch=launch_line(target, launch, remedy),
        remedy=remedy,
        mended=mended,
    )


def _fits(target: Target, needs: Memory, compiled: Program | None) -> bool | None:
    if compiled and compiled.refusal:
        return False
    budget = target.chip.usable_bytes
    return None if budget is None else _total(needs, compiled) <= budget


def _total(needs: Memory, compiled: Program | None) -> int:
    """The compiler's number if there is one, else the formula's."""
    return needs.total if compiled is None or compiled.total is None else compiled.total


def _mend(
    config: Config, target: Target, devices: list[Any], needs: Memory, compiled: Program | None
) -> tuple[Values, Program | None]:
    """Changes after which the run needs at most nine tenths of the memory, by the formula scaled to
    what the compiler said about the run. They are compiled too; while that does not fit, more
    changes are made.
    """
    budget = target.chip.usable_bytes
    if budget is None:
        return {}, None
    share = SPARE * budget / _total(needs, compiled)
    for _ in range(ATTEMPTS):
        remedy, suffices = changes.remedy(config, devices, needs.total * (1 - share))
        if compiled is None or not suffices:
            return remedy, None
        changed = build_lib.build(changes.apply(config, remedy), devices)
        mended = program.create(changed)
        if not mended.refusal and (mended.total or 0) <= budget:
            return remedy, mended
        share *= min(SPARE, SPARE * budget / (mended.total or budget))
    return remedy, mended


def parameters(built: Build) -> dict[str, dict[str, int]]:
    """Parameters by role and by part of the model, each with a "total"."""
    infos = jax.tree.leaves(built.infos, is_leaf=params_lib.is_info)
    names = jax.tree.leaves(params_lib.names(built.infos))
    parts: dict[str, int] = {}
    for name, info in zip(names, infos, strict=True):
        found = re.search(r"(?:^|/)(embed|output|mixer|mlp)(?:/|$)", name)
        part = {"embed": "embedding", "output": "head"}.get(found[1], found[1]) if found else "norm"
        parts[part] = parts.get(part, 0) + math.prod(info.shape)
    return {
        "by role": params_lib.count(built.infos),
        "by part": {**parts, "total": sum(parts.values())},
    }


def schedule(built: Build) -> tuple[Rate, ...]:
    """Learning rates at the corners of the schedule."""
    phases, end = built.schedule.phases, float(built.run_tokens)
    points = [
        ("start", 0.0),
        ("after warm-up", phases.warmup_end),
        ("before decay", phases.decay_start),
        ("end", end),
    ]
    multipliers = mup.create(built.config)
    rows = []
    for at, tokens in points:
        rates = optimizers.learning_rates(built.schedule(tokens), multipliers, built.infos)
        rows.append(Rate(at, tokens, {role: float(rate) for role, rate in rates.items()}))
    return tuple(rows)


def saving(built: Build, target: Target, modelled: Times | None) -> Saving:
    size = memory.whole_bytes(built.abstract_state)
    seconds = size / (WRITE_RATE * target.hosts)
    interval = math.sqrt(2 * seconds * HOST_HOURS * 3600 / target.hosts)
    steps = None
    if modelled is not None:
        steps = min(built.config.run_steps, max(1, round(interval / modelled.step)))
    return Saving(bytes=size, seconds=seconds, interval_seconds=interval, interval_steps=steps)


def forms(built: Build) -> tuple[FormRecord, ...]:
    """The forms by label, in the order of the layers."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for record in built.layers:
        key = record.label, record.op, record.form, record.reason
        counts[key] = counts.get(key, 0) + 1
    wanted = KERNELS.get(mesh_lib.target(built.mesh))
    found = []
    for (label, op, form, reason), count in counts.items():
        missing = ""
        if wanted and form == "chunked":
            has = wanted in dispatch.get(op).forms
            missing = f"{wanted} was not taken" if has else f"{op} has no {wanted} yet"
        found.append(FormRecord(label, count, op, form, reason, missing))
    return tuple(found)


def launch_line(target: Target, launch: Launch, remedy: Values) -> str:
    """The command that starts the run on the target, with the remedy's keys. The workers of a TPU
    pod share no checkout, so the command names folders that all of them mount.
    """
    extra = [f"--config.{key}={value}" for key, value in remedy.items()]
    is_pod = target.chip.platform == "tpu"
    workdir = PurePosixPath(launch.workdir)
    if is_pod and not workdir.is_absolute():
        workdir = SHARED / "runs" / workdir.name
    extra.append(shlex.quote(f"--workdir={workdir}"))
    if is_pod:
        extra.append(f"--data_dir={SHARED / 'data'}")
    flags = " ".join([launch.flags, *extra])
    if is_pod:
        line = f"launch/tpu_pod.sh --name=POD --zone=ZONE --restart -- {flags}"
        return line.replace("POD", target.name.replace("-", ""), 1)
    if target.chip.platform == "cpu":
        return f"JAX_NUM_CPU_DEVICES={target.devices} espalier train {flags}"
    fraction = f"XLA_PYTHON_CLIENT_MEM_FRACTION={targets.MEM_FRACTION}"
    if target.hosts == 1:
        return f"{fraction} espalier train {flags}"
    tasks = f"--nodes={target.hosts} --ntasks-per-node={target.devices_per_host}"
    gpus = f"--gpus-per-node={target.devices_per_host} --time=24:00:00"
    return f"{fraction} sbatch {tasks} {gpus} launch/slurm.sh {flags}"


def to_json(found: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds are not rounded."""
    plain = _plain({f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
    plain["config"] = to_mapping(found.config)
    plain["memory"] |= {"state": found.memory.state, "total": found.memory.total}
    return plain | {"total": found.total}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value
