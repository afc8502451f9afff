"""Any chunked recurrence as two TPU kernels, forward and backward; the op supplies the mathematics.

The grid is (rows of the batch, groups of heads, chunks). The first two are parallel. Chunks run one
after another, and the memory S [K, V] of each head (in the backward pass its cotangent) stays in
VMEM from chunk to chunk, as an output block whose index does not change. The backward pass starts
at the last chunk.

    wide    q, k, v, ... [B, T, H, W] as [B, T, H W]: a block holds the lanes of some heads, so no
            array is padded to 128 lanes or transposed, and a projection's output has this layout
    rows    one number per token and head [B, T, H] as [B, G, N, heads, C], tokens along lanes
    marks   where documents begin, and padding, [N, B, 2, C]; the kernel makes masks of them
    S       [B, K, H V], heads along lanes like the values

Saved: the inputs, and S at the entry of every chunk, 4 K V / C bytes per token and head (as much as
q in bfloat16 at K = V = 64, C = 128). Recomputing those states would be a third pass over k and v,
and for the delta rule a third inverse of every chunk's matrix.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from kernels import segments
from kernels.blocks import PallasChunk, round_up
from kernels.primitives import chunks, device
from kernels.primitives.chunks import Documents, Marks
from kernels.primitives.products import EXACT, ROUNDED, Products

LANES = 128
MOST_HEADS = 16  # in one program: its code is unrolled over its heads

type Named = dict[str, Array]


class Mathematics(NamedTuple):
    """One chunk of one head. Arrays have the names of the op's inputs and are [C, W] or [1, C].
    `how` is passed on to the functions; `name` names the kernels in a profile.

    forward(how, x, documents, s) -> out, s
    backward(how, x, documents, s, d_out, d_s) -> d_x, d_s
    """

    name: str
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Named, Array]]
    how: Any


class Static(NamedTuple):
    """What is known at trace time; `together` is the number of heads that share a program."""

    mathematics: Mathematics
    heads: int
    together: int
    length: int
    is_marked: bool


class Arrays(NamedTuple):
    """All arrays, in the layouts of the module docstring."""

    wide: dict[str, Float[Array, "B T HW"]]
    rows: dict[str, Float[Array, "B G N h C"]]
    marks: Float[Array, "N B 2 C"] | None
    s: Float[Array, "B K HV"]


def products(dtype: DTypeLike) -> Products:
    """How chunks of inputs of this dtype are multiplied."""
    return ROUNDED if jnp.dtype(dtype) == jnp.bfloat16 else EXACT


def together(heads: int, widths: tuple[int, ...], most: int) -> int:
    """How many heads share a program: as many as fill whole rows of lanes, or all heads. Of the
    counts that do, the largest one up to `most`, or else the smallest."""
    fitting = [
        count
        for count in range(1, heads + 1)
        if heads % count == 0
        and (count == heads or all(count * width % LANES == 0 for width in widths))
    ]
    return max((count for count in fitting if count <= most), default=fitting[0])


def refusal(heads: int, widths: tuple[int, ...]) -> str | None:
    """Why heads of these widths cannot run, or None."""
    least = together(heads, widths, 1)
    if least <= MOST_HEADS:
        return None
    sizes = " and ".join(str(width) for width in widths)
    return (
        f"{least} heads of widths {sizes} would share a program, more than {MOST_HEADS}; "
        f"choose widths that divide {LANES}"
    )


def run(
    mathematics: Mathematics,
    inputs: Named,
    segment_ids: Int[Array, "B T"] | None,
    state: tuple[Float[Array, "B H K V"], Int[Array, " B"]],
    blocks: PallasChunk,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"], Int[Array, " B"]]:
    """Output and state of T more tokens; padding has no output and adds nothing to the state."""
    s, entry = state
    batch, heads, key, value = s.shape
    time = inputs["v"].shape[1]
    length = min(blocks.length, max(16, 1 << (time - 1).bit_length()))
    count = together(heads, (key, value), blocks.heads)
    marks, segment = chunks.marks(segment_ids, entry, length, time)
    static = Static(mathematics, heads, count, length, marks is not None)
    x = Arrays(
        {name: _flat(x, length) for name, x in inputs.items() if x.ndim == 4},
        {
            name: _rows(segments.blank_padding(x, segment_ids), static)
            for name, x in inputs.items()
            if x.ndim == 3
        },
        None if marks is None else jnp.stack(marks, axis=2),
        s.astype(jnp.float32).swapaxes(1, 2).reshape(batch, key, heads * value),
    )
    out, s = recur(static, x)
    out = out[:, :time].reshape(batch, time, heads, value)
    return out, s.reshape(batch, key, heads, value).swapaxes(1, 2), segment


def _pad(x: Array, length: int) -> Array:
    """Appends zeros up to whole chunks."""
    missing = round_up(x.shape[1], length) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _flat(x: Float[Array, "B T H W"], length: int) -> Float[Array, "B T HW"]:
    return _pad(x.reshape(*x.shape[:2], -1), length)


def _rows(x: Float[Array, "B T H"], static: Static) -> Float[Array, "B G N h C"]:
    x = _pad(x.astype(jnp.float32), static.length)
    x = x.reshape(x.shape[0], -1, static.length, static.heads // static.together, static.together)
    return x.transpose(0, 3, 1, 4, 2)


def _recur(static: Static, x: Arrays) -> tuple[Float[Array, "B T HV"], Float[Array, "B K HV"]]:
    """The output, and S after the last chunk."""
    out, s = _call_forward(static, x, saves=False)
    return out, s


def _forward(static: Static, x: Arrays) -> tuple[tuple[Array, Array], tuple[Arrays, Array]]:
    out, s, entered = _call_forward(static, x, saves=True)
    return (out, s), (x, entered)


def _backward(
    static: Static, saved: tuple[Arrays, Array], cotangents: tuple[Array, Array]
) -> tuple[Arrays]:
    x, entered = saved
    d_out, d_s = cotangents
    grid, spec = _specs(static, x, is_reversed=True)
    given = (*spec.inputs(x), spec.wide(d_out), spec.state, spec.entered)
    like = [*x.wide.values(), *x.rows.values(), x.s]
    *found, d_s = pl.pallas_call(
        partial(_backward_kernel, static, tuple(x.wide), tuple(x.rows)),
        grid=grid,
        in_specs=given,
        out_specs=[*map(spec.wide, x.wide.values()), *(spec.row for _ in x.rows), spec.state],
        out_shape=[jax.ShapeDtypeStruct(y.shape, y.dtype) for y in like],
        compiler_params=_COMPILER,
        interpret=device.interpreter(),
        name=f"{static.mathematics.name}_backward",
    )(*_ordered(x), d_out, d_s, entered)
    wide = dict(zip(x.wide, found, strict=False))
    rows = dict(zip(x.rows, found[len(wide) :], strict=True))
    return (Arrays(wide, rows, None if x.marks is None else jnp.zeros_like(x.marks), d_s),)


recur = jax.custom_vjp(_recur, nondiff_argnums=(0,))
recur.defvjp(_forward, _backward)

# Holds a program's buffers and the intermediates between its products. The compiler's own limit is
# 16 MiB, which per-channel decay in chunks of 256 tokens with eight heads exceeds.
_VMEM = 64 * 2**20
_COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
)


def _call_forward(static: Static, x: Arrays, *, saves: bool) -> list[Array]:
    """The output and the last S; with `saves`, also S at the entry of every chunk."""
    grid, spec = _specs(static, x, is_reversed=False)
    batch, _, chunk_count = grid
    shapes = [
        jax.ShapeDtypeStruct(x.wide["v"].shape, x.wide["q"].dtype),
        jax.ShapeDtypeStruct(x.s.shape, x.s.dtype),
        jax.ShapeDtypeStruct((batch, chunk_count, *x.s.shape[1:]), x.s.dtype),
    ]
    outputs = [spec.wide(x.wide["v"]), spec.state, spec.entered]
    count = 3 if saves else 2
    return pl.pallas_call(
        partial(_forward_kernel, static, tuple(x.wide), tuple(x.rows)),
        grid=grid,
        in_specs=spec.inputs(x),
        out_specs=outputs[:count],
        out_shape=shapes[:count],
        compiler_params=_COMPILER,
        interpret=device.interpreter(),
        name=f"{static.mathematics.name}_forward",
    )(*_ordered(x))


class _Specs(NamedTuple):
    """The blocks that a program sees, by kind of array."""

    length: int
    groups: int
    wide_index: Callable[..., tuple[Any, ...]]
    row: pl.BlockSpec
    mark: pl.BlockSpec
    state: pl.BlockSpec
    entered: pl.BlockSpec

    def wide(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.length, x.shape[2] // self.groups), self.wide_index)

    def inputs(self, x: Arrays) -> list[pl.BlockSpec]:
        """In the order of `_ordered`."""
        marks = [] if x.marks is None else [self.mark]
        return [*map(self.wide, x.wide.values()), *(self.row for _ in x.rows), *marks, self.state]


def _ordered(x: Arrays) -> list[Array]:
    return [*x.wide.values(), *x.rows.values(), *([] if x.marks is None else [x.marks]), x.s]


def _specs(static: Static, x: Arrays, *, is_reversed: bool) -> tuple[tuple[int, int, int], _Specs]:
    """The grid, and the block of each kind of array that a program sees."""
    batch, key, lanes = x.s.shape
    count = x.wide["v"].shape[1] // static.length
    groups = static.heads // static.together

    def chunk(n: Any) -> Any:
        return count - 1 - n if is_reversed else n

    specs = _Specs(
        static.length,
        groups,
        lambda b, g, n: (b, chunk(n), g),
        pl.BlockSpec(
            (None, None, None, static.together, static.length),
            lambda b, g, n: (b, g, chunk(n), 0, 0),
        ),
        pl.BlockSpec((None, None, 2, static.length), lambda b, g, n: (chunk(n), b, 0, 0)),
        pl.BlockSpec((None, key, lanes // groups), lambda b, g, n: (b, 0, g)),
        pl.BlockSpec((None, None, key, lanes // groups), lambda b, g, n: (b, chunk(n), 0, g)),
    )
    return (batch, groups, count), specs


def _forward_kernel(
    static: Static, wide: tuple[str, ...], rows: tuple[str, ...], *refs: Any
) -> None:
    """One chunk of some heads: computes its output, and moves S from its entry to its end."""
    take = iter(refs)
    read = _Reader(static, take, wide, rows)
    first_ref, out_ref, s_ref = (next(take) for _ in range(3))
    entered_ref = next(take, None)

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        s_ref[...] = first_ref[...]

    if entered_ref is not None:
        entered_ref[...] = s_ref[...]
    documents = read.documents()
    _, forward, _, how = static.mathematics
    for head in range(static.together):
        values = read.lanes(s_ref, head)
        out, s = forward(how, read.inputs(head), documents, s_ref[:, values])
        out_ref[:, values] = _real(out, documents).astype(out_ref.dtype)
        s_ref[:, values] = s


def _backward_kernel(
    static: Static, wide: tuple[str, ...], rows: tuple[str, ...], *refs: Any
) -> None:
    """One chunk of some heads: cotangents of its inputs, and that of S from its end to its
    entry."""
    take = iter(refs)
    read = _Reader(static, take, wide, rows)
    next(take)  # S before the first chunk: only its cotangent is needed
    d_out_ref, d_last_ref, entered_ref = (next(take) for _ in range(3))
    d_refs = {name: next(take) for name in (*wide, *rows)}
    d_s_ref = next(take)

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        d_s_ref[...] = d_last_ref[...]

    documents = read.documents()
    _, _, backward, how = static.mathematics
    for head in range(static.together):
        values = read.lanes(d_s_ref, head)
        d_out = _real(d_out_ref[:, values].astype(jnp.float32), documents)
        s = entered_ref[:, values]
        found, d_s = backward(how, read.inputs(head), documents, s, d_out, d_s_ref[:, values])
        for name, ref in d_refs.items():
            grad = found[name].astype(ref.dtype)
            if name in wide:
                ref[:, read.lanes(ref, head)] = grad
            else:
                ref[head : head + 1, :] = grad
        d_s_ref[:, values] = d_s


class _Reader:
    """The inputs of a program, head by head."""

    def __init__(
        self, static: Static, refs: Iterator[Any], wide: tuple[str, ...], rows: tuple[str, ...]
    ) -> None:
        self._heads = static.together
        self._wide = {name: next(refs) for name in wide}
        self._rows = {name: next(refs) for name in rows}
        self._marks = next(refs) if static.is_marked else None

    def lanes(self, ref: Any, head: int) -> slice:
        """The lanes of this head in a block that holds all heads of the program."""
        width = ref.shape[1] // self._heads
        return slice(head * width, (head + 1) * width)

    def inputs(self, head: int) -> Named:
        """The head's inputs in float32, [C, W] or [1, C]."""
        wide = {n: ref[:, self.lanes(ref, head)] for n, ref in self._wide.items()}
        rows = {n: ref[head : head + 1, :] for n, ref in self._rows.items()}
        return {name: x.astype(jnp.float32) for name, x in (wide | rows).items()}

    def documents(self) -> Documents | None:
        if self._marks is None:
            return None
        return chunks.documents(Marks(self._marks[0:1, :], self._marks[1:2, :]))


def _real(x: Float[Array, "C W"], documents: Documents | None) -> Float[Array, "C W"]:
    """x with zeros on padding."""
    return x if documents is None else jnp.where(documents.keep, x, 0.0)
