"""The regret of a setting that is not tuned: known cases, and the coverage of its interval."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.report import regret as page
from lm.studies import regret

RATES = (0.01, 0.02, 0.04)


def row(schedule: str, rate: float, seed: int, loss: float | None, tokens: int) -> dict[str, Any]:
    sizes = {"width": 32, "batch_tokens": 4096, "tokens": tokens}
    return {"schedule": schedule, "learning_rate": rate, "seed": seed, "loss": loss} | sizes


def table(
    noise: Any = lambda: 0.0, power: float = 2.05, seeds: range = range(6)
) -> list[dict[str, Any]]:
    """WSD reaches 2.0 at its best rate, which is the middle one at the first budget and the lowest
    at the second.
    """
    found = []
    for tokens, best in ((1000, 0.02), (2000, 0.01)):
        for seed in seeds:
            shared = noise()  # the same for all schedules of a seed
            found.append(row("power", 0.02, seed, power + shared + noise(), tokens))
            for rate in RATES:
                loss = 2.0 + 0.1 * abs(np.log2(rate / best)) + shared + noise()
                found.append(row("wsd", rate, seed, loss, tokens))
    return found


def diverged(schedule: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """The table without the losses of this schedule at these seeds."""
    lost = set(seeds)
    is_lost = lambda row: row["schedule"] == schedule and row["seed"] in lost
    return [row | {"loss": None if is_lost(row) else row["loss"]} for row in table()]


def test_without_noise_the_regret_is_the_difference() -> None:
    (found,) = regret.regrets(table(), "power", (0, 1))
    assert found.family == "wsd"
    assert found.seeds == (2, 3, 4, 5)
    assert [tuned.best for tuned in found.tuned.values()] == [0.02, 0.01]
    assert [budget.tokens for budget, tuned in found.tuned.items() if tuned.is_edge] == [2000]
    assert list(found.own.values()) == [2.05, 2.05]
    assert found.overall == pytest.approx((0.05, 0.05, 0.05))
    plain = regret.plain([found])
    json.dumps(plain, allow_nan=False)
    assert "+0.0500 (+0.0500 to +0.0500)" in page.table(plain)
    assert "0.01 (edge of its grid)" in page.table(plain)
    drawn = page.figure(plain, "power")
    assert drawn.count("tokens</text>") == 4  # a panel and a tick for each budget
    assert "power, one setting" in drawn


def test_a_rate_that_diverged_is_left_out_of_the_picture() -> None:
    rows = [*table(), *(row("wsd", 0.5, seed, None, 1000) for seed in range(6))]
    (found,) = regret.regrets(rows, "power", (0, 1))
    plain = regret.plain([found])
    assert plain[0]["budgets"][0]["losses"][-1] == [0.5, None]
    page.figure(plain, "power")


def test_the_interval_covers_the_regret() -> None:
    """In 400 simulated studies the rates are almost equally good, so that choosing one is mostly
    luck. The interval holds the true regret of the chosen rates in about 95 % of them.
    """
    rng = np.random.default_rng(0)
    is_held = []
    for _ in range(400):
        rows = table(lambda: 0.1 * rng.standard_normal())
        (found,) = regret.regrets(rows, "power", (0, 1))
        best = dict(zip(found.tuned, (0.02, 0.01), strict=True))
        chosen = [2.0 + 0.1 * abs(np.log2(found.tuned[x].best / best[x])) for x in best]
        truth = 2.05 - np.mean(chosen)
        is_held.append(found.overall.low <= truth <= found.overall.high)
    assert 0.92 < np.mean(is_held) < 0.98


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row has schedule 'power'"),
        ([r for r in table() if r["schedule"] == "power"], "no schedule but 'power'"),
        (
            [*table(), row("power", 0.5, 0, 2.0, 1000)],
            "power has 2 peak rates at width 32, 4096 tokens a step, 1,000 tokens",
        ),
        (
            [r for r in table() if (r["schedule"], r["tokens"]) != ("wsd", 2000)],
            "wsd has no row at width 32, 4096 tokens a step, 2,000 tokens",
        ),
        (table(seeds=range(1, 6)), r"wsd has 0 rates .* with the seeds \[0, 1\]"),
        ([*table(), table()[0]], r"two rows of power with rate 0.02 and seed 0 at width 32, 4096"),
        (diverged("wsd", range(6)), r"wsd diverged at every rate tried at width 32, 4096 tokens"),
        (diverged("wsd", [3]), r"seed 3 diverged at .* no mean regret against wsd; leave that"),
        (diverged("power", [3]), r"seed 3 diverged at width 32"),
        (table(seeds=range(5)), r"3 seeds beside \[0, 1\] .* needs 4"),
    ],
)
def test_tables_that_cannot_be_judged(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        regret.regrets(rows, "power", (0, 1))
