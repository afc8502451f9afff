"""What the backward pass keeps of the forward pass, and where; the rest is recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from kernels.primitives.rank_state import STATES
from lm.config import ModelConfig
from lm.parallel.matmul import PROJECTION

# Tensors that model.kept may name: the layer's input, its two norms, the outputs of the mixer's op
# and of the mixer, the two halves of a SwiGLU, the output of the feed-forward. Where the time axis
# is split, also the states that the ranks of a recurrence send each other.
NAMES = ("stream", "mixer_norm", "op", "mixer", "mlp_norm", "mlp_gate", "mlp_up", "mlp", STATES)
PLACES = ("device", "host")  # where a tensor of `kept` waits for the backward pass


def recomputed[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Elementwise work of which the backward pass keeps only the inputs, whatever `model.remat`
    is. By default a norm would keep its input several times in float32, and a gate every factor of
    its derivative: these cost more memory than they save time.
    """
    return functools.wraps(function)(jax.checkpoint(function))


def remat_policy(config: ModelConfig) -> Any:
    """What `jax.checkpoint` keeps of a layer's forward pass. Every tensor that `kept` can name is
    named where it is computed (lm/modules).
    """
    policies = jax.checkpoint_policies
    if config.remat == "full":
        return policies.nothing_saveable
    if config.remat == "dots":
        # The policy sees no dot inside the custom derivative of a split projection; it has a name.
        dots = policies.dots_with_no_batch_dims_saveable
        return policies.save_from_both_policies(dots, policies.save_only_these_names(PROJECTION))
    places = {place: [n for n, p in config.kept.items() if p == place] for place in PLACES}
    if not places["host"]:
        return policies.save_only_these_names(*places["device"])
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=places["device"],
        names_which_can_be_offloaded=places["host"],
        offload_src="device",
        offload_dst="pinned_host",
    )
