"""What all rules of schedules share: options of warmup and decay, and checks of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import jax

from lm.families import SCHEDULES
from lm.mapping import POSITIVE, SHARE, Duration, Later, UserError
from lm.schedules._schedule import Fall, Phases, Run, Schedule, flat, halving

Shape = Literal["exponential", "linear", "sqrt", "cosine", "geometric", "half_life"]
HALF_LIFE = Duration(5000, "steps")  # MiniCPM's, 20 G tokens (arXiv 2404.06395) [P]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The base of every schedule. `can_branch`: whether a decay may begin at any checkpoint.
    `is_continuous`: whether the rate changes without jumps. `has_stable_phase`: whether there is a
    phase between warmup and decay.

    Attributes:
      peak_learning_rate: the largest learning rate, at the base width of muP
    """

    peak_learning_rate: Annotated[float, POSITIVE] = 0.02
    can_branch: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = True
    has_stable_phase: ClassVar[bool] = False

    def problem(self) -> str | None:
        """What is wrong with these options in themselves, in one line."""
        return None

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        """What is wrong with the options for a run of this length, or for a decay that branches
        from a trunk; asked before any device is touched.
        """
        if is_branch and not self.can_branch:
            name = SCHEDULES.name_of(type(self))
            return (
                f"decay_from with schedule.family={name!r}, which has no stable phase to branch "
                "from; set another family"
            )
        return None

    def schedule(self, run: Run) -> Schedule:
        """The learning rate for a run.

        Raises:
          UserError: the options contradict the run.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(Rule):
    """Linear warmup, a stable phase (`stable`), and a decay. The decay may branch from any
    checkpoint of the stable phase.

    Attributes:
      warmup: length of the linear rise from 0
      decay: length of the decay at the end of the run
      decay_shape: how the rate falls in the decay
      final_ratio: rate at the end of the decay over the rate at its start
      half_life: time in which a decay of shape half_life halves the rate, down to `final_ratio`
    """

    warmup: Duration = Duration(100_000, "tokens")
    decay: Duration = Duration(20, "percent")
    decay_shape: Shape = "exponential"
    final_ratio: Annotated[float, SHARE] = 0.0
    half_life: Annotated[Duration, POSITIVE, Later(HALF_LIFE)] = HALF_LIFE
    can_branch: ClassVar[bool] = True
    has_stable_phase: ClassVar[bool] = True

    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        """Tokens, float32 -> the learning rate between warmup and decay."""
        raise NotImplementedError

    def problem(self) -> str | None:
        if self.decay_shape == "geometric" and self.final_ratio == 0:
            return "decay_shape='geometric' never reaches final_ratio=0.0; set final_ratio=0.1"
        return None

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
            shape=self._shape(end - start, Run(end, run.tokens_per_step)),
            final_ratio=self.final_ratio,
        )

    def _shape(self, length: float, run: Run) -> str | Fall:
        if self.decay_shape != "half_life":
            return self.decay_shape
        half_life = self.half_life.tokens(
            run_tokens=run.tokens, tokens_per_step=run.tokens_per_step
        )
        return halving(length / half_life if half_life else math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Falling(Rule):
    """Linear warmup, then a fall (`shape`) to the horizon. There is no stable phase, so no decay
    can branch from a checkpoint.

    Attributes:
      warmup: length of the linear rise from 0
      horizon: end of the fall, counted from the start of the run, warmup included
      final_ratio: rate at the end of the fall over the peak
    """

    warmup: Duration = Duration(100_000, "tokens")
    horizon: Duration = Duration(100, "percent")
    final_ratio: Annotated[float, SHARE] = 0.0

    @property
    def shape(self) -> str | Fall:
        raise NotImplementedError

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        warmup_end, horizon = self.warmup.tokens(**lengths), self.horizon.tokens(**lengths)
        if horizon <= warmup_end:
            return (
                f"schedule.horizon={self.horizon} ends the decay at {horizon:.0f} tokens, within "
                f"schedule.warmup={self.warmup} of {warmup_end:.0f}; set a longer horizon or a "
                "shorter warmup"
            )
        return super().misfit(**lengths, is_branch=is_branch)

    def schedule(self, run: Run) -> Schedule:
        lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
        warmup_end, horizon = self.warmup.tokens(**lengths), self.horizon.tokens(**lengths)
        return Schedule(
            phases=Phases(warmup_end, warmup_end, horizon),
            peak=self.peak_learning_rate,
            stable=flat(self.peak_learning_rate),
            shape=self.shape,
            final_ratio=self.final_ratio,
        )


def branch_tokens(decay: Duration, decay_start: float, tokens_per_step: int) -> int:
    """Total tokens of a run that decays from a checkpoint at `decay_start` tokens.

    The decay is rounded up to whole steps. A percentage is of the whole branched run, decay_start
    plus the decay.
    """
    if decay.unit == "percent":
        assert 0 < decay.value < 100, f"{decay=}: `misfit` lets only (0, 100) percent through"
        tokens = decay_start * decay.value / (100.0 - decay.value)
    else:
        tokens = decay.tokens(run_tokens=decay_start, tokens_per_step=tokens_per_step)
    # A ratio such as 3.0000000000000004 means 3 steps.
    steps = max(1, math.ceil(round(tokens / tokens_per_step, 6)))
    return int(decay_start) + steps * tokens_per_step
