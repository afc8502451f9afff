"""Sweeps made from known laws, for the tests of fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lm.fits.select import Selected
from lm.laws.power import Power

# The grid of the published law: 3 sizes x 7 lengths x 6 batches.
WIDTHS = (128.0, 256.0, 512.0)
TOKENS = tuple(2e9 * 2.0**i for i in range(7))
BATCHES = tuple(4096 * 2.0**i for i in range(4, 10))
NOISE = 0.2  # standard deviation of the logarithm of an optimum


def optima(law: Power, seed: int) -> Selected:
    """The best rate of every cell, with noise; the lengths of a (size, batch) share a trunk."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(WIDTHS, TOKENS, BATCHES, indexing="ij")
    width, tokens, batch = (axis.ravel() for axis in grid)
    rates = law.rate(batch, tokens) * np.exp(NOISE * rng.normal(size=len(width)))
    trunks = tuple(frozenset([f"{w:g} {b:g}"]) for w, b in zip(width, batch, strict=True))
    columns = {"learning_rate": rates, "tokens": tokens, "batch_tokens": batch, "width": width}
    return Selected(columns, trunks, ())


def rows(law: Power, *, seeds: int = 2, rates: int = 9) -> list[dict[str, Any]]:
    """The table of a sweep. In every cell the loss is a parabola in the log of the rate; its vertex
    is the rate of the law, shifted a little by the seed.
    """
    found = []
    for seed in range(seeds):
        for width in (64, 128):
            for batch in (8192, 16384, 32768):
                shift = 0.02 * np.sin(7.0 * seed + width + batch)
                for tokens in (1_000_000, 2_000_000, 4_000_000):
                    best = float(law.rate(batch, tokens)) * np.exp(shift)
                    for i in range(rates):
                        rate = 1e-4 * 2.0**i
                        loss = 3.0 + 1e5 / tokens + 0.02 * np.log(rate / best) ** 2
                        found.append(
                            {
                                "cell": f"{width}-{batch}-{tokens}-{i}-{seed}",
                                "trunk": f"{width}-{batch}-{i}-{seed}",
                                "seed": seed,
                                "learning_rate": rate,
                                "batch_tokens": batch,
                                "tokens": tokens,
                                "steps": tokens // batch,
                                "width": width,
                                "body_parameters": 12 * width**2,
                                "mixer": "softmax",
                                "schedule": "wsd",
                                "loss": float(loss),
                                "status": "done",
                                "data.batch_size": batch // 256,
                            }
                        )
    return found


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path
