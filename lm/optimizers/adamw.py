"""AdamW: Adam (arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import optax

from lm.mapping import BELOW_ONE, POSITIVE
from lm.optimizers import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adamw(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      beta1: decay of the mean of gradients
      beta2: decay of the mean of their squares
      eps: added to the root of the second moment
    """

    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.95
    eps: Annotated[float, POSITIVE] = 1e-10

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        """Like optax's scale_by_adam, but where `good` is False, moments and count stay. Scalars
        make that choice: choosing between arrays after the update would read and copy them once
        more, at three times the cost on a CPU.
        """

        def update(
            updates: Any, state: Any, params: Any = None, *, good: jax.Array, **_: Any
        ) -> tuple[Any, optax.ScaleByAdamState]:
            def moment(decay: float, power: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
                keep, take = jnp.where(good, decay, 1.0), jnp.where(good, 1.0 - decay, 0.0)
                return lambda m, g: keep * m + take * g**power

            mu = jax.tree.map(moment(self.beta1, 1), state.mu, updates)
            nu = jax.tree.map(moment(self.beta2, 2), state.nu, updates)
            count = state.count + good.astype(jnp.int32)
            # Avoids a division by zero where a run begins with a skipped step.
            steps = jnp.maximum(count, 1)
            first, second = (1.0 / (1.0 - beta**steps) for beta in (self.beta1, self.beta2))
            updates = jax.tree.map(
                lambda m, v: m * first / (jnp.sqrt(v * second) + self.eps), mu, nu
            )
            return updates, optax.ScaleByAdamState(count, mu, nu)

        init = optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps).init
        return optax.GradientTransformationExtraArgs(init, cast(Any, update))
