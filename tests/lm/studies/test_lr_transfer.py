"""Whether an optimum counts as moved, and what a study of that trains."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.lr_transfer.config import get_config
from lm.config import UserError
from lm.report import lr_transfer as page
from lm.studies import lr_transfer, sweep

RATES = (0.01, 0.02, 0.04, 0.08, 0.16)


def values(**changes: Any) -> dict[str, Any]:
    rates = {"mup": RATES, "standard": RATES}
    found = get_config("smoke").to_dict() | {"widths": (16, 32, 64), "learning_rates": rates}
    return found | changes


def rows(best: dict[tuple[str, int], float], seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """The loss rises by one nat for each bin between a rate and the best one."""
    return [
        {
            "model.pattern": "softmax",
            "mup.parametrization": name,
            "width": width,
            "learning_rate": rate,
            "seed": seed,
            "loss": None if rate == 0.16 and width == 64 else abs(RATES.index(rate) - at) + 1.0,
        }
        for (name, width), value in best.items()
        for at in [RATES.index(value)]
        for rate in RATES
        for seed in seeds
    ]


def judged(mup: tuple[float, ...], standard: tuple[float, ...]) -> list[lr_transfer.Transfer]:
    widths = (16, 32, 64)
    best = {("mup", w): rate for w, rate in zip(widths, mup, strict=True)}
    best |= {("standard", w): rate for w, rate in zip(widths, standard, strict=True)}
    return lr_transfer.judge(lr_transfer.create(values()), rows(best))


def test_an_optimum_that_stays_and_one_that_moves() -> None:
    mup, standard = judged((0.04, 0.04, 0.02), (0.08, 0.04, 0.02))
    assert (mup.shift, mup.cost, mup.is_as_expected) == (-1, 1.0, True)
    assert (standard.shift, standard.cost, standard.is_as_expected) == (-2, 2.0, True)
    mup, standard = judged((0.08, 0.04, 0.02), (0.04, 0.04, 0.02))
    assert [one.is_as_expected for one in (mup, standard)] == [False, False]


def test_an_optimum_at_the_edge_is_not_known() -> None:
    mup, _ = judged((0.01, 0.02, 0.02), (0.08, 0.04, 0.02))
    assert (mup.edges, mup.is_as_expected) == ([16], False)


def test_seeds_are_averaged_and_missing_curves_left_out() -> None:
    study = lr_transfer.create(values(seeds=(0, 1)))
    found = rows({("mup", 16): 0.02, ("mup", 32): 0.02, ("mup", 64): 0.02}, seeds=(0, 1))
    shifted = [row | {"loss": row["loss"] and row["loss"] + row["seed"]} for row in found]
    (one,) = lr_transfer.judge(study, shifted)
    assert one.losses[16][0.02] == 1.5
    assert lr_transfer.judge(study, [row for row in found if row["width"] != 64]) == []
    # A seed that is missing at one rate is left out at all rates.
    (one,) = lr_transfer.judge(study, shifted[:-1])
    assert one.losses[64][0.02] == 1.0


def test_what_is_shown() -> None:
    found = judged((0.04, 0.04, 0.02), (0.08, 0.04, 0.02))
    plain = json.loads(json.dumps(lr_transfer.plain(found), allow_nan=False))
    table = page.table(found)
    assert page.table(page.of_plain(plain)) == table
    assert "| softmax | mup | 16: 0.04, 32: 0.04, 64: 0.02 | -1 | 1.000 | as expected |" in table
    assert page.figure(found).count("width 16") >= 1


def test_the_trainings_of_a_study() -> None:
    study = lr_transfer.create(values(patterns=("softmax", "gla")))
    planned = sweep.plan(lr_transfer.sweep(study))
    assert len(planned) == 2 * 2 * 3 * len(RATES)
    configs = [one.config for one in planned.values()]
    standard = [c for c in configs if c.mup.parametrization == "standard"]
    assert len(standard) == len(configs) // 2
    assert {(c.model.width, c.model.num_heads) for c in configs} == {(16, 1), (32, 2), (64, 4)}


@pytest.mark.parametrize("preset", ["cpu", "gpu", "smoke"])
def test_the_presets(preset: str) -> None:
    lr_transfer.create(get_config(preset).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (16,)}, "give at least two, rising"),
        ({"widths": (32, 16)}, "give at least two, rising"),
        ({"patterns": ()}, "patterns is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"learning_rates": {}}, "learning_rates has nothing; give rates for mup and standard"),
        ({"learning_rates": {"ntk": RATES}}, "learning_rates has ntk"),
        ({"learning_rates": {"mup": RATES[:2]}}, "at least three positive rates, rising"),
        ({"learning_rates": {"mup": (0.0, *RATES)}}, "at least three positive rates, rising"),
        ({"learning_rates": {"mup": (0.01, 0.02, 0.03)}}, "give 0.01, 0.02, 0.04 for example"),
    ],
)
def test_a_study_that_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lr_transfer.create(values(**changes))


def test_the_run_of_a_study_is_under_mup() -> None:
    changed = values()
    changed["run"]["mup"]["parametrization"] = "standard"
    with pytest.raises(UserError, match="must be 'mup'; the study sets the other"):
        lr_transfer.create(changed)
