"""Tables are read in three formats, and a bad table is an error of one line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.fits import table
from lm.laws.power import Power
from lm.mapping import UserError
from tests.lm.fits import sweeps

ROWS = sweeps.rows(Power(a=0.5, b=-0.4, c=0.5))[:40]
NEEDED = ("learning_rate", "loss", "tokens")


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "jsonl":
        return sweeps.write(path, rows)
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_is_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS, ROWS[0] | {"loss": None, "status": "diverged"}]
    read = table.read(written(tmp_path, kind, rows))
    assert len(read) == 41
    assert read.columns["loss"].dtype == np.float64
    assert read.columns["loss"][3] == ROWS[3]["loss"]
    assert np.isnan(read.columns["loss"][40])
    assert read.columns["mixer"][0] == "softmax"
    assert read.columns["compute"][0] == 6 * ROWS[0]["body_parameters"] * ROWS[0]["tokens"]
    done = read.finished(NEEDED)
    assert len(done) == 40
    assert done.left_out == ("1 of 41 rows are not done (diverged)",)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"lr": 0.1, "D": 5.0, "loss": 2.0}]
    path = written(tmp_path, "csv", rows)
    read = table.read(path, {"learning_rate": "lr", "tokens": "D"})
    assert read.finished(NEEDED).columns["tokens"][0] == 5.0
    with pytest.raises(UserError, match=r"--column=tokens=d: .* has did you mean 'D'|known"):
        table.read(path, {"tokens": "d"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": float("nan")}, "loss=nan in row 2, which is done; it must be a positive number"),
        ({"loss": None}, "loss=nan in row 2"),
        ({"tokens": 0}, "tokens=0.0 in row 2"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 in row 2"),
        ({"loss": float("inf")}, "loss=inf in row 2"),
        ({"loss": "high"}, "loss='high' is not a number"),
    ],
)
def test_invalid_numbers_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, "jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(UserError) as caught:
        table.read(path).finished(NEEDED)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_tables_are_refused(tmp_path: Path) -> None:
    cases = {
        "a.txt": ("", "ends in '.txt'; a table is one of .jsonl, .csv, .parquet"),
        "a.jsonl": ("", "holds no row"),
        "b.jsonl": ("{", "cannot read"),
        "c.jsonl": ("[1]", "a line is not an object"),
        "a.csv": ("loss,tokens\n", "holds no row"),
        "a.parquet": ("no", "cannot read"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            table.read(tmp_path / name)
        assert message in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        table.read(tmp_path / "absent.csv")


def test_missing_columns_and_unfinished_sweeps_are_refused(tmp_path: Path) -> None:
    rows = [{"learning_rate": 0.1, "los": 3.0}]
    with pytest.raises(UserError, match=r"no column 'loss' \(did you mean 'los'\?\); .*=loss=NAME"):
        table.read(written(tmp_path, "jsonl", rows)).finished(NEEDED)
    rows = [ROWS[0] | {"status": "diverged", "loss": None}]
    with pytest.raises(UserError, match="no row with status='done'; finish the sweep first"):
        table.read(written(tmp_path, "jsonl", rows)).finished(NEEDED)
