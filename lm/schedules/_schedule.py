"""What schedules share: phases, shapes of the decay, the product that joins them.

    eta(n) = ramp(n) * stable(clip(n, Nw, Ns)) * fall(n)     n: tokens before the update, float32
    ramp(n) = min(n / Nw, 1)
    fall(n) = 1 - (1 - r) * drop(x),  x = clip((n - Ns) / Nd, 0, 1),  r = final_ratio

Nw is the end of the warmup, Ns the start of the decay, Nd its length. So the warmup rises linearly
to stable(Nw), the decay starts at stable(Ns) and stays at its last value beyond its end. `ramp` is
exactly 1 after the warmup and `fall` exactly 1 before the decay: in between, not even the last bit
depends on how long the run is planned.

`drop` rises from 0 to 1. "exponential" is the affine exponential of the Power scheduler's published
code, f(x) = A e^-x + B with f(0) = 1, f(1) = r (arXiv 2408.13359); "sqrt" is the 1-sqrt of arXiv
2405.18392.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lm.families import SCHEDULES
from lm.mapping import POSITIVE, SHARE, Duration, UserError

DROPS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "exponential": lambda x: -jnp.expm1(-x) / np.float32(-math.expm1(-1.0)),
    "linear": lambda x: x,
    "sqrt": jnp.sqrt,
    "cosine": lambda x: jnp.square(jnp.sin(x * np.float32(math.pi / 2))),
}


class Run(NamedTuple):
    """Where a schedule is used. `decay_start`: tokens at the checkpoint from which a decay
    branches, at the value that the trunk had there; `tokens` then only measures a warmup given in
    percent.
    """

    tokens: float
    tokens_per_step: int
    decay_start: float | None = None


class Phases(NamedTuple):
    """Ends and starts of the phases in tokens; without a decay, decay_start equals decay_end. A
    phase shorter than a token is none.
    """

    warmup_end: float
    decay_start: float
    decay_end: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["warmup_end", "warmup_rate", "decay_start", "decay_rate", "stable"],
    meta_fields=["shape", "final_ratio", "has_warmup", "has_decay"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Curve:
    """tokens -> learning rate, both float32. Its float32 numbers are arguments of compiled code, so
    that schedules which differ in rates and lengths alone need no compilation of their own; that a
    phase is there, the shape of the decay and its final ratio are compiled in. Lengths come as
    1 / tokens, for the bits: so XLA divides by what it knows, but not by an argument.
    """

    warmup_end: Any
    warmup_rate: Any
    decay_start: Any
    decay_rate: Any
    stable: Partial
    shape: str
    final_ratio: float
    has_warmup: bool
    has_decay: bool

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        tokens = jnp.asarray(tokens, jnp.float32)
        rate = self.stable(jnp.clip(tokens, self.warmup_end, self.decay_start))
        if self.has_warmup:
            rate = rate * jnp.minimum(tokens * self.warmup_rate, 1.0)
        if self.has_decay:
            x = jnp.clip((tokens - self.decay_start) * self.decay_rate, 0.0, 1.0)
            factor = 1.0 - np.float32(1.0 - self.final_ratio) * DROPS[self.shape](x)
            # Rounding may end a hair below.
            rate = rate * jnp.maximum(factor, np.float32(self.final_ratio))
        return rate


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """tokens -> learning rate, both float32; works on arrays and under jit and vmap. `stable` is a
    `jax.tree_util.Partial` of a function of the numbers it depends on and of the tokens; a function
    that has its numbers inside works too, and is compiled for each schedule anew.
    """

    phases: Phases
    peak: float
    stable: Callable[[jax.Array], jax.Array]
    shape: str
    final_ratio: float

    @property
    def has_decay(self) -> bool:
        return self.phases.decay_end > self.phases.decay_start and self.final_ratio < 1.0

    def last_before_decay(self, tokens_per_step: int) -> int | None:
        """The last step at which the decay can still begin elsewhere: no update of it was made, and
        its first one is due. None without a decay.
        """
        start = self.phases.decay_start / tokens_per_step
        return int(start + 1e-6) if self.has_decay else None

    def is_decayed(self, tokens: float, tokens_per_step: int) -> bool:
        """Whether an update of the decay went into the weights at `tokens`. The last update was
        made at one step less, and at `decay_start` itself the factor of the decay is 1.
        """
        last, start = tokens / tokens_per_step - 1, self.phases.decay_start / tokens_per_step
        return self.has_decay and last > start + 1e-6

    @property
    def curve(self) -> Curve:
        warmup_end, decay_start, decay_end = self.phases
        inverse = lambda length: np.float32(1 if length >= 1 else 0) / np.float32(max(length, 1))
        return Curve(
            warmup_end=np.float32(warmup_end),
            warmup_rate=inverse(warmup_end),
            decay_start=np.float32(decay_start),
            decay_rate=inverse(decay_end - decay_start),
            stable=self.stable if isinstance(self.stable, Partial) else Partial(self.stable),
            shape=self.shape,
            final_ratio=self.final_ratio,
            has_warmup=warmup_end >= 1,
            has_decay=decay_end - decay_start >= 1,
        )

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        return self.curve(tokens)


def constant(rate: float) -> Partial:
    """A stable phase at this rate."""
    return Partial(_constant, np.float32(rate))


def _constant(rate: Any, tokens: jax.Array) -> jax.Array:
    return jnp.full_like(tokens, rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What every schedule has. `can_branch`: whether a decay may begin at any checkpoint."""

    peak_learning_rate: Annotated[float, POSITIVE] = 0.02
    can_branch: ClassVar[bool] = False

    def problem(self) -> str | None:
        """What is wrong with these options by themselves, in one line."""
        return None

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        """What is wrong with them in a run of this length, or as a decay that branches from a
        trunk; read before any device is touched.
        """
        if is_branch and not self.can_branch:
            name = SCHEDULES.name_of(type(self))
            return (
                f"decay_from with schedule.family={name!r}, which has no stable phase to branch "
                "from; set another family"
            )
        return None

    def schedule(self, run: Run) -> Schedule:
        """The learning rate of a run.

        Raises:
          UserError: values that contradict the run.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(Rule):
    """Linear warmup, a stable phase (`stable`), a decay of `decay_shape` to `final_ratio` times the
    value it starts from. The decay may branch from any checkpoint of the stable phase.
    """

    warmup: Duration = Duration(100_000, "tokens")
    decay: Duration = Duration(20, "percent")
    decay_shape: Literal["exponential", "linear", "sqrt", "cosine"] = "exponential"
    final_ratio: Annotated[float, SHARE] = 0.0
    can_branch: ClassVar[bool] = True

    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        """Tokens, float32 -> learning rate between warmup and decay."""
        raise NotImplementedError

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        decay = self.decay
        if is_branch:
            if decay.value > 0 and not (decay.unit == "percent" and decay.value >= 100):
                return None
            return f"schedule.decay={decay} with decay_from; set a decay > 0 (percent < 100)"
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        taken = self.warmup.tokens(**lengths) + decay.tokens(**lengths)
        if taken <= run_tokens:
            return None
        return (
            f"schedule.warmup={self.warmup} and schedule.decay={decay} take {taken:.0f} tokens, "
            f"run.length has {run_tokens}; shorten them"
            + ("" if self.warmup.unit == decay.unit == "percent" else " or lengthen the run")
        )

    def schedule(self, run: Run) -> Schedule:
        lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
        warmup_end = self.warmup.tokens(**lengths)
        if run.decay_start is None:
            start, end = float(run.tokens) - self.decay.tokens(**lengths), float(run.tokens)
        else:
            start = float(run.decay_start)
            end = float(branch_tokens(self.decay, start, run.tokens_per_step))
            if start < warmup_end:
                raise UserError(
                    f"decay_from has seen {start:.0f} tokens, schedule.warmup={self.warmup} ends "
                    f"at {warmup_end:.0f}; branch from a later checkpoint"
                )
        return Schedule(
            phases=Phases(warmup_end, start, end),
            peak=self.peak_learning_rate,
            stable=self.stable(run),
            shape=self.decay_shape,
            final_ratio=self.final_ratio,
        )


def branch_tokens(decay: Duration, decay_start: float, tokens_per_step: int) -> int:
    """Total tokens of a run that decays from a checkpoint at `decay_start` tokens.

    The decay is rounded up to whole steps; percent counts in the whole branched run, decay_start
    plus the decay.
    """
    if decay.unit == "percent":
        assert 0 < decay.value < 100, f"{decay=}: `misfit` lets only (0, 100) percent through"
        tokens = decay_start * decay.value / (100.0 - decay.value)
    else:
        tokens = decay.tokens(run_tokens=decay_start, tokens_per_step=tokens_per_step)
    # A ratio such as 3.0000000000000004 is 3 steps.
    steps = max(1, math.ceil(round(tokens / tokens_per_step, 6)))
    return int(decay_start) + steps * tokens_per_step
