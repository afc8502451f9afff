"""A law is fitted to a table by its name; its page, its JSON and the terminal show the fit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from lm import families
from lm.fits import laws, table
from lm.fits.laws import Options
from lm.laws import Constant, Equation, Law, constants, log_linear
from lm.laws.chinchilla import Chinchilla
from lm.laws.power import Power
from lm.mapping import UserError
from lm.report import fit as page
from lm.report.fit import Found
from tests.lm.fits import sweeps

LAW = Power(a=0.5, b=-0.4, c=0.5)


def found(
    folder: Path, rows: Sequence[dict[str, Any]], name: str = "power", **options: Any
) -> Found:
    path = sweeps.write(folder / "table.jsonl", list(rows))
    law = laws.find(name)
    chosen = Options(bootstraps=100, **options)
    fits = laws.fit_table(law, table.read(path), chosen)
    return Found(name, str(path), law, laws.fitted_law(law, fits, chosen.hold), fits, chosen.hold)


def chinchilla_rows() -> list[dict[str, Any]]:
    """A sweep in which the middle of three rates is best for every (size, length)."""
    rows, law = [], Chinchilla(E=1.8, A=40.0, alpha=0.3, B=300.0, beta=0.35)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for width in (32, 64, 128, 256):
            for tokens in (1e6, 4e6, 16e6, 64e6):
                size = 12 * width**2 * 4
                for i, worse in enumerate((0.02, 0.0, 0.03)):
                    loss = law.loss(size, tokens) * (1 + worse + 1e-3 * rng.normal())
                    row = {"seed": seed, "width": width, "body_parameters": size, "tokens": tokens}
                    row |= {
                        "learning_rate": 1e-3 * 2**i,
                        "loss": loss,
                        "trunk": f"{seed}{width}{i}",
                    }
                    rows.append(row)
    return rows


def test_power(tmp_path: Path) -> None:
    rows = sweeps.rows(LAW)
    rows[0] |= {"loss": None, "status": "diverged"}
    made = found(tmp_path, rows)
    assert made.fitted == LAW.replaced(made.fits[0].values)
    text = "\n".join(page.sentences(made))
    assert "36 rows in 12 clusters that share no trunk (vertex)" in text
    assert "c = 1 is rejected: Wald t = -" in text
    assert "does not hold it" in text
    assert "the law is below eta_max=0.02 (its knee) after" in text
    assert "the rows have tokens from 1e+06 to 4e+06; tokens=1e+06 lies outside 2e+09" in text
    assert page.left_out(made) == ["1 of 324 rows are not done (diverged)"]
    (a, b, c) = page.rows(made)
    assert a[3:] == ["4", "3 to 5", "rate * token^-b", "P", "Shen et al. 2024, arXiv 2408.13359v2"]
    assert (b[0], b[1], c[0]) == ("b", "-0.4", "c")
    page.write(made, tmp_path / "fit.html")
    html = (tmp_path / "fit.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 4  # one is drawn a second time for phones
    for message in (
        "Each scale left out once",
        "token horizon, tokens^-0.4",
        "Step Law, tokens^0.307",
    ):
        assert message in html
    assert "<script" not in html
    values = json.loads(json.dumps(page.values(made), allow_nan=False))
    (equation,) = values["equations"]
    assert equation["values"]["c"] == made.fits[0].values["c"]
    assert equation["tests"][0]["is_inside"] is False
    assert equation["clusters"] == 12
    out = io.StringIO()
    page.show(made, Console(file=out, width=20))
    assert "Shen et al. 2024, arXiv 2408.13359v2" in out.getvalue()
    assert "left out: 1 of 324 rows" in out.getvalue()


def test_one_batch_and_a_held_exponent(tmp_path: Path) -> None:
    rows = [row for row in sweeps.rows(LAW, seeds=6) if row["batch_tokens"] == 8192]
    with pytest.raises(UserError, match="all 36 rows have batch_tokens=8192"):
        found(tmp_path, rows)
    made = found(tmp_path, rows, hold={"c": 0.5})
    assert made.fitted.replaced({"a": 1.0}) == Power(a=1.0, b=made.fits[0].values["b"], c=0.5)
    assert page.rows(made)[-1][:3] == ["c", "0.5", "held"]
    assert made.fits[0].tests == ()


def test_a_law_of_losses(tmp_path: Path) -> None:
    made = found(tmp_path, chinchilla_rows(), "chinchilla")
    assert made.fits[0].values["beta"] == pytest.approx(0.35, abs=0.05)
    assert len(made.fits[0].selected) == 32
    page.write(made, tmp_path / "fit.html")
    html = (tmp_path / "fit.html").read_text(encoding="utf-8")
    assert "best loss against tokens" in html
    assert "token horizon" not in html
    assert page.scales(made)[0][1] == "width=32"


def test_a_law_of_two_columns(tmp_path: Path) -> None:
    made = found(tmp_path, sweeps.rows(LAW), "step_law", selection="best", target="learning_rate")
    assert list(made.fits[0].values) == ["k", "alpha", "beta"]
    both = laws.equations(laws.find("step_law"), Options(hold={"gamma": 0.5}))
    assert [equation.names for equation in both] == [("k", "alpha", "beta"), ("h",)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("powr", {}, "LAW: unknown law 'powr'; did you mean 'power'?"),
        (
            "growth_timing",
            {},
            "law 'growth_timing' has no equation to fit; choose one of annealing, ",
        ),
        ("power", {"target": "loss"}, "--target=loss: the law predicts learning_rate"),
        ("power", {"selection": "all"}, "--select=all is not one of vertex, near, best, rows"),
        ("power", {"delta": -1.0}, "--delta=-1 must be positive, or 0 for the law's own"),
        ("power", {"hold": {"e": 1.0}}, "--hold=e=1: the constants of this law are a, b, c"),
        ("annealing", {}, "no column 'summed_rate'"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        found(tmp_path, sweeps.rows(LAW, seeds=1)[:30], name, **options)
    assert message in str(caught.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root(Law):
    """A law of a user: eta = k / sqrt(tokens)^p."""

    k: float = 1.0
    p: float = 1.0
    published: ClassVar[tuple[Constant, ...]] = constants(
        "nobody, 2026", {"tokens": (1e6, 1e7)}, ("k", 1.0, "rate", "P"), ("p", 1.0, "1", "P")
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        log_linear("learning_rate", "k", {"p": ("tokens", 1.0)}, delta=0.3, selection="vertex"),
    )


def test_a_law_of_an_installed_package_is_fitted_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = importlib.metadata.EntryPoint("root", f"{__name__}:Root", "espalier.laws")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda _: Root)
    monkeypatch.setattr(families, "_entry_points", lambda group: {"root": point})
    rows = [row for row in sweeps.rows(LAW, seeds=4) if row["batch_tokens"] == 8192]
    made = found(tmp_path, rows, "root")
    assert made.fits[0].values["p"] == pytest.approx(-0.4, abs=0.01)
    assert page.rows(made)[0][-1] == "nobody, 2026"
