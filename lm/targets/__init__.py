"""Machines a run can be planned for, by their vendors' names, whether they are here or not.

    v5e-16, v6e-256         TPUs named by chips; v5litepod-16 is the same as v5e-16
    v4-128, v5p-256         TPUs named by TensorCores, two to a chip: v5p-256 has 128 chips
    tpu7x-16                named by TensorCores; each of the two on a chip is a JAX device
    h100-64                 NVIDIA GPUs, eight to a host
    cpu-8                   devices that JAX makes of this machine's processor

`parse` reads a name, `start` readies this process (before JAX starts a backend), `devices` gives
what lm/build.py builds for. TPUs and GPUs come from their compilers (extra `aot`) and need not be
attached: they compile and do not run. If nothing is compiled, stand-ins suffice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from kernels.spelling import near
from lm import extras
from lm.config import UserError
from lm.targets.chips import CHIPS, MEM_FRACTION, Chip

__all__ = ["MEM_FRACTION", "Chip", "StandIn", "Target", "devices", "names", "parse", "start"]

# Chips -> shape of the slice. v5e and v6e: a 2D torus; the others: a 3D one ("TPU configurations"
# of the Cloud TPU documentation).
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_SQUARES |= {256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_CUBES |= {256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}
_SLICES = {"v5e": _SQUARES, "v6e": _SQUARES, "v4": _CUBES, "tpu7x": _CUBES}
_SLICES |= {"v5p": _CUBES | {4096: "16x16x16"}}
_CORES_IN_NAME = ("v4", "v5p", "tpu7x")  # the number counts TensorCores, two to a chip
_ALIASES = {"v5litepod": "v5e"}
_GPUS_PER_HOST = 8

# Ask no metadata server, and let several processes compile at once (libtpu locks a file otherwise).
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A machine. `devices` counts JAX's devices. `topology` has the chips along each axis; for GPUs
    it is hosts x GPUs of a host.
    """

    name: str
    chip: Chip
    chips: int
    devices: int
    hosts: int
    topology: str

    @property
    def devices_per_host(self) -> int:
        return self.devices // self.hosts


class Memory(str):
    """The kind of a memory: the device's own, or one of its host that the device reaches. JAX reads
    the attribute `kind` of some memories, and compares others with a string, so this is both.
    """

    __slots__ = ()

    @property
    def kind(self) -> str:
        """The name that a sharding uses."""
        return str(self)


class Client:
    """The part of a runtime that JAX asks for. This process has the first of the stand-ins."""

    def process_index(self) -> int:
        """The number of this process."""
        return 0


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device with what a build, the formulas of a plan and JAX's shardings ask for. No compiler
    accepts it.
    """

    id: int
    platform: str
    device_kind: str
    process_index: int
    client: Client

    def default_memory(self) -> Memory:
        """The memory of an array whose sharding does not name one."""
        return self.addressable_memories()[0]

    def addressable_memories(self) -> list[Memory]:
        """The memories that `optimizer.memory` may name: the device's own, and its host's."""
        return [Memory("device"), Memory("pinned_host")]


def names() -> list[str]:
    """Every TPU slice, and the first few of the open series h100-N and cpu-N."""
    tpus = [
        f"{family}-{chips * (2 if family in _CORES_IN_NAME else 1)}"
        for family, shapes in sorted(_SLICES.items())
        for chips in shapes
    ]
    return [*tpus, *(f"h100-{n}" for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)), "cpu-1", "cpu-8"]


def parse(name: str) -> Target:
    """The target with this name.

    Raises:
      UserError: there is no such machine.
    """
    found = re.fullmatch(r"(\w+)-([1-9]\d*)", name)
    family = _ALIASES.get(found[1], found[1]) if found else name
    number = int(found[2]) if found else 0
    target = _create(family, number) if family in CHIPS else None
    if target is None:
        raise UserError(
            f"--target={name}: no such machine; {_hint(family, number)} "
            "(v4, v5p, tpu7x count TensorCores, v5e and v6e chips; "
            f"h100-N: 1, 2, 4 or a multiple of {_GPUS_PER_HOST}; cpu-N: any)"
        )
    return target


def _hint(family: str, number: int) -> str:
    """The nearest size of a known family, or else the families."""
    sizes = [int(name.split("-")[1]) for name in names() if name.startswith(f"{family}-")]
    if number and sizes:
        return f"did you mean {f'{family}-{min(sizes, key=lambda n: abs(n - number))}'!r}?"
    if close := near(family, CHIPS):
        return f"did you mean {f'{close}-N'!r}?"
    return f"known: {', '.join(f'{known}-N' for known in sorted(CHIPS))}"


def _create(family: str, number: int) -> Target | None:
    chip = CHIPS[family]
    if family == "cpu":
        return _target(f"cpu-{number}", chip, number, 1, str(number))
    if family == "h100":
        hosts, rest = divmod(number, _GPUS_PER_HOST)
        if rest and (hosts or rest not in (1, 2, 4)):
            return None
        hosts = max(1, hosts)
        return _target(f"h100-{number}", chip, number, hosts, f"{hosts}x{number // hosts}")
    cores = 2 if family in _CORES_IN_NAME else 1
    chips, rest = divmod(number, cores)
    shape = _SLICES[family].get(chips)
    if rest or shape is None:
        return None
    single = family in ("v5e", "v6e") and chips <= 8  # one host may hold eight of these
    hosts = 1 if single else chips // 4
    return _target(f"{family}-{number}", chip, chips, hosts, shape)


def _target(name: str, chip: Chip, chips: int, hosts: int, topology: str) -> Target:
    count = chips * chip.devices_per_chip
    return Target(name=name, chip=chip, chips=chips, devices=count, hosts=hosts, topology=topology)


def start(target: Target) -> None:
    """Makes JAX use the CPU, with N devices for a target cpu-N. Call it before anything starts a
    backend, so that JAX does not look for an accelerator.
    """
    jax.config.update("jax_platforms", "cpu")
    if target.chip.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.devices)


def devices(target: Target, *, is_compiled: bool = True) -> list[Any]:
    """The target's devices in order. Without `is_compiled` they are stand-ins, and nothing is
    raised.

    Raises:
      UserError: its compiler is not installed, or JAX has started with fewer CPU devices.
    """
    if not is_compiled:
        chip, per_host = target.chip, target.devices_per_host
        client = Client()
        return [
            StandIn(n, chip.platform, chip.device_kind, n // per_host, client)
            for n in range(target.devices)
        ]
    if target.chip.platform == "tpu":
        return _tpu(target)
    if target.chip.platform == "gpu":
        return _gpu(target)
    found = jax.devices("cpu")
    if len(found) < target.devices:
        raise UserError(
            f"--target={target.name} needs {target.devices} CPU devices, JAX has started with "
            f"{len(found)}; set JAX_NUM_CPU_DEVICES={target.devices}"
        )
    return found[: target.devices]


def _tpu(target: Target) -> list[Any]:
    _need("libtpu", target, "the TPU compiler")
    for key, value in _LIBTPU.items():
        os.environ.setdefault(key, value)
    _skip_cache()
    options: dict[str, Any] = {}
    if target.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device of a chip's two cores
    if target.hosts == 1 and target.chips != 4:
        sides = [int(side) for side in target.topology.split("x")]
        options["chips_per_host_bounds"] = (*sides, 1)
    name = f"{target.chip.name}:{target.topology}"
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    assert len(topology.devices) == target.devices, (target, len(topology.devices))
    return list(topology.devices)


def _gpu(target: Target) -> list[Any]:
    _need("jax_plugins.xla_cuda13", target, "the CUDA compiler of JAX")
    _skip_cache()
    config = (Path(__file__).parent / "h100.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=config,
        topology=f"1x{target.topology}",  # slices x hosts x GPUs of a host
    )
    assert len(topology.devices) == target.devices, (target, len(topology.devices))
    return list(topology.devices)


def _skip_cache() -> None:
    """JAX's cache on disk writes programs for absent devices, warns, and cannot read them back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decided to use it at the first compilation


def _need(module: str, target: Target, what: str) -> None:
    try:
        is_here = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        is_here = False
    if not is_here:
        raise UserError(
            f"--target={target.name} needs {what}, {module} is not installed; "
            f"install it by `{extras.command('aot')}`; espalier plan --nocompile does without"
        )
