"""Generation against a loop of whole forward passes, and the filters against their definitions."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.build import Build
from lm.config import UserError
from lm.data.tokenizers import Tokenizer
from lm.evaluation import generate
from lm.evaluation.generate import GenerateOptions, Vocabulary
from tests import jaxprs
from tests.lm import tiny

VOCABULARY = Vocabulary(size=280, end_of_text=256)  # smaller than the model's 300, padded to 384
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5], [200, 100, 50, 25]]
NEW = 12


@functools.cache
def built() -> Build:
    return tiny.create({"model.pattern": "softmax,stickbreaking", "model.num_layers": 2})


@functools.cache
def params() -> Any:
    return tiny.params(built())


def options(**changes: Any) -> GenerateOptions:
    plain = {"max_new_tokens": NEW, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return GenerateOptions(**(plain | changes))


def run(prompts: Any = None, weights: Any = None, **changes: Any) -> list[list[int]]:
    return generate.generate(
        built().model,
        params() if weights is None else weights,
        PROMPTS if prompts is None else prompts,
        options=options(**changes),
        vocabulary=VOCABULARY,
    )


@functools.cache
def forward() -> Any:
    def logits(params: Any, tokens: Any, lengths: Any) -> Any:
        model, variables = built().model, {"params": params}
        index = jnp.arange(tokens.shape[1])
        segment_ids = (index < lengths[:, None]).astype(jnp.int32)
        hidden, _ = model.apply(variables, tokens, segment_ids, index * segment_ids)
        hidden = hidden[jnp.arange(len(tokens)), lengths - 1]
        head: Any = params["embed"]["table"]
        return hidden @ head.T

    return tiny.jit(logits)


def slowly(weights: Any) -> tuple[list[list[int]], float]:
    """Greedy continuations by a whole forward pass per token, and the smallest lead of a best
    token.
    """
    rows, lead = [list(p) for p in PROMPTS], np.inf
    for _ in range(NEW):
        tokens = np.zeros((4, 24), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        logits = forward()(weights, tokens, np.array([len(row) for row in rows]))
        logits = np.asarray(logits)[:, : VOCABULARY.size]
        best = np.sort(logits, axis=1)
        lead = min(lead, (best[:, -1] - best[:, -2]).min())
        for row, token in zip(rows, logits.argmax(axis=1), strict=True):
            row.append(int(token))
    new = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    end = VOCABULARY.end_of_text
    return [row[: row.index(end)] if end in row else row for row in new], lead


def test_greedy_is_the_argmax_of_whole_forwards() -> None:
    expected, lead = slowly(params())
    assert lead > 1e-3, "the comparison must not depend on rounding"
    assert run() == expected
    assert len({tuple(row) for row in expected}) > 1


def test_stops_at_end_of_text() -> None:
    """In the tied table, end of text becomes a scaled-up copy of a token that would be picked."""
    expected = run()
    row, place = next((r, i) for r, t in enumerate(expected) for i in range(3, len(t)))
    token = expected[row][place]
    table = np.array(params()["embed"]["table"])
    table[VOCABULARY.end_of_text] = 1.01 * table[token]  # beats it wherever it would be picked
    weights = params() | {"embed": {"table": table}}
    assert run(weights=weights)[row] == expected[row][: expected[row].index(token)]
    assert run(weights=weights) == slowly(weights)[0]


def test_padded_ids_are_never_picked() -> None:
    table = np.array(params()["embed"]["table"])
    table[VOCABULARY.size :] = -100 * table[VOCABULARY.size - 1]
    table[VOCABULARY.size + 1 :: 2] *= -1  # one of the two signs has a huge logit
    weights = params() | {"embed": {"table": table}}
    for changes in ({}, {"temperature": 5.0}):
        assert max(max(row, default=0) for row in run(weights=weights, **changes)) < VOCABULARY.size
    assert run(weights=weights) == run()


def test_the_seed_alone_decides() -> None:
    first, again, other = (run(temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_equal_prompts_draw_apart_and_other_rows_do_not_matter() -> None:
    twins = run([[7], [7], [1, 2, 3, 4, 5], [8]], temperature=3.0)
    assert twins[0] != twins[1]
    assert run([[7], [9], [5, 4, 3, 2, 1], [7]], temperature=3.0)[0] == twins[0]


def test_filters_that_leave_one_token_are_greedy() -> None:
    greedy = run()
    assert run(temperature=3.0, top_k=1) == greedy
    assert run(temperature=3.0, top_p=1e-6) == greedy
    assert run(temperature=1e-4) == greedy


OPS = "softmax,stickbreaking,gla,gated_deltanet,s4d,base_conv"  # a mixer for every op


def test_nothing_large_is_constant_folded() -> None:
    """An empty state is all zeros. XLA would fold sums over it, in time that grows with
    its size.
    """
    mixed = tiny.create({"model.pattern": OPS, "model.num_layers": len(OPS.split(","))})
    sizes = {"rows": 8, "prompt_len": 16, "max_new_tokens": 48}
    params = mixed.abstract_state.params
    traced = generate.trace(mixed.model, params, VOCABULARY, **sizes)
    assert not [str(eqn) for eqn in jaxprs.foldable(traced.jaxpr.jaxpr, 512)]


def test_foldable_sees_constants_in_loops_and_calls() -> None:
    def folds(x: jax.Array) -> Any:
        zeros = jnp.zeros((3, 40, 40))
        given = jax.lax.scan(lambda c, row: (c + jnp.sum(row), None), x[0], zeros)[0]
        return given, jax.jit(jnp.sum)(zeros), jnp.sum(x + zeros[0, 0])

    def does_not(x: jax.Array) -> Any:
        zeros = jax.lax.optimization_barrier(jnp.zeros((3, 40, 40)))
        return jax.lax.scan(lambda c, row: (c + jnp.sum(row), None), x[0], zeros)[0]

    found = [
        len([*jaxprs.foldable(jax.make_jaxpr(f)(jnp.ones(40)).jaxpr, 512)])
        for f in (folds, does_not)
    ]
    assert found == [2, 0]


def test_new_options_do_not_compile_again() -> None:
    compiled: Any = generate._run
    run()
    before = compiled._cache_size()
    run(temperature=0.7, top_k=5, top_p=0.9, seed=3)
    assert compiled._cache_size() == before


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (6, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (6, 0.39, [3]),
        (6, 0.41, [1, 3]),
        (6, 0.71, [1, 2, 3]),
        (3, 0.77, [1, 3]),  # the first two of the three that top_k leaves hold 7/9
        (3, 0.79, [1, 2, 3]),
        (1, 0.01, [3]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest_tokens(
    top_k: int, top_p: float, kept: list[int]
) -> None:
    probabilities = np.array([0.05, 0.3, 0.2, 0.4, 0.05, 0.0])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(probabilities), jnp.float32)[None]
    got = generate._filtered(logits, jnp.int32(top_k), jnp.float32(top_p))
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == kept


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0, 60.0])
@pytest.mark.parametrize("size", [3, 1000, 50_000])
def test_top_p_of_one_filters_nothing(size: int, spread: float) -> None:
    """The logits stay bit for bit, although the sum of that many rounded numbers is not 1. top_k
    then filters alone.
    """
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, size)) * spread, jnp.float32)
    got = generate._filtered(logits, jnp.int32(size), jnp.float32(1.0))
    np.testing.assert_array_equal(got, logits)
    few = generate._filtered(logits, jnp.int32(2), jnp.float32(1.0))
    kept = np.asarray(logits) >= np.sort(logits, axis=1)[:, -2:-1]
    np.testing.assert_array_equal(few, np.where(kept, logits, -np.inf))


@pytest.mark.parametrize("top_p", [1e-7, 1e-45, 1e-300])
def test_the_likeliest_token_always_stays(top_p: float) -> None:
    """This holds even where top_p is 0 in float32."""
    logits = jnp.asarray([[0.0, 2.0, 1.0]])
    got = generate._filtered(logits, jnp.int32(3), jnp.float32(top_p))
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == [1]


def test_draws_follow_the_filtered_distribution() -> None:
    """Each of 4,000 rows draws once from the same logits."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    table = np.full((128, 4), 0.0, np.float32)
    table[:4] = np.diag(np.log(probabilities))
    program = generate._Program(built().model, 1, Vocabulary(4, 3))
    picking = generate._Picking(
        jnp.float32(0.5), jnp.int32(4), jnp.float32(0.97), jax.random.key(0)
    )
    hidden = jnp.ones((4000, 4))
    drawn = generate._pick(program, jnp.asarray(table), picking, hidden, jnp.int32(0))
    expected = probabilities**2 * [1, 1, 1, 0]  # a temperature of 0.5 squares them
    expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)


def test_complete_decodes() -> None:
    codec = Tokenizer("bytes", "")
    tokenizer = types.SimpleNamespace(
        vocab_size=VOCABULARY.size,
        end_of_text=256,
        start=[],
        encode=codec.encode,
        decode=codec.decode,
    )
    loaded: Any = types.SimpleNamespace(model=built().model, params=params(), tokenizer=tokenizer)
    texts = ["abc", "é", "xyzzy", "q"]
    ids = run([codec.encode(text) for text in texts])
    assert generate.complete(loaded, texts, options()) == [codec.decode(row) for row in ids]
    assert any("\ufffd" in codec.decode(row) for row in ids), "random bytes are not UTF-8"


def test_no_prompts_have_no_continuations() -> None:
    assert run([]) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1, 280]], "prompt 0 has token id 280; the vocabulary ends at 280"),
        ([[1], [3, -1]], "prompt 1 has token id -1"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**11},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-40},
        {"temperature": 1e39},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_bad_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        options(**change)
