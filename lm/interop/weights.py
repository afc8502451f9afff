"""Saves weights alone as a run folder: one checkpoint, of step 0, without an optimizer's state.

It can be loaded, evaluated, exported and named by `init_from`, but not resumed. Arrays keep their
type and are read back as float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm.config import Config, UserError
from lm.run import checkpoint, formats, items
from lm.run.digest import digest
from lm.run.failures import RaisedAs, quiet
from lm.run.items import Meta
from lm.run.progress import WeightsBar
from lm.state import TrainState, count

CHUNK = 1 << 26  # bytes


def save(workdir: Path, config: Config, params: Any) -> None:
    """Writes the checkpoint of a new run folder, using little memory besides `params`.

    Raises:
      UserError: it cannot be written, for example because the disk is full.
    """
    none = jnp.asarray(count(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, (), none, none)
    meta = Meta(0, 0, None, digest(state), checkpoint.shapes(params))
    # Chunk files instead of Orbax's database, which would hold everything once more until the end.
    # The limit is on arrays being written, and must exceed the largest one.
    room = max(x.nbytes for x in jax.tree.leaves(params)) // 10**9 + 2
    arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=room)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), state)
    written = items.plain(meta, {"next_step": 0, "identity": {}}, formats.write(config))
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunks),
        **{name: ocp.args.JsonSave(value) for name, value in written.items()},
    )
    plain = ocp.JsonCheckpointHandler
    handler = ocp.CompositeCheckpointHandler(
        state=arrays, loader=plain(), config=plain(), meta=plain()
    )
    path = (workdir / checkpoint.FOLDER / "0").absolute()
    message = lambda reason: UserError(f"cannot save {path}: {reason}; mend that and try again")
    bar = WeightsBar("saving", None)
    with bar, quiet(), RaisedAs(message), ocp.Checkpointer(handler) as saver:
        saver.save(path, args)
