"""Parametrizations: multipliers for init, learning rate, decay, logits, attention and branches.

With m = width / base_width, s = init_std (arXiv 2203.03466, in Cerebras-GPT's and Granite's form):

                           standard         mup
    hidden    init std     s                s / sqrt(m)     matrices of layers, routers, experts
              rate         eta              eta / m
    input     init std     s                s               embeddings, the way back from a low rank
              rate         eta              eta
    output    as input                                      an untied head
    vector    as input                                      norms, biases
    attention logits       head_dim^-1/2    1 / head_dim
    logits                 1                1 / m           of the hidden states, before the head
    embedding, residual    1                constants of the config: Granite's 12 and 0.22

The rate of hidden matrices is Adam's. An optimizer that measures its update by a norm of the matrix
has another power of m (`Optimizer.width_exponent`).

CompleteP (Dey et al. 2025, arXiv 2505.01618, branch code read [C]) extends muP to the depth, with
m_L = num_layers / base_depth and alpha from 1/2 to 1:

    branches of layers                      * m_L^-alpha
    rate of all parameters of layers        * m_L^(alpha - 1)
    eps of the optimizer                    / m; for parameters of layers / (m m_L^alpha)
    weight decay of hidden matrices         * m, so that the coupled shrink does not fall with m
"""

from __future__ import annotations

import dataclasses
import math
import typing

from lm.config import Config
from lm.params import ParamInfo, Role

IN_LAYERS = "layer_"  # prefix of a parameter group: parameters inside layers, under CompleteP


class Decay(typing.Protocol):
    """What an optimizer states about weight decay."""

    @property
    def weight_decay(self) -> float: ...

    @property
    def weight_decay_mode(self) -> str: ...

    decay_inside: typing.ClassVar[bool]


ROLES: tuple[Role, ...] = typing.get_args(Role)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multipliers:
    """`width` is m, 1 under `standard`. `embedding` and `residual` multiply the output of the
    embedding and of each residual branch. `attention_exponent` is the exponent of head_dim.
    `width_exponent` and `is_scale_free` are the optimizer's. `depth` is m_L under CompleteP and
    None otherwise; `alpha` is its exponent.
    """

    width: float
    embedding: float
    residual: float
    attention_exponent: float
    base_init_std: float
    width_exponent: float
    is_scale_free: bool
    depth: float | None = None
    alpha: float = 1.0

    @property
    def logits(self) -> float:
        """Multiplier of the hidden states before the head; Granite's `logits_scaling` inverted."""
        return 1.0 / self.width

    @property
    def scales_eps(self) -> bool:
        """Whether the optimizer's eps follows the size of gradients."""
        return self.depth is not None

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the parameter groups that have their own learning rate and decay."""
        in_layers = tuple(f"{IN_LAYERS}{role}" for role in ROLES if role != "hidden")
        return ROLES if self.depth is None else ROLES + in_layers

    def group(self, info: ParamInfo) -> str:
        """The group of a parameter, which is its role. CompleteP keeps parameters in layers apart
        from the others, except for hidden matrices, all of which are in layers.
        """
        is_apart = self.depth is not None and info.is_stacked and info.role != "hidden"
        return f"{IN_LAYERS}{info.role}" if is_apart else info.role

    def attention_scale(self, head_dim: int) -> float:
        """Multiplier of q k."""
        return float(head_dim) ** self.attention_exponent

    def init_std(self, role: Role) -> float:
        return (
            self.base_init_std / math.sqrt(self.width) if role == "hidden" else self.base_init_std
        )

    def gradient(self, group: str) -> float:
        """The size of a gradient's entries relative to the base model's: it has passed backward
        through the logits' multiplier, and in layers also through the branch's multiplier.
        """
        in_layers = self.depth is not None and _is_in_layers(group)
        return 1.0 / self.width / ((self.depth or 1.0) ** self.alpha if in_layers else 1.0)

    def learning_rate(self, group: str) -> float:
        """The factor on the schedule's value."""
        factor = 1.0
        if group == "hidden":
            factor = 1.0 / self.width**-self.width_exponent
        elif group.endswith("vector") and not self.is_scale_free:
            factor = 1.0 / self.gradient(group)
        if self.depth is not None and _is_in_layers(group):
            factor *= self.depth ** (self.alpha - 1.0)
        return factor

    def weight_decay(self, group: str, *, config: Decay, peak: float) -> float:
        """The weight decay coefficient in the update, before learning_rate(group) * eta is applied.

        The parameter's shrink per step is then
          coupled          eta * learning_rate(group) * weight_decay   m times less for hidden ones,
                                                                       except under CompleteP
          width_invariant  eta * weight_decay
          independent      eta / peak * weight_decay                   depends on the schedule's
          shape
        """
        if config.decay_inside:
            return config.weight_decay
        rate = self.learning_rate(group)
        invariant = self.depth is not None and group == "hidden"
        coupled = self.width**self.width_exponent if invariant else 1.0
        divisor = {"coupled": coupled, "width_invariant": rate, "independent": rate * peak}
        return config.weight_decay / divisor[config.weight_decay_mode]


def _is_in_layers(group: str) -> bool:
    return group == "hidden" or group.startswith(IN_LAYERS)


def create(config: Config) -> Multipliers:
    """The multipliers of a run."""
    mup = config.mup
    has_width = mup.parametrization != "standard"
    depth = None
    if mup.parametrization == "completep":
        depth = config.model.num_layers / mup.base_depth
    return Multipliers(
        width=config.model.width / mup.base_width if has_width else 1.0,
        embedding=mup.embedding_multiplier,
        residual=mup.residual_multiplier * (depth or 1.0) ** -mup.alpha,
        attention_exponent=-1.0 if has_width else -0.5,
        base_init_std=mup.init_std,
        width_exponent=config.optimizer.width_exponent,
        is_scale_free=config.optimizer.is_scale_free,
        depth=depth,
        alpha=mup.alpha,
    )
