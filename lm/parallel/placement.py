"""A batch of the host as global arrays, and which of its rows a process loads.

    mesh -> share: the parts of a batch that this process's devices hold -> the loader, the scorer
    rows of the share [b, T] -> put: columns in the layout of time -> global arrays [B, T]

All that is trained on or scored goes through `put`. Processes whose devices share the tokens of
rows load these rows alike, and each puts its columns of them on its devices.
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

type Place = tuple[slice, ...]  # of a device's piece in an array


@functools.cache
def share(mesh: Mesh) -> Share:
    """What this process loads of every batch."""
    holders = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return share_of(holders, math.prod(mesh.shape[x] for x in BATCH_AXES), watch.index())


def share_of(holders: np.ndarray, num_parts: int, process: int) -> Share:
    """`holders`: the process of every device of a mesh, whose first axes are those of the batch."""
    held = np.any(holders.reshape(num_parts, -1) == process, axis=1)
    return Share(tuple(np.flatnonzero(held).tolist()), num_parts)


def put(batch: Batch, mesh: Mesh, layout: Layout) -> Batch:
    """The rows of this process's share, numpy arrays [b, T], as global arrays [B, T]."""
    placed, held, time = sharding.batch(mesh), share(mesh), shards(mesh, layout)

    def place(x: np.ndarray) -> jax.Array:
        shape = len(x) * held.num_parts // len(held.parts), x.shape[1]
        own: Any = functools.partial(piece, x, held)
        return jax.make_array_from_callback(shape, placed, own)

    return Batch(*(place(time.by_rank(np.asarray(x), 1)) for x in batch))


def piece(x: np.ndarray, held: Share, place: Place) -> np.ndarray:
    """What stands at `place` of the whole array [B, T], rows of one part and some columns; x [b, T]
    are the rows of the share.
    """
    size = len(x) // len(held.parts)
    start, stop, _ = place[0].indices(size * held.num_parts)
    first = held.parts.index(start // size) * size
    return x[first : first + stop - start, place[1]]


def columns(time: int, mesh: Mesh, layout: Layout) -> np.ndarray:
    """The place in its row of every token of a global array, int32 [T]: the order of time where
    the layout is contiguous.
    """
    return shards(mesh, layout).by_rank(np.arange(time, dtype=np.int32), 0)


def row_length(tokens: int, mesh: Mesh, layout: Layout) -> int:
    """What rows of so many tokens, which are not of the training length, are padded to: a power of
    two, rounded up to what the layout of time over mesh.sequence divides.
    """
    split, power = shards(mesh, layout), 1 << (tokens - 1).bit_length()
    pieces = split.count * split.stretches
    return -(-power // pieces) * pieces


def check_time(time: int, config: MeshConfig, mesh: AnyMesh) -> None:
    """Refuses rows of `time` tokens that the mesh does not divide.

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
    """How the time of a batch is split; one shard where it is whole."""
    return Shards(("sequence",), mesh.shape["sequence"], layout)
