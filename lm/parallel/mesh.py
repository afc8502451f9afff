"""The device mesh: four axes, data, fsdp, tensor, sequence, always AxisType.Auto and always given
explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from kernels.primitives import device
from lm.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor", "sequence")
SWITCHES = {"zero1": "data", "stream_over_tensor": "tensor"}  # and the axis each is about
BATCH_AXES = ("data", "fsdp")  # the axes over which the batch is split


def create(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """Devices in their given order along `AXES`; the one axis of size -1 takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or an axis no op supports yet.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        wanted = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
        rest = fixed // config.data if config.data > 0 else 0
        fits = rest > 0 and len(devices) % rest == 0
        advice = "mesh.data=-1" if fits else f"sizes that multiply to {len(devices)}"
        raise UserError(f"mesh {given} needs {wanted} devices, found {len(devices)}; set {advice}")
    if sizes[AXES.index("sequence")] > 1:
        raise UserError(
            f"mesh.sequence={sizes[3]}: no model is trained with a split time axis yet; "
            "set mesh.sequence=1"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def target(mesh: Mesh) -> str:
    """Platform the mesh's devices belong to: cpu, gpu or tpu (they may be absent ones, from a
    topology).
    """
    return device.platform(mesh.devices.flat[0])


def words(sizes: Mapping[str, int], switches: Mapping[str, Any]) -> list[str]:
    """What of a mesh takes effect: axes of more than one device, and the switches of such axes.

    >>> words({"data": 2, "tensor": 1}, {"zero1": True, "stream_over_tensor": True})
    ['data 2', 'zero1']
    """
    split = [axis for axis, size in sizes.items() if size > 1]
    named = [key for key, axis in SWITCHES.items() if switches[key] and axis in split]
    return [f"{axis} {sizes[axis]}" for axis in split] + named
