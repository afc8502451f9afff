"""What each strategy of a split time axis needs of its own: heads that are exchanged, transition
maps of a state that hardly forgets, states sent in blocks.

test_time_axis tests what all strategies share.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import contract, dispatch
from kernels.blocks import Chunk
from kernels.primitives.rank_state import STATES
from kernels.primitives.state_scan import num_blocks
from kernels.shard import Placement
from launch.benchmarks.programs import Collective, collectives
from tests.kernels.contract_problem import (
    QUICK,
    a_case,
    assert_close,
    over_time,
    settings,
    sizes,
    tolerance,
)

TIME = 40
SIZES = sizes(TIME) | {"K": 12, "V": 20}  # for recurrences


def placement(ranks: int, strategy: str) -> Placement:
    mesh = jax.make_mesh((ranks,), ("sequence",), axis_types=(AxisType.Auto,))
    return Placement(mesh, {"T": ("sequence",)}, strategy, "contiguous")


def assert_split_equals_whole(
    name: str, inputs: Any, options: Any, place: Placement, blocks: Any = None
) -> None:
    """The output and the gradients of all inputs are those of one device."""

    def run(inputs: Any, place: Placement | None) -> tuple[jax.Array, Any]:
        given = {"form": "chunked", "options": options, "blocks": blocks, "placement": place}
        out, pull = jax.vjp(lambda inputs: dispatch.apply(name, inputs, **given)[0], inputs)
        random = np.random.default_rng(1)
        return out, pull(jnp.asarray(random.standard_normal(out.shape), out.dtype))

    got, want = (
        jax.jit(partial(run, place=to), compiler_options=QUICK)(inputs) for to in (place, None)
    )
    assert_close(got, want, tolerance(name, "chunked"), f"{name} on {place}")


@pytest.mark.parametrize(
    ("heads", "groups", "message"),
    [
        (12, 4, r"all_to_all: H=12 heads must be a multiple of 8 ranks"),
        (24, 12, r"all_to_all: G=12 heads must be a multiple of 8 ranks, or divide them"),
    ],
)
def test_heads_that_cannot_be_exchanged(heads: int, groups: int, message: str):
    case = a_case(TIME, dims=sizes(TIME) | {"H": heads, "G": groups})
    problem = contract.sample(dispatch.get("softmax"), case)
    place = placement(8, "all_to_all")
    with pytest.raises(ValueError, match=message):
        dispatch.apply("softmax", problem.inputs, form="chunked", placement=place)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_key_value_heads_are_exchanged(groups: int):
    """Four ranks with fewer key/value heads than ranks (heads are copied), as many, and more."""
    case = a_case(TIME, dims=sizes(TIME) | {"H": 8, "G": groups})
    inputs = contract.sample(dispatch.get("softmax"), case).inputs
    assert_split_equals_whole("softmax", inputs, {}, placement(4, "all_to_all"))


# (op, options, ranks) for every recurrence; the first setting of an op is fast.
RECURRENCES = [
    pytest.param(name, options, marks=[pytest.mark.slow] if i else [])
    for name in dispatch.names()
    if "scan" in [strategy.name for strategy in dispatch.get(name).sequence]
    for i, options in enumerate(settings(name))
]
RANKS = [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]


def recurrence(name: str, options: Any, time: int) -> dict[str, jax.Array]:
    """Inputs whose gates are near one, so that every later token sees what enters a rank."""
    case = a_case(time, options=options, dims=SIZES | {"T": time})
    inputs = contract.sample(dispatch.get(name), case).inputs
    gates = {key: 0.02 * x for key, x in inputs.items() if key in ("log_decay", "log_magnitude")}
    return inputs | gates


@pytest.mark.parametrize("strategy", ["states", "scan"])
@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_a_map_of_the_memory_that_is_near_the_identity(decay: str, strategy: str):
    """If tokens write little, every later token reads the state that entered its rank, so a wrong
    map changes the output. If the memory has forgotten that state, it would not.
    """
    options = {"decay": decay}
    inputs = recurrence("delta_rule", options, TIME)
    inputs = dict(inputs, beta=0.02 * inputs["beta"])
    assert_split_equals_whole("delta_rule", inputs, options, placement(8, strategy))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "options"), RECURRENCES)
def test_a_state_is_handed_on(name: str, options: Any, ranks: int):
    """The number of tokens of a rank (20, 10, 5) is not a multiple of the chunk."""
    inputs = recurrence(name, options, TIME)
    place = placement(ranks, "scan")
    assert_split_equals_whole(name, inputs, options, place, Chunk(length=8, sub=4))


def gradient(
    name: str, options: Any, place: Placement, remat: Callable[..., Any] = lambda call: call
) -> Callable[..., Any]:
    """A function of all inputs that returns a loss and the gradients of the inputs with one entry
    per token.
    """
    along = over_time(name, options)

    def loss(own: Any, inputs: Any) -> jax.Array:
        given = {"form": "chunked", "options": options, "placement": place}
        return jnp.sum(jnp.sin(dispatch.apply(name, inputs | own, **given)[0]))

    call = jax.value_and_grad(remat(loss))
    return lambda inputs: call({key: inputs[key] for key in along}, inputs)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "options"), RECURRENCES)
def test_a_rank_sends_blocks_of_one_state(name: str, options: Any, ranks: int):
    """Forward and backward, for any T: R + n - 2 messages, and nothing else."""
    call = gradient(name, options, placement(ranks, "scan"))
    given = (recurrence(name, options, time) for time in (TIME, 8 * TIME))
    each = {"gate": 1, "log_sum": 1, "modes": 2 * SIZES["N"]}
    transition = (dispatch.get(name).options | options).get("transition")
    numbers = SIZES["V"] if transition is None else each[transition]
    blocks = num_blocks(SIZES["V" if name == "delta_rule" else "K"], ranks)
    block = SIZES["B"] * SIZES["H"] * SIZES["K"] * numbers // blocks
    messages = ranks + blocks - 2
    for inputs in given:
        assert collectives(call, inputs) == [Collective("ppermute", 4 * block, messages)] * 2


@pytest.mark.parametrize(
    ("size", "ranks", "blocks"), [(128, 2, 4), (128, 8, 16), (96, 8, 24), (12, 8, 12), (7, 2, 1)]
)
def test_how_many_blocks(size: int, ranks: int, blocks: int):
    assert num_blocks(size, ranks) == blocks


@pytest.mark.parametrize(("strategy", "kind"), [("states", "all_gather"), ("scan", "ppermute")])
@pytest.mark.parametrize(("names", "passes"), [((STATES,), 2), ((), 3)])
@pytest.mark.parametrize("name", ["delta_rule", "gated_linear", "linear_scan"])
def test_remat_can_keep_what_ranks_sent(
    name: str, names: tuple[str, ...], passes: int, strategy: str, kind: str
):
    """States pass over the ranks once forward and once backward, and once more if they are
    recomputed.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    inputs = recurrence(name, options := settings(name)[0], TIME)
    call = gradient(name, options, placement(8, strategy), partial(jax.checkpoint, policy=policy))
    assert [sent.kind for sent in collectives(call, inputs)] == [kind] * passes
