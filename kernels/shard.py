"""Ops on a mesh: letters and rules become PartitionSpecs, and every shard runs the op by itself.

A rule maps a letter to mesh axes: `{"B": ("data", "fsdp"), "H": ("tensor",), "G": ("tensor",)}`.
Letters without a rule are whole on every device. The `custom_vjp` of a form sits inside
`jax.shard_map`. The transpose of shard_map then sums the cotangent of an input over the axes that
its letters do not use (for a bias, the batch axes) and over no others, which is exactly the
collective that the declaration implies. A `custom_vjp` outside would have to write those sums for
every op.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from kernels.contract import Dims, Layout, Op, Options
from kernels.letters import Inputs
from kernels.primitives.grouped_heads import GroupedHeads, along, along_each
from kernels.primitives.time_shards import Shards

type Rules = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Placement:
    """Where a call runs: a mesh and the rules that split the call over it. Where they split T, also
    the op's strategy by name ("auto": see `strategies.choose`) and the layout of the tokens.
    """

    mesh: Mesh
    rules: Rules
    strategy: str
    layout: Layout


def spec(letters: str, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these letters."""
    split = (rules.get(letter, ()) for letter in letters.split())
    return PartitionSpec(*(names or None for names in split))


def check(
    op: Op, dims: Dims, placement: Placement, rules: Rules, mesh: Mesh | AbstractMesh
) -> None:
    """Raises ValueError where a size is not divisible by its axes, or where the op cannot split a
    letter. `rules` are the placement's rules after `here` has removed axes.
    """
    around = [axis for axis in placement.rules.get("T", ()) if axis not in rules.get("T", ())]
    if around:
        raise ValueError(
            f"a shard_map around {op.name} splits T over {around}, and ops split T themselves; "
            "call it outside"
        )
    time = [axis for axis in mesh.axis_names if axis in rules.get("T", ())]
    if time != list(rules.get("T", ())):
        raise ValueError(f"rules split T over {rules['T']}; name them in the mesh's order, {time}")
    whole = _letters(op) - SPLIT
    for letter, axes in rules.items():
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise ValueError(f"rules[{letter!r}] names {unknown[0]!r}; mesh has {mesh.axis_names}")
        shards = num_shards(letter, rules, mesh)
        if letter in whole and shards > 1:
            raise ValueError(f"{op.name} cannot split {letter} over {axes} ({shards} shards)")
        if letter in dims and dims[letter] % shards:
            raise ValueError(
                f"{letter}={dims[letter]} must be a multiple of {shards}, the size of {axes}"
            )
    time = time_shards(rules, mesh, placement.layout)
    if time is not None and dims["T"] % (pieces := time.count * time.stretches):
        raise ValueError(
            f"T={dims['T']} must be a multiple of {pieces}: in {time.layout}, {time.count} ranks "
            f"hold {time.stretches} stretches each"
        )
    heads, groups = rules.get("H", ()), rules.get("G", ())
    if groups and heads != groups:
        raise ValueError(
            f"rules split H over {heads} but G over {groups}; set both alike or leave G whole"
        )
    if "G" in dims and not groups:
        ways = num_shards("H", rules, mesh)
        if ways % dims["G"] and dims["G"] % ways:
            raise ValueError(
                f"G={dims['G']} heads, whole on {ways} shards of H, must divide them or be a "
                "multiple of them"
            )


def of_rank(dims: Dims, rules: Rules, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The sizes of what one device computes; only T stays that of the whole row."""
    found = {
        x: size if x == "T" else size // num_shards(x, rules, mesh) for x, size in dims.items()
    }
    if "G" in dims and "G" not in rules:
        found["G"] = max(1, dims["G"] // num_shards("H", rules, mesh))
    return found


# What a placement may split: rows and heads, which an op computes independently, and time, for
# which the op needs a strategy.
SPLIT = frozenset("BHGT")


def _letters(op: Op) -> set[str]:
    """All letters of the op's arrays."""
    texts = [op.out, *(spec.letters for spec in op.inputs), *(text for _, text in op.state.fields)]
    return {letter for text in texts for letter in text.split()}


def fitting(letters: str, shape: tuple[int, ...], rules: Rules, mesh: Any) -> PartitionSpec:
    """Like `spec`, but for laying out an array rather than for a program: a dimension stays whole
    where its size does not divide, or where an earlier letter already uses one of its axes.
    """
    taken: set[str] = set()
    dims = []
    for letter, size in zip(letters.split(), shape, strict=True):
        own = rules.get(letter, ())
        fits = size % num_shards(letter, rules, mesh) == 0 and not taken & set(own)
        taken |= set(own) if fits else set()
        dims.append(own if fits and own else None)
    return PartitionSpec(*dims)


def here(mesh: Mesh, rules: Rules) -> tuple[Mesh | AbstractMesh, dict[str, tuple[str, ...]]]:
    """Mesh and rules for a `jax.shard_map` or a sharding constraint at this place of the program.
    Inside a shard_map, the axes that it maps over are already used and are removed from the rules.
    """
    around = jax.sharding.get_abstract_mesh()
    taken = around.manual_axes
    left = {letter: tuple(a for a in axes if a not in taken) for letter, axes in rules.items()}
    return around if taken else mesh, {letter: axes for letter, axes in left.items() if axes}


def axes(layout: PartitionSpec, *dims: int) -> tuple[str, ...]:
    """The mesh axes of these dimensions (of all dimensions if none is named). A PartitionSpec
    writes a single axis without a tuple, and omits whole dimensions at its end.
    """
    entries = [layout[i] for i in dims if i < len(layout)] if dims else layout
    tuples = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return tuple(axis for names in tuples for axis in names)


def total(
    x: jax.Array, over: tuple[str, ...], scattered: tuple[str, ...] = (), dimension: int = 0
) -> jax.Array:
    """Inside shard_map: the sum of x over the devices along the axes `over` and `scattered`. Along
    `scattered` each device keeps only its part of `dimension` (a reduce-scatter); the sum over the
    other axes is then taken of that part alone.
    """
    plain = tuple(axis for axis in over if axis not in scattered)
    if scattered:
        x = jax.lax.psum_scatter(x, scattered, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, plain) if plain else x


def local_index(index: jax.Array, over: tuple[str, ...], size: int) -> tuple[jax.Array, jax.Array]:
    """Inside shard_map: an index into a dimension that is split over `over` becomes an index into
    this device's `size` entries (0 if it lies elsewhere), and whether it lies here.
    """
    place = index - jax.lax.axis_index(over) * size
    is_here = (place >= 0) & (place < size)
    return jnp.where(is_here, place, 0), is_here


def time_shards(rules: Rules, mesh: Mesh | AbstractMesh, layout: Layout) -> Shards | None:
    """How T is split, or None where it is whole."""
    count = num_shards("T", rules, mesh)
    return Shards(tuple(rules["T"]), count, layout) if count > 1 else None


def num_shards(letter: str, rules: Rules, mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the rules cut this letter."""
    size = 1
    for axis in rules.get(letter, ()):
        size *= mesh.shape[axis]
    return size


def wrap(call: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`call`, applied to the local part of every array."""
    # The forms use while loops and custom_vjp, whose replication types JAX cannot infer.
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )


def over(
    op: Op,
    call: Callable[..., tuple[Array, Any]],
    options: Options,
    placement: tuple[Mesh | AbstractMesh, Rules],
    dims: Dims,
) -> Callable[..., tuple[Array, Any]]:
    """`call(inputs, segment_ids, state)` under shard_map; the specs come from the letters of the
    op's inputs, state and output.
    """
    mesh, rules = placement
    letters = {name: spec.letters for name, spec in op.needed(options).items()}
    grouped = None
    if "H" in rules and "G" in dims and "G" not in rules:
        grouped = GroupedHeads(rules["H"], num_shards("H", rules, mesh), dims["G"])
    fields = op.state.fields

    def local(inputs: Inputs, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        if grouped is not None:
            inputs = {n: along("G", grouped.own, x, letters[n]) for n, x in inputs.items()}
            if state is not None:
                state = along_each("G", grouped.own, state, fields)
        return call(inputs, segment_ids, state)

    def run(inputs: Inputs, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        empty = jax.tree.structure(jax.eval_shape(lambda: op.init_state(dims, "float32", 1, 1)))
        before = jax.tree.unflatten(empty, [spec(text, rules) for _, text in fields])
        split = {**rules, "G": rules["H"]} if grouped is not None else rules
        after = jax.tree.unflatten(empty, [spec(text, split) for _, text in fields])
        in_specs = (
            {name: spec(letters[name], rules) for name in inputs},
            None if segment_ids is None else spec("B T", rules),
            None if state is None else before,
        )
        mapped = wrap(local, mesh, in_specs, (spec(op.out, rules), after))
        out, state = mapped(inputs, segment_ids, state)
        if grouped is not None:
            state = along_each("G", grouped.once, state, fields)
        return out, state

    return run
