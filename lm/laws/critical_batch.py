"""Critical batch: the batch up to which more tokens per step still save steps.

    Zhang et al. 2024 (arXiv 2410.21676)      B = k (N / 1e6)^p sequences of 512 tokens
    MiniCPM (arXiv 2404.06395)                B(L) = h / L^q tokens, L the loss on C4
    McCandlish et al. 2018 (arXiv 1812.06162) (S/S_min - 1)(E/E_min - 1) = 1, B_crit = E_min/S_min

and the gradient noise scale B_simple = tr(Sigma) / |G|^2, from gradient norms at two batch sizes.
The norm test (Lau et al. 2024, arXiv 2402.11215) asks whether a batch is large enough by the same
numbers. Step Law's batch is in step_law.py. It agrees with Zhang's and MiniCPM's within a factor of
about two, for models of 0.1 to 1 B parameters at Chinchilla's tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from lm.laws import RATE_DELTA, Constant, Equation, Law, constants, log_linear
from lm.mapping import POSITIVE, UserError

SEQUENCE_LEN = 512  # tokens per sequence, in which Zhang et al. count
# The theta of the norm test in the published command for CIFAR-10 (AdAdaGrad, 2402.11215) [C].
THETA = 0.5
_ZHANG = "Zhang et al. 2024, arXiv 2410.21676v4, constant rate with averaged weights"
_MINICPM = "MiniCPM, arXiv 2404.06395v3, models of 9M, 30M and 170M, cosine, rate 0.01"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalBatch(Law):
    k: Annotated[float, POSITIVE] = 93.20 * SEQUENCE_LEN
    p: float = 0.47
    h: Annotated[float, POSITIVE] = 1.21e9
    q: Annotated[float, POSITIVE] = 6.24

    published: ClassVar[tuple[Constant, ...]] = constants(
        _ZHANG,
        {"body_parameters": (85e6, 1.2e9)},
        ("k", 93.20 * SEQUENCE_LEN, "token at 1e6 parameters", "S"),
        ("p", 0.47, "1", "S"),
        ("k at 3.07e9 tokens", 621.341 * SEQUENCE_LEN, "token at 1e6 parameters", "S"),
        ("p at 3.07e9 tokens", 0.087, "1", "S"),
    ) + constants(
        _MINICPM,
        {"body_parameters": (9e6, 170e6)},
        ("h", 1.21e9, "token * (nat/token)^q", "P"),
        ("q", 6.24, "1", "P"),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        log_linear(
            "batch_tokens",
            "k",
            {"p": ("body_parameters", 1e6)},
            delta=RATE_DELTA,
            selection="near",
        ),
    )

    def batch(self, body_parameters: Any) -> Any:
        """Zhang's critical batch in tokens, for a model trained on Chinchilla's tokens."""
        return self.k * (body_parameters / 1e6) ** self.p

    def batch_of_loss(self, loss: Any) -> Any:
        """MiniCPM's batch in tokens, at a loss on C4 in nats per token."""
        return self.h / loss**self.q


def steps_at(batch: float, steps_min: float, critical: float) -> float:
    """Steps at `batch` to reach a loss that an infinite batch reaches in `steps_min`. `batch` and
    `critical` have the same unit.
    """
    return steps_min * (1.0 + critical / batch)


def examples_at(batch: float, examples_min: float, critical: float) -> float:
    """Examples to reach the same loss, in the unit of the batches. Small batches approach the least
    number, `examples_min`.
    """
    return examples_min * (1.0 + batch / critical)


def noise_scale(
    small: float, large: float, small_norm: float, large_norm: float
) -> tuple[float, float, float]:
    """|G|^2, tr(Sigma), and their ratio B_simple = tr(Sigma) / |G|^2, in the unit of the batches.

    `small_norm` and `large_norm` are the mean squared gradient norms over a small and over a large
    batch. The first two results are unbiased, and their ratio is not: average each of them over
    many steps before you divide.

    Raises:
      UserError: batches of equal size.
    """
    if small == large:
        raise UserError(f"batches of {small} and {large}: the noise scale needs two sizes")
    signal, noise = signal_and_noise(small, large, small_norm, large_norm)
    return signal, noise, noise / signal


def signal_and_noise(small: Any, large: Any, small_norm: Any, large_norm: Any) -> tuple[Any, Any]:
    """Like `noise_scale`, without the ratio, and also for arrays. Values are not finite if the
    sizes are equal.
    """
    signal = (large * large_norm - small * small_norm) / (large - small)
    return signal, (small_norm - large_norm) / (1.0 / small - 1.0 / large)


def norm_test(noise: Any, norm: Any, theta: float = THETA) -> Any:
    """The smallest batch at which the norm test holds: tr(Sigma) / B <= theta^2 |g|^2, in the unit
    of tr(Sigma). `norm` is the squared norm |g|^2 of the gradient. The batch that `norm` was
    measured at passes if it is at least this large. For a norm without noise this is
    B_simple / theta^2.
    """
    return noise / (theta**2 * norm)


def smoothed(numerator: Any, denominator: Any, memory: float) -> np.ndarray:
    """The ratio [S] of the running means of two logs [S], exponential over `memory` records and
    corrected for the start. (A ratio of two records is nearly all noise, and a mean of such ratios
    estimates nothing.) Values that are not finite are left out; the result is NaN where the mean of
    the denominator is not positive.
    """
    pairs = np.stack([np.asarray(numerator, float), np.asarray(denominator, float)])
    weight, means, keep, found = 0.0, np.zeros(2), 1.0 - 1.0 / memory, []
    for pair in pairs.T:
        if np.all(np.isfinite(pair)):
            weight, means = keep * weight + (1.0 - keep), keep * means + (1.0 - keep) * pair
        above, below = means / weight if weight else (np.nan, np.nan)
        found.append(above / below if below > 0 else np.nan)
    return np.array(found)
