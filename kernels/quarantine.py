"""NaN and infinities in the inputs of one packed document stay in that document.

The forms mask tokens of other documents with zero weights, and zero times NaN is NaN. So, where a
row is packed, the op runs on inputs in which NaN and infinities are replaced by zeros. Then NaN is
written where the bad tokens (those with such a value) would have had an effect:

    out(t) = NaN      from the first bad token of a document to the document's end; in the whole
                      document where the op is not causal
    state  = NaN      where the last document of a row has a bad token, so that no call can
                      continue it unnoticed

Finite numbers that overflow inside an op are not detected: they may spoil the whole row. Heads are
handled separately: a bad query head spoils its group of heads, and so does a bad key/value head.
Cotangents are not guarded: one that is not finite comes from a loss that is not finite, and the
step that would use the gradients is skipped (lm/optimizers).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels import segments
from kernels.contract import InputSpec, Op
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.time_shards import Shards


class Sick(NamedTuple):
    """Tokens whose output is void, and rows whose last document is bad; `h` counts head groups."""

    tokens: Bool[Array, "B T h"]
    rows: Bool[Array, "B h"]


def admit(
    op: Op,
    specs: Mapping[str, InputSpec],
    inputs: Inputs,
    segment_ids: Int[Array, "B T"],
    state: Any,
    shards: Shards | None,
) -> tuple[Inputs, Any, Sick]:
    """Inputs and state without bad tokens, and what those tokens spoil. With `shards` the tokens
    are one rank's; bad tokens of earlier ranks spoil the rest of their document here.
    """
    groups = min(inputs[name].shape[2] for name, spec in specs.items() if _per_head(spec))
    bad = jnp.zeros((*segment_ids.shape, groups), bool)
    clean = dict(inputs)
    for name, spec in specs.items():
        if _per_head(spec):
            wrong = ~jnp.all(jnp.isfinite(inputs[name]), axis=tuple(range(3, inputs[name].ndim)))
            clean[name] = _cleared(inputs[name])
            bad |= jnp.any(wrong.reshape(*bad.shape, -1), axis=-1)
    batch = segment_ids.shape[0]
    entry, entry_sick = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, groups), bool)
    if state is not None:
        state, entry, entry_sick = _admit_state(op, state, groups)
    if shards is None or shards.layout == "contiguous":
        return clean, state, _spoilt(segment_ids, bad, entry, entry_sick, shards)
    # A rank's tokens are not one stretch of time, so the flags of the whole row are gathered: they
    # are small.
    sick = _spoilt(shards.row(segment_ids), shards.row(bad), entry, entry_sick, None)
    return clean, state, sick._replace(tokens=shards.of_row(sick.tokens))


def _spoilt(
    segment_ids: Int[Array, "B T"],
    bad: Bool[Array, "B T h"],
    entry: Int[Array, " B"],
    entry_sick: Bool[Array, "B h"],
    shards: Shards | None,
) -> Sick:
    """What bad tokens spoil; `entry` is the document carried in, `entry_sick` whether it is bad."""
    rows = None
    if shards is not None:
        entry = shards.entry(segment_ids, entry)
    belongs = segments.continued(segment_ids, entry, segment_ids.shape[1])
    starts = belongs != segments.previous(belongs, entry)
    is_token = (segment_ids != 0)[..., None]
    if shards is not None:
        entry_sick, rows = _pass_on(shards, starts, bad & is_token, entry_sick)
    sick = _from_bad_on(starts, bad & is_token, entry_sick)
    return Sick(sick & is_token, sick[:, -1] if rows is None else rows)


def whole_documents(sick: Sick, segment_ids: Int[Array, "B T"]) -> Sick:
    """For an op that is not causal: also void the tokens before a document's first bad token."""
    batch, time = segment_ids.shape
    belongs = segments.continued(segment_ids, jnp.zeros((batch,), jnp.int32), time)
    # Read from the end of the row, a document starts at its last token.
    ends = segments.resets(belongs[:, ::-1])
    before = _from_bad_on(ends, sick.tokens[:, ::-1], jnp.zeros_like(sick.rows))
    return sick._replace(tokens=before[:, ::-1] & (segment_ids != 0)[..., None])


def _from_bad_on(
    starts: Bool[Array, "B T"], bad: Bool[Array, "B T h"], entry: Bool[Array, "B h"]
) -> Bool[Array, "B T h"]:
    """Where a document has had a bad token so far; `entry`: whether the document that continues
    from before the first token already had one."""
    start, worst = segments.latest(starts)[..., None], segments.latest(bad)
    return (worst >= jnp.maximum(start, 0)) | ((start < 0) & entry[:, None])


def _pass_on(
    shards: Shards, starts: Bool[Array, "B T"], bad: Bool[Array, "B T h"], entry: Bool[Array, "B h"]
) -> tuple[Bool[Array, "B h"], Bool[Array, "B h"]]:
    """Whether the document that enters this rank is bad, and whether the row's last one is."""
    here = _from_bad_on(starts, bad, jnp.zeros_like(entry))[:, -1]
    # The ranks of a row are handled like the tokens of a shard.
    left = _from_bad_on(shards.ranks(jnp.any(starts, axis=1)), shards.ranks(here), entry)
    came = jnp.concatenate([entry[:, None], left[:, :-1]], axis=1)
    return shards.own(came), left[:, -1]


def release(op: Op, out: Array, state: Any, sick: Sick) -> tuple[Array, Any]:
    """Output and state, with NaN where they are void."""
    groups = sick.rows.shape[-1]
    out = segments.put(jnp.nan, jnp.repeat(sick.tokens, out.shape[2] // groups, axis=2), out)
    fields: list[Array] = []
    for (_, letters), array in zip(op.state.fields, state, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            fields.append(array)
            continue
        rows = jnp.repeat(sick.rows, array.shape[_head_axis(letters)] // groups, axis=1)
        if "S" in letters:
            last = kv_cache.current_segment(state)[:, None]
            rows = rows[:, None] & (state.segment_ids == last)[..., None]
        fields.append(segments.put(jnp.nan, rows, array))
    return out, type(state)(*fields)


def _admit_state(op: Op, state: Any, groups: int) -> tuple[Any, Array, Array]:
    """The state with zeros for what is not finite, its rows' documents, and which are spoilt."""
    is_cache = hasattr(state, "segment_ids")
    entry = kv_cache.current_segment(state) if is_cache else state.segment
    sick = jnp.zeros((entry.shape[0], groups), bool)
    fields: list[Array] = []
    for (_, letters), array in zip(op.state.fields, state, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            fields.append(array)
            continue
        axis = _head_axis(letters)
        wrong = ~jnp.all(jnp.isfinite(array), axis=tuple(range(axis + 1, array.ndim)))
        fields.append(segments.put(0.0, wrong, array))
        if "S" in letters:
            wrong = jnp.any(wrong & (state.segment_ids == entry[:, None])[..., None], axis=1)
        sick |= jnp.any(wrong.reshape(*sick.shape, -1), axis=-1)
    return type(state)(*fields), entry, sick


@jax.custom_vjp
def _cleared(x: Array) -> Array:
    """x with zeros where it is not finite. Cotangents pass unchanged, so no mask is kept for them:
    the output of such a token is void, so its own gradient does not matter.
    """
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


_cleared.defvjp(lambda x: (_cleared(x), None), lambda _, cotangent: (cotangent,))


def _per_head(spec: InputSpec) -> bool:
    return spec.letters.startswith(("B T H", "B T G"))


def _head_axis(letters: str) -> int:
    names = letters.split()
    return names.index("G" if "G" in names else "H")
