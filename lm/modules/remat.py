"""What the backward pass keeps of the forward pass, and where; the rest is computed anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from kernels.primitives.rank_state import STATES
from lm.config import ModelConfig
from lm.parallel.matmul import PROJECTION

# Tensors that model.kept may name: the layer's input, its two norms, the output of the mixer's op,
# of the mixer, the two halves of a SwiGLU, the output of the feed-forward; and where the time axis
# is split, the states that ranks of a recurrence send each other.
NAMES = ("stream", "mixer_norm", "op", "mixer", "mlp_norm", "mlp_gate", "mlp_up", "mlp", STATES)
PLACES = ("device", "host")  # where a tensor of `kept` waits for the backward pass


def recomputed[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Elementwise work of which the backward pass keeps the inputs alone, whatever `model.remat`
    says. Left to itself a norm keeps its input several times over in float32, and a gate every
    factor of its derivative: in memory they cost more than they save in time.
    """
    return functools.wraps(function)(jax.checkpoint(function))


def remat_policy(config: ModelConfig) -> Any:
    """What `jax.checkpoint` keeps of a layer's forward pass; every tensor of `kept` is named where
    it is made (lm/modules).
    """
    policies = jax.checkpoint_policies
    if config.remat == "full":
        return policies.nothing_saveable
    if config.remat == "dots":
        # Inside the derivative rule of a split projection the policy sees no dot: they are named.
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
