"""Continues prompts: one prefill, then one step per token, all in one compiled call.

    tokens [B, P] left-aligned, padded on the right with segment 0; P is rounded as for scored rows
    hidden, state = model(tokens, empty state of P + max_new_tokens places)      prefill
    token = pick(head hidden of each row's last prompt token)
    while some row has not ended: hidden, state = model.step(token, state); token = pick(...)

To pick a token, logits are divided by the temperature, then the top_k largest are kept, then the
smallest set with at least top_p mass (Holtzman et al. 2020, arXiv 1904.09751, sec. 3.1). One token
is drawn from it with the key (seed, token index, row). Temperature 0 takes the largest logit, which
no filter removes. Ids from vocab_size on, the padding of the vocabulary, are never picked.

If the tokenizer has a start token (data.tokenizer.bos), every prompt begins with it and may be
empty. Otherwise a prompt needs at least one token: documents are trained without a start, and the
end of text is only ever a target, so the model has no distribution of first tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import UserError
from lm.model import Model
from lm.parallel import placement, processes
from lm.run.checkpoint import Loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """temperature 0: greedy. top_k 0: all tokens. top_p 1: all tokens. Over the allowed
    temperatures, float32 logits keep their order and stay finite.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens < 2**31:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must lie in [1, 2^31)")
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(
                f"temperature={self.temperature} must be 0, which is greedy, or lie in [1e-6, 1e6]"
            )
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k} must lie in [0, 2^31); 0 allows every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]; 1 allows every token")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in [0, 2^32)")


class Vocabulary(NamedTuple):
    """`size` is the tokenizer's; larger ids are padding."""

    size: int
    end_of_text: int


class _Picking(NamedTuple):
    """The options as arrays, so that other values do not need a new compilation."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """What the compiled call depends on besides shapes. Two are equal only for the same model
    object.
    """

    model: Model
    max_new_tokens: int
    vocabulary: Vocabulary

    def __hash__(self) -> int:
        return hash((id(self.model), self.max_new_tokens, self.vocabulary))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Program)
            and self.model is other.model
            and (self.max_new_tokens, self.vocabulary) == (other.max_new_tokens, other.vocabulary)
        )


def complete(loaded: Loaded, prompts: Sequence[str], options: GenerateOptions) -> list[str]:
    """The continuation of each prompt as text; bytes that are not UTF-8 become U+FFFD."""
    tokenizer = loaded.tokenizer
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text)
    ids = [tokenizer.start + tokenizer.encode(prompt) for prompt in prompts]
    new = generate(loaded.model, loaded.params, ids, options=options, vocabulary=vocabulary)
    return [tokenizer.decode(row) for row in new]


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: GenerateOptions,
    vocabulary: Vocabulary,
) -> list[list[int]]:
    """The new token ids of each prompt, without the end of text that stopped it.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a model that cannot decode.
    """
    if not model.is_causal:
        raise UserError(
            f"model.pattern={model.config.pattern!r} has a mixer that sees later tokens, so "
            "nothing can be continued; choose a run of another pattern"
        )
    if not prompts:
        return []
    _check(prompts, vocabulary)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Rows are added until the batch divides over the mesh; they repeat the first prompt.
    ways = math.prod(model.context.mesh.shape[axis] for axis in model.context.rules.get("B", ()))
    rows = np.concatenate([np.arange(len(prompts)), np.zeros(-len(prompts) % ways, np.int64)])
    where = model.context.mesh, model.context.layout
    padded = placement.row_length(int(lengths.max()), *where)
    tokens = np.zeros((len(rows), padded), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : lengths[row]] = prompts[row]
    tokens = placement.shards(*where).by_rank(tokens, 1)
    picking = _Picking(
        jnp.float32(options.temperature),
        jnp.int32(options.top_k or vocabulary.size),
        jnp.float32(options.top_p),
        jax.random.key(options.seed),
    )
    program = _Program(model, options.max_new_tokens, vocabulary)
    new = processes.to_host(_run(program, params, tokens, lengths[rows], picking))
    return [_until(row.tolist(), vocabulary.end_of_text) for row in new[: len(prompts)]]


def trace(
    model: Model,
    params: Any,
    vocabulary: Vocabulary,
    *,
    rows: int,
    prompt_len: int,
    max_new_tokens: int,
) -> jax.stages.Traced:
    """The call that `generate` compiles for prompts of these sizes. The params may be abstract."""
    tokens = jax.ShapeDtypeStruct((rows, prompt_len), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature, top_k, top_p = (jax.ShapeDtypeStruct((), x) for x in ("f4", "i4", "f4"))
    program = _Program(model, max_new_tokens, vocabulary)
    picking: Any = _Picking
    return _run.trace(program, params, tokens, lengths, picking(temperature, top_k, top_p, key))


@functools.partial(jax.jit, static_argnames="program")
def _run(
    program: _Program, params: Any, tokens: jax.Array, lengths: jax.Array, picking: _Picking
) -> jax.Array:
    """tokens int32 [B, P], in the layout of the time axis, and lengths int32 [B] -> new tokens
    int32 [B, N], filled with end of text.
    """
    model, variables = program.model, {"params": params}
    end, count = program.vocabulary.end_of_text, program.max_new_tokens
    batch, time = tokens.shape
    index = jnp.asarray(placement.columns(time, model.context.mesh, model.context.layout))
    segment_ids = (index < lengths[:, None]).astype(jnp.int32)
    # The barrier hides from XLA that the state is all zeros. Otherwise XLA would evaluate what the
    # prefill does with it while compiling, element by element, which takes seconds and grows with
    # B.
    state = jax.lax.optimization_barrier(model.init_state(batch, time + count))
    hidden, state = model.apply(variables, tokens, segment_ids, index * segment_ids, state)
    column = jnp.argsort(index)[lengths - 1]
    last = jnp.take_along_axis(hidden, column[:, None, None], axis=1)[:, 0]
    head = typing.cast(jax.Array, model.apply(variables, method="head"))
    pick = functools.partial(_pick, program, head, picking)
    first = pick(last, jnp.int32(0))
    new = jnp.full((batch, count), end, jnp.int32).at[:, 0].set(first)
    # The barrier keeps XLA from moving what takes layers apart into the loop.
    params, state = jax.lax.optimization_barrier(model.apart(params, state))

    def proceed(carry: tuple[Any, ...]) -> jax.Array:
        n, token, _, _ = carry
        return (n < count) & jnp.any(token != end)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n, token, new, state = carry
        hidden, state = model.apply({"params": params}, token, state, method="step")
        token = jnp.where(token == end, end, pick(hidden, n))
        return n + 1, token, new.at[:, n].set(token), state

    return jax.lax.while_loop(proceed, advance, (jnp.int32(1), first, new, state))[2]


def _pick(
    program: _Program, head: jax.Array, picking: _Picking, hidden: jax.Array, n: jax.Array
) -> jax.Array:
    """hidden [B, D] -> the n-th new token of each row, int32 [B]."""
    dtype = program.model.context.numerics.operand_dtype
    product = "bd,vd->bv", hidden.astype(dtype), head.astype(dtype)
    logits = jnp.einsum(*product, preferred_element_type=jnp.float32)
    logits = jnp.where(jnp.arange(head.shape[0]) < program.vocabulary.size, logits, -jnp.inf)

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    def sampled() -> jax.Array:
        kept = _filtered(logits / picking.temperature, picking.top_k, picking.top_p)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(jax.random.fold_in(picking.key, n), jnp.arange(len(hidden)))
        return jax.vmap(jax.random.categorical)(keys, kept)

    return jax.lax.cond(picking.temperature > 0, sampled, greedy).astype(jnp.int32)


def _filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """logits [B, vocab], with -inf outside the top_k largest and the top_p mass; ties are kept."""
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where(rank < top_k, ordered, -jnp.inf)
    mass = jax.nn.softmax(ordered, axis=-1)
    # A token stays if the tokens before it hold less than top_p. The largest always stays. At top_p
    # 1 all stay: rounded sums may reach 1 before the last token.
    held = jnp.cumsum(mass, axis=-1) - mass
    stays = ((held < top_p) | (top_p >= 1) | (rank == 0)) & (ordered > -jnp.inf)
    smallest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _check(prompts: Sequence[Sequence[int]], vocabulary: Vocabulary) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {i} is empty: the model was trained without a start token "
                "(data.tokenizer.bos); give at least one character"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary.size:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary.size)
            raise UserError(
                f"prompt {i} has token id {wrong}; the vocabulary ends at {vocabulary.size}"
            )


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
