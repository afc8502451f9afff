"""Width parametrization: multipliers of init, learning rate, decay, logits and attention, per role.

With m = width / base_width, s = init_std (arXiv 2203.03466, in Cerebras-GPT's and Granite's form):

                           standard         mup
    hidden    init std     s                s / sqrt(m)     matrices of layers, routers, experts
              rate         eta              eta / m
    input     init std     s                s               embeddings
              rate         eta              eta
    output    as input                                      an untied head
    vector    as input                                      norms, biases
    attention logits       head_dim^-1/2    1 / head_dim
    logits                 1                1 / m           of the hidden states, before the head
    embedding, residual    1                constants of the config: Granite's 12 and 0.22
"""

from __future__ import annotations

import dataclasses
import math
import typing

from lm.config import Config
from lm.params import Role


class Decay(typing.Protocol):
    """What an optimizer says of weight decay."""

    @property
    def weight_decay(self) -> float: ...

    @property
    def weight_decay_mode(self) -> str: ...


ROLES: tuple[Role, ...] = typing.get_args(Role)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multipliers:
    """`width` is m, 1 under `standard`; `embedding` and `residual` multiply the output of the
    embedding and of each residual branch; `attention_exponent` is that of head_dim."""

    width: float
    embedding: float
    residual: float
    attention_exponent: float
    base_init_std: float

    @property
    def logits(self) -> float:
        """Multiplier of the hidden states before the head; Granite's `logits_scaling` inverted."""
        return 1.0 / self.width

    def attention_scale(self, head_dim: int) -> float:
        """Multiplier of q k."""
        return float(head_dim) ** self.attention_exponent

    def init_std(self, role: Role) -> float:
        return (
            self.base_init_std / math.sqrt(self.width) if role == "hidden" else self.base_init_std
        )

    def learning_rate(self, role: Role) -> float:
        """Factor of the schedule's value."""
        return 1.0 / self.width if role == "hidden" else 1.0

    def weight_decay(self, role: Role, *, config: Decay, peak: float) -> float:
        """Coefficient of a decaying parameter in the update, before learning_rate(role) * eta.

        The parameter's shrink per step is then
          coupled          eta * learning_rate(role) * weight_decay    hidden: m times less
          width_invariant  eta * weight_decay
          independent      eta / peak * weight_decay                   the schedule's form alone
        """
        rate = self.learning_rate(role)
        divisor = {"coupled": 1.0, "width_invariant": rate, "independent": rate * peak}
        return config.weight_decay / divisor[config.weight_decay_mode]


def create(config: Config) -> Multipliers:
    """The multipliers of a run."""
    mup = config.mup
    is_mup = mup.parametrization == "mup"
    return Multipliers(
        width=config.model.width / mup.base_width if is_mup else 1.0,
        embedding=mup.embedding_multiplier,
        residual=mup.residual_multiplier,
        attention_exponent=-1.0 if is_mup else -0.5,
        base_init_std=mup.init_std,
    )
