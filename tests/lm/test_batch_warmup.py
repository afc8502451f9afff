"""Runs whose batch grows: compared with steps made by hand, killed and resumed, branched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm.config import UserError
from lm.data import loader, prepare
from lm.run import checkpoint
from lm.state import as_int
from tests.lm import lab as labs
from tests.lm import tiny
from tests.lm.lab import Lab

# Rows have 32 tokens. 4 steps take 1 row, 2 steps take 2, then each takes 4. So 12 steps hold as
# many tokens as 8 full batches.
CHANGES: dict[str, Any] = {
    "data.batch_warmup": {"first": 1, "length": "256 tokens", "rate_exponent": 0.5},
    "schedule": {"family": "wsd", "warmup": "0 tokens", "decay": "2 steps"},
    "run.length": "1024 tokens",
    "evaluate.every": "512 tokens",
    "checkpoint.every": "1 steps",
}
SIZES = [1] * 4 + [2] * 2 + [4] * 6


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Path:
    workdir = lab.root / "grown"
    if not workdir.exists():
        assert lab.run(workdir, CHANGES).finished
    return workdir


def test_records_of_a_growing_batch(whole: Path, lab: Lab) -> None:
    records = labs.records(whole)
    assert [line["step"] for line in records] == list(range(1, 13))
    assert [line["tokens"] for line in records] == (32 * np.cumsum(SIZES)).tolist()
    evaluated = [line["step"] for line in records if "eval/text/loss" in line]
    assert evaluated == [8, 12], "multiples of 512 tokens"
    rates = [line["lr/hidden"] for line in records]
    full = [rate / (size / 4) ** 0.5 for rate, size in zip(rates, SIZES, strict=True)]
    assert full[:10] == pytest.approx([full[9]] * 10, rel=1e-6), "the stable phase"
    assert full[11] < full[9]
    meta = labs.meta(whole)
    assert (meta.step, meta.tokens) == (12, 1024)


def test_the_run_equals_steps_made_by_hand(whole: Path, lab: Lab) -> None:
    """The run equals these steps, made one after another on rows of a stream of single rows."""
    config = lab.config(CHANGES)
    built = lab._build({"step": None, "score": None}, config, jax.devices())
    found = prepare.prepare(config.data, lab.root / "data", progress=False)
    token_bytes = built.put_replicated(np.pad(found.tokenizer.token_bytes, (0, 0)).astype(np.int32))
    state, numbers = built.init(config.seed), built.put_replicated(built.numbers)
    one = config.batches._replace(size=1, doublings=0)
    with loader.create(found, config.data, seed=config.seed, batches=one) as rows:
        for size in SIZES:
            parts = [next(rows) for _ in range(size)]
            batch = type(parts[0])(*(np.concatenate(x) for x in zip(*parts, strict=True)))
            state, _ = built.step(state, built.put(batch), token_bytes, numbers)
    assert as_int(state.rows) == sum(SIZES)
    assert as_int(state.tokens) == 32 * sum(SIZES)
    restored = checkpoint.restore(checkpoint.locate(whole), built.abstract_state).state
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("last", [1, 4, 5, 6, 9])
def test_resumed_is_uninterrupted(whole: Path, lab: Lab, tmp_path: Path, last: int) -> None:
    workdir = labs.copy(whole, tmp_path / "run", last)
    assert lab.run(workdir, CHANGES).finished
    labs.assert_equal_runs(workdir, whole)


def test_a_decay_branches_after_the_warmup_only(whole: Path, lab: Lab, tmp_path: Path) -> None:
    folder = whole / checkpoint.FOLDER
    branch = CHANGES | {"decay_from": str(folder / "8")}
    assert lab.run(tmp_path / "branch", branch).finished
    assert labs.meta(tmp_path / "branch").tokens == 512 + 2 * 128
    early = CHANGES | {"decay_from": str(folder / "5")}
    with pytest.raises(
        UserError, match=r"warmup of its run, which ends at step 6; name a later ch"
    ):
        lab.run(tmp_path / "early", early)
    late = CHANGES | {"decay_from": str(folder / "12")}
    with pytest.raises(UserError, match=r"decayed already, since step 10 of its run"):
        lab.run(tmp_path / "late", late)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.accumulation": 2}, "first=1 is not a multiple of run.accumulation=2"),
        ({"data.batch_size": 6}, "first=1 does not double to data.batch_size=6"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    own = {"data.batch_warmup": CHANGES["data.batch_warmup"]}
    with pytest.raises(UserError, match=message):
        tiny.config(own | changes)
