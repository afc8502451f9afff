"""Token counts are exact, and their float32 values are those that schedules have always got."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import state as state_lib


@pytest.mark.parametrize("per_step", [1, 96, 4096 * 3, 8 * 512, 4_194_304])
def test_a_count_is_exact_and_rounds_as_step_times_tokens_did(per_step: int) -> None:
    """For a million steps, the count is an exact integer, and its float32 value has the bits of
    float32(step) * per_step.
    """

    def body(counted: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return state_lib.added(counted, per_step), (counted, state_lib.as_float(counted))

    zero = jnp.asarray(state_lib.count(0))
    _, (words, rounded) = jax.jit(lambda x: jax.lax.scan(body, x, length=1_000_001))(zero)
    steps = np.arange(1_000_001)
    whole = np.asarray(words, np.int64)
    np.testing.assert_array_equal((whole[:, 0] << 24) + whole[:, 1], steps * per_step)
    before = steps.astype(np.float32) * np.float32(per_step)
    assert np.asarray(rounded).tobytes() == before.tobytes()


def test_a_count_from_the_host_and_back() -> None:
    for number in (0, 1, (1 << 24) - 1, 1 << 24, (1 << 40) + 5, (1 << 55) - 1):
        assert state_lib.as_int(state_lib.count(number)) == number
    large = state_lib.added(jnp.asarray(state_lib.count(1 << 40)), (1 << 31) + 7)
    assert state_lib.as_int(large) == (1 << 40) + (1 << 31) + 7
