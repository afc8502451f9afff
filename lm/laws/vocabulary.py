"""Vocabulary: how many words a tokenizer should have (Tao et al. 2024, arXiv 2407.13623).

    tokens per character  f(V) = p ln(V)^2 + q ln(V) + r
    at compute C          N_nv = a_nv C^e_nv,  N_v = a_v C^e_v,  H = a_h C^e_nv
    loss                  L_u = E + A / N_nv^alpha + B / N_v^beta + G / D^gamma

N_nv and N_v count parameters outside and inside the vocabulary, H counts characters. L_u is the
loss minus that of a unigram model, which makes vocabularies comparable. Its N and D are in billions
(inferred: raw counts give no sensible loss). It is negative, so no logarithm can be fitted.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from lm.laws import Constant, Law, constants

LARGEST = 200_000  # words at which f is capped
# Approach 3: parameters outside the vocabulary -> the best number of words.
BEST = {3e9: 37e3, 7e9: 60e3, 13e9: 81e3, 30e9: 142e3, 70e9: 218e3, 300e9: 383e3}
_SOURCE = "Tao et al. 2024, arXiv 2407.13623v3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary(Law):
    p: float = 0.0064
    q: float = -0.1581
    r: float = 1.2047
    E: float = -5.533
    A: float = 1.831
    alpha: float = 0.447
    B: float = 0.196
    beta: float = 0.671
    G: float = 2.124
    gamma: float = 0.447

    published: ClassVar[tuple[Constant, ...]] = constants(
        _SOURCE,
        {"vocab": (0.0, LARGEST)},
        ("p", 0.0064, "token/character", "S"),
        ("q", -0.1581, "token/character", "S"),
        ("r", 1.2047, "token/character", "S"),
    ) + constants(
        _SOURCE,
        {},
        ("E", -5.533, "nat/token", "S"),
        ("A", 1.831, "nat/token * 1e9 parameters^alpha", "S"),
        ("alpha", 0.447, "1", "S"),
        ("B", 0.196, "nat/token * 1e9 parameters^beta", "S"),
        ("beta", 0.671, "1", "S"),
        ("G", 2.124, "nat/token * 1e9 tokens^gamma", "S"),
        ("gamma", 0.447, "1", "S"),
        ("factor of N_nv", 0.08, "parameter * FLOP^-0.5", "S"),
        ("exponent of N_nv", 0.50, "1", "S"),
        ("factor of N_v", 0.20, "parameter * FLOP^-0.42", "S"),
        ("exponent of N_v", 0.42, "1", "S"),
        ("factor of H", 6.42, "character * FLOP^-0.5", "S"),
        ("growth of N_v with N_nv", 0.83, "1", "S", 0.83, 0.84),
    )

    def tokens_per_character(self, vocab: Any) -> Any:
        """f(V) for a tokenizer of `vocab` words."""
        log = np.log(np.minimum(vocab, LARGEST))
        return self.p * log**2 + self.q * log + self.r

    def loss(self, body_parameters: Any, vocab_parameters: Any, tokens: Any) -> Any:
        """L_u: nats per token minus those of a unigram model."""
        n, v, d = (np.asarray(x) / 1e9 for x in (body_parameters, vocab_parameters, tokens))
        terms = self.A / n**self.alpha, self.B / v**self.beta, self.G / d**self.gamma
        return self.E + sum(terms)

    def at_compute(self, compute: float) -> tuple[float, float, float]:
        """The best N_nv, N_v and characters H at `compute` FLOPs (the fit at equal FLOPs)."""
        value = lambda name: self.constant(name).value
        nv, v = value("exponent of N_nv"), value("exponent of N_v")
        factors = [value(f"factor of {name}") for name in ("N_nv", "N_v", "H")]
        n, w, h = (f * compute**e for f, e in zip(factors, (nv, v, nv), strict=True))
        return n, w, h

    def best(self, body_parameters: float) -> float:
        """The best number of words (approach 3): linear in logarithms between the published sizes,
        and outside them on the line through the nearest two.
        """
        sizes, words = np.log(list(BEST)), np.log(list(BEST.values()))
        at = np.log(body_parameters)
        i = int(np.clip(np.searchsorted(sizes, at) - 1, 0, len(sizes) - 2))
        slope = (words[i + 1] - words[i]) / (sizes[i + 1] - sizes[i])
        return float(np.exp(words[i] + slope * (at - sizes[i])))

    def advice(self, vocab: float, body_parameters: float) -> str | None:
        """One sentence if the size of a tokenizer is more than a factor of two from the best."""
        best = self.best(body_parameters)
        if 0.5 <= vocab / best <= 2.0:
            return None
        return (
            f"vocab={vocab:.0f} is {max(vocab / best, best / vocab):.1f} times off the "
            f"{best:.0f} words that {_SOURCE} gives {body_parameters:.3g} parameters"
        )
