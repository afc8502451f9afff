"""The device mesh: four axes, data, fsdp, tensor, sequence, always AxisType.Auto and always given
explicitly.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from kernels.primitives import device
from lm.config import MeshConfig, UserError
from lm.parallel import watch

AXES = ("data", "fsdp", "tensor", "sequence")
SWITCHES = {"zero1": "data", "stream_over_tensor": "tensor"}  # switch -> the axis it concerns
BATCH_AXES = ("data", "fsdp")  # the axes over which the batch is split


def create(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """Devices in their given order along `AXES`; the one axis of size -1 takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or an axis no op supports yet.
    """
    sizes = _sizes(config, len(devices), on_cpu=device.platform(devices[0]) == "cpu")
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def before(config: MeshConfig, count: int | None) -> AbstractMesh:
    """The mesh of `count` devices before JAX has initialized them. If their number is not known
    (None), an axis of size -1 has size 1.

    Raises:
      UserError: as `create`.
    """
    fixed = [max(1, getattr(config, axis)) for axis in AXES]
    sizes = _sizes(config, math.prod(fixed) if count is None else count, on_cpu=True)
    return AbstractMesh(tuple(sizes), AXES)


def foreseen() -> tuple[int | None, tuple[str, ...]]:
    """The number of devices that JAX will find, or None if it cannot be known before they are
    initialized; and the targets that they may be. It is known if JAX_PLATFORMS names only the CPU.
    """
    if jax.config.jax_platforms != "cpu":
        return None, ("cpu", "gpu", "tpu")
    count = jax.config.jax_num_cpu_devices
    if count < 1:
        flag = r"--xla_force_host_platform_device_count=(\d+)"
        named = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
        count = int(named[-1]) if named else 1
    return count * watch.count(), ("cpu",)


def _sizes(config: MeshConfig, count: int, *, on_cpu: bool) -> list[int]:
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        wanted = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
        rest = fixed // config.data if -1 not in sizes else 0
        fits = rest > 0 and count % rest == 0
        advice = "mesh.data=-1" if fits else f"sizes that multiply to {count}"
        if on_cpu and fixed > count:  # JAX makes any number of devices of a CPU
            advice += f", or the variable JAX_NUM_CPU_DEVICES to {fixed}"
        raise UserError(f"mesh {given} needs {wanted} devices, found {count}; set {advice}")
    return sizes


def target(mesh: Mesh) -> str:
    """The platform of the mesh's devices: cpu, gpu or tpu. The devices may be absent ones, from a
    topology.
    """
    return device.platform(mesh.devices.flat[0])


def words(sizes: Mapping[str, int], switches: Mapping[str, Any]) -> list[str]:
    """The parts of a mesh that take effect: axes of more than one device, and their switches.

    >>> words({"data": 2, "tensor": 1}, {"zero1": True, "stream_over_tensor": True})
    ['data 2', 'zero1']
    """
    split = [axis for axis, size in sizes.items() if size > 1]
    named = [key for key, axis in SWITCHES.items() if switches[key] and axis in split]
    return [f"{axis} {sizes[axis]}" for axis in split] + named
