"""Turns a batch on the host into global arrays, and says which of its rows a process loads.

    mesh -> share: the parts of a batch that this process's devices hold -> the loader, the scorer
    rows of the share [b, T] -> put: columns in the layout of time -> global arrays [B, T]

Every batch that is trained on or scored goes through `put`. If the devices of several processes
share the tokens of rows, each of these processes loads the whole rows, and puts only its own
columns on its devices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kernels.contract import Layout
from kernels.primitives.time_shards import Shards
from lm.config import MeshConfig, UserError
from lm.data.batch import Batch, Share
from lm.parallel import sharding, watch
from lm.parallel.mesh import BATCH_AXES
from lm.parallel.sharding import AnyMesh

type Place = tuple[slice, ...]  # where a device's piece lies in an array


@functools.cache
def share(mesh: Mesh) -> Share:
    """The part of every batch that this process loads."""
    holders = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return share_of(holders, math.prod(mesh.shape[x] for x in BATCH_AXES), watch.index())


def share_of(holders: np.ndarray, num_parts: int, process: int) -> Share:
    """The part that `process` loads. `holders` has the process of every device of a mesh, whose
    first axes are those of the batch.
    """
    held = np.any(holders.reshape(num_parts, -1) == process, axis=1)
    return Share(tuple(np.flatnonzero(held).tolist()), num_parts)


def put(batch: Batch, mesh: Mesh, layout: Layout) -> Batch:
    """Global arrays [B, T] from the rows of this process's share, numpy arrays [b, T]."""
    placed, held, time = sharding.batch(mesh), share(mesh), shards(mesh, layout)

    def place(x: np.ndarray) -> jax.Array:
        shape = len(x) * held.num_parts // len(held.parts), x.shape[1]
        own: Any = functools.partial(piece, x, held)
        return jax.make_array_from_callback(shape, placed, own)

    return Batch(*(place(time.by_rank(np.asarray(x), 1)) for x in batch))


def piece(x: np.ndarray, held: Share, place: Place) -> np.ndarray:
    """The piece at `place` of the whole array [B, T]: rows of one part, and some columns. x [b, T]
    holds the rows of the share.
    """
    size = len(x) // len(held.parts)
    start, stop, _ = place[0].indices(size * held.num_parts)
    first = held.parts.index(start // size) * size
    return x[first : first + stop - start, place[1]]


def columns(time: int, mesh: Mesh, layout: Layout) -> np.ndarray:
    """For every column of a global array, the place in time of its token, int32 [T]. In a
    contiguous layout this is 0, 1, ..., T - 1.
    """
    return shards(mesh, layout).by_rank(np.arange(time, dtype=np.int32), 0)


def row_length(tokens: int, mesh: Mesh, layout: Layout) -> int:
    """The length to which rows of this many tokens are padded if it is not the training length: a
    power of two, rounded up so that mesh.sequence and its layout divide it.
    """
    split, power = shards(mesh, layout), 1 << (tokens - 1).bit_length()
    pieces = split.count * split.stretches
    return -(-power // pieces) * pieces


def check_time(time: int, config: MeshConfig, mesh: AnyMesh) -> None:
    """Checks that the mesh divides rows of `time` tokens.

    Raises:
      UserError: it does not.
    """
    split, tensor = shards(mesh, config.sequence_layout), mesh.shape["tensor"]
    pieces = split.count * split.stretches
    if time % pieces:
        raise UserError(
            f"data.context_length={time} does not divide into {pieces} pieces (mesh.sequence="
            f"{split.count}, mesh.sequence_layout={split.layout!r}); set "
            f"data.context_length={math.ceil(time / pieces) * pieces}, or another mesh.sequence"
        )
    if config.stream_over_tensor and time % (tensor * split.count):
        fitting = math.lcm(tensor * split.count, pieces)
        each = f", each of mesh.sequence={split.count} parts of it," if split.count > 1 else ""
        raise UserError(
            f"mesh.stream_over_tensor splits data.context_length={time}{each} over mesh.tensor="
            f"{tensor}; set data.context_length={math.ceil(time / fitting) * fitting}, or "
            "mesh.stream_over_tensor=False"
        )


def shards(mesh: AnyMesh, layout: Layout) -> Shards:
    """How the time of a batch is split; one shard if it is not."""
    return Shards(("sequence",), mesh.shape["sequence"], layout)
