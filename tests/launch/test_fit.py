"""launch.fit as a process, and docs/laws.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks import tables
from lm.laws.power import Power
from lm.report import laws
from tests.lm.fits import sweeps

ROOT = Path(__file__).parents[2]


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.fit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = sweeps.rows(Power(a=0.5, b=-0.4, c=0.5))
    return sweeps.write(tmp_path_factory.mktemp("sweep") / "table.jsonl", rows)


def test_a_fit_writes_its_page_json_and_figure(sweep: Path, tmp_path: Path) -> None:
    out, summary, figure = (tmp_path / f"fit.{kind}" for kind in ("html", "json", "svg"))
    written = (f"--out={out}", f"--json={summary}", f"--figure={figure}")
    done = launched("power", str(sweep), *written, "--bootstraps=100", "--seed=3")
    assert done.returncode == 0, done.stderr
    assert "c = 1 is rejected" in done.stdout
    assert "power fitted to table.jsonl" in out.read_text()
    drawn = {path.name for path in (tmp_path / "fit_figures").iterdir()}
    assert "best_learning_rate_against_tokens.svg" in drawn
    assert len(drawn) + 1 == out.read_text().count("<svg"), "the wide one also for a phone"
    values = json.loads(summary.read_text())
    assert values["command"].startswith("espalier fit power ")
    assert len(values["commit"]) >= 40
    assert values["equations"][0]["bootstraps"] == 100
    message = tables.render(values)
    assert "| b | -0.4" in message
    assert "c = 1 is rejected" in message
    assert "token horizon, tokens^-0.4" in figure.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["power"], "name a law and a table"),
        (["power", "absent.jsonl"], "cannot read absent.jsonl: No such file or directory"),
        (["power", "TABLE", "--hold=c"], "--hold=c: write NAME=VALUE, as --hold=c=1"),
        (
            ["compute", "TABLE", "--figure=x.svg"],
            "--figure=x.svg: compute has no curve over tokens",
        ),
        (["power", "TABLE", "--hold=c=x"], "--hold=c=x is not a finite number"),
        (["power", "TABLE", "--hold=c=nan"], "--hold=c=nan is not a finite number"),
        (
            ["power", "TABLE", "--bootstraps=1"],
            "--bootstraps=1: an interval needs at least 100; set 1000",
        ),
    ],
)
def test_mistakes_are_one_line(sweep: Path, arguments: list[str], message: str) -> None:
    done = launched(*(str(sweep) if word == "TABLE" else word for word in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_docs_laws_is_up_to_date() -> None:
    written = (ROOT / "docs/laws.md").read_text(encoding="utf-8")
    assert written == laws.markdown(), "run espalier numbers"
    assert "| b | -0.51 | -0.53 to -0.49 | 1 | P |" in written
    assert (
        "`espalier fit step_law` fits `learning_rate` from `body_parameters` and `tokens`"
        in written
    )
