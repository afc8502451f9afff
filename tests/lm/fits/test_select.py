"""Which rows a law is fitted to: vertices, near-optimal sets, best losses, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lm.fits import select, table
from lm.fits.table import Table
from lm.laws.power import Power
from lm.mapping import UserError
from tests.lm.fits import sweeps

LAW = Power(a=0.5, b=-0.4, c=0.5)


def made(rows: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: table._column([row.get(name) for row in rows]) for name in names}
    return Table("sweep", table.with_derived(columns))


def test_the_vertex_of_a_parabola_is_exact() -> None:
    found = select.select(made(sweeps.rows(LAW)), "vertex")
    columns = found.columns
    assert len(found) == 2 * 2 * 3 * 3
    shift = np.sin(7 * columns["seed"] + columns["width"] + columns["batch_tokens"])
    truth = LAW.rate(columns["batch_tokens"], columns["tokens"]) * np.exp(0.02 * shift)
    np.testing.assert_allclose(columns["learning_rate"], truth, rtol=1e-9)
    np.testing.assert_allclose(columns["loss"], 3.0 + 1e5 / columns["tokens"], rtol=1e-12)
    assert found.left_out == ()
    # The lengths of a (width, batch, seed) come from the same trunks.
    assert len(np.unique(select.clusters(found.trunks))) == 2 * 3 * 2


def test_an_optimum_on_the_edge_is_left_out_and_named() -> None:
    rows = [row for row in sweeps.rows(LAW) if row["learning_rate"] < 8e-3]
    given = made(rows)
    found = select.select(given, "vertex")
    assert 0 < len(found) < 36
    assert len(found) + len(found.left_out) == 36
    assert (
        "the lowest loss is at the largest learning_rate=0.0064; train larger ones"
        in (found.left_out[0])
    )
    # The message names a cell by the columns that differ between cells, and by no others.
    assert found.left_out[0].startswith("width=64, body_parameters=4.915e+04, tokens=1e+06, batch")
    assert "mixer" not in found.left_out[0]
    kept = [row for row in rows if row["learning_rate"] < 3e-4 and row["tokens"] == 1_000_000]
    with pytest.raises(UserError, match=r"nothing remains of 24 rows .* 2 learning rates"):
        select.select(made(kept), "vertex")


def test_a_diverged_neighbor_is_an_edge() -> None:
    rows = [row for row in sweeps.rows(LAW, seeds=1) if row["tokens"] == 1_000_000]
    rows = [row for row in rows if row["width"] == 64 and row["batch_tokens"] == 8192]
    best = min(rows, key=lambda row: row["loss"])
    split = lambda row: row["learning_rate"] > best["learning_rate"]
    diverged = [row | {"status": "diverged", "loss": None} for row in rows if split(row)]
    with pytest.raises(UserError, match=r"next to the diverged 0.0064; train rates between them"):
        select.select(made([row for row in rows if not split(row)]), "vertex", made(diverged))


def test_rows_near_the_best_are_chosen() -> None:
    """Rows are compared within a (width, tokens, seed), over all batches and rates."""
    given = made(sweeps.rows(LAW))
    found = select.select(given, "near")
    lowest = 3.0 + 1e5 / found.columns["tokens"]
    assert (found.columns["loss"] <= 1.0025 * lowest * 1.001).all()
    assert len(found) > 3 * 12
    best = select.select(given, "best")
    assert len(best) == 12  # 2 widths, 3 lengths, 2 seeds
    assert (best.columns["loss"] < lowest.max() * 1.002).all()


@pytest.mark.parametrize("way", ["near", "best"])
def test_a_cell_whose_best_rate_is_the_largest_is_left_out(way: Any) -> None:
    rows = [row for row in sweeps.rows(LAW) if row["learning_rate"] < 3e-3]
    with pytest.raises(UserError, match=r"nothing remains of .* the largest learning_rate=0.0016"):
        select.select(made(rows), way)


def test_a_fixed_recipe_has_no_edge() -> None:
    rows = [row for row in sweeps.rows(LAW) if row["learning_rate"] == 1e-4]
    assert len(select.select(made(rows), "best")) == 12
    assert len(select.select(made(rows), "rows")) == len(rows)


def test_the_first_of_equal_losses_is_the_lowest() -> None:
    rows = [{"learning_rate": r, "loss": l} for r, l in ((1, 4), (2, 3), (4, 3), (8, 3))]
    assert len(select.select(made(rows), "vertex")) == 1
    with pytest.raises(UserError, match="at the smallest learning_rate=1; train smaller ones"):
        select.select(made([row | {"loss": 3.0} for row in rows]), "vertex")


def test_seeds_of_one_rate_are_averaged_where_no_column_tells_them_apart() -> None:
    pairs = ((1.0, 3.0), (2.0, 1.0), (2.0, 3.0), (4.0, 3.0))
    rows = [{"learning_rate": rate, "loss": loss} for rate, loss in pairs]
    found = select.select(made(rows), "vertex")
    assert found.columns["learning_rate"][0] == pytest.approx(2.0)
    assert found.columns["loss"][0] == pytest.approx(2.0)
    assert found.trunks == (frozenset({"row 0", "row 1", "row 2", "row 3"}),)


def test_clusters_are_joined_by_chains_of_trunks() -> None:
    sets = [frozenset(x) for x in ("ab", "c", "bd", "de", "f", "c")]
    assert select.clusters(sets).tolist() == [0, 1, 0, 0, 2, 1]
