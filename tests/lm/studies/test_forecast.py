"""Forecasts are made before a run, scored after it, and refused if they would prove nothing."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.benchmarks import tables
from lm import files, metrics
from lm.config import Config, Duration, UserError
from lm.fits.laws import Options
from lm.fits.table import Table, with_derived
from lm.laws.chinchilla import Chinchilla
from lm.laws.compute import Compute
from lm.report import forecast as shown
from lm.run import formats
from lm.studies import forecast
from lm.studies.forecast import Target
from tests.lm import lab, tiny
from tests.lm.lab import Lab

HEAD = {"command": "c", "commit": "0" * 40, "cpu": "x", "cores": 2}
LAW = Chinchilla(E=1.7, A=60.0, alpha=0.32, B=500.0, beta=0.36)
FEW = Options(bootstraps=200)


def table(seed: int, law: Chinchilla | Compute = LAW, noise: float = 3e-3, **others: Any) -> Table:
    """The best losses of four sizes at five lengths, three seeds each."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid([5e4, 2e5, 8e5, 3.2e6], [1e6, 2e6, 4e6, 8e6, 16e6], range(3), indexing="ij")
    size, tokens, seeds = (axis.ravel() for axis in grid)
    read = (size, tokens) if isinstance(law, Chinchilla) else (6 * size * tokens,)
    loss = law.loss(*read) * np.exp(noise * rng.normal(size=len(size)))
    trunks = np.array([f"{s:g} {k:g}" for s, k in zip(size, seeds, strict=True)], dtype=object)
    columns = {"body_parameters": size, "tokens": tokens, "seed": seeds, "loss": loss}
    columns |= {"trunk": trunks, "learning_rate": np.full(len(size), 0.01)}
    columns |= {name: np.array([value] * len(size)) for name, value in others.items()}
    return Table("sweep", with_derived(columns))


def target(**changes: Any) -> Target:
    run = Target("0" * 16, 12_000_000, 200_000_000, "softmax", 257, 32)
    return dataclasses.replace(run, **changes)


@pytest.mark.parametrize(
    ("name", "law"),
    [("chinchilla", LAW), ("compute", Compute(E=1.5, K=3e3, alpha=0.25))],
    ids=["chinchilla", "compute"],
)
def test_the_interval_holds_what_the_law_will_give(name: str, law: Any) -> None:
    run, inside = target(), 0
    truth = law.loss(*((run.body_parameters, run.tokens) if name == "chinchilla" else (1.44e16,)))
    rng = np.random.default_rng(1)
    for seed in range(8):
        made = forecast.make(name, table(seed, law), run, dataclasses.replace(FEW, seed=seed))
        assert made["low"] < made["loss"] < made["high"]
        inside += made["low"] <= truth * np.exp(3e-3 * rng.normal()) <= made["high"]
    assert inside >= 6
    assert made["times"] == pytest.approx(1.44e16 / (6 * 3.2e6 * 16e6))
    assert made["clusters"] == 12
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "given", "run", "message"),
    [
        ("chinchilla", {}, {"tokens": 20_000_000}, "4.69 times the 3.07e+14 of the largest fitted"),
        ("power", {}, {}, "law 'power' does not predict losses from body_parameters, compute"),
        ("annealing", {}, {}, "law 'annealing' does not predict losses"),
        ("chinchilla", {"mixer": "gla"}, {}, "rows of mixer=gla, and the run has mixer=softmax"),
        ("chinchilla", {"vocab": 300.0}, {}, "rows of vocab=300, and the run has vocab=257"),
        ("chinchilla", {"context": 64.0}, {}, "rows of context=64, and the run has context=32"),
    ],
)
def test_forecasts_that_are_refused(name: str, given: Any, run: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        forecast.make(name, table(0, **given), target(**run), FEW)
    assert message in str(caught.value)


def test_a_smaller_factor_and_no_interval() -> None:
    same = table(0, mixer="softmax", vocab=257.0, context=32.0)
    made = forecast.make("chinchilla", same, target(tokens=20_000_000), FEW, factor=4.0)
    assert made["times"] == pytest.approx(4.6875)
    with pytest.raises(UserError, match="needs its interval; set --bootstraps=1000"):
        forecast.make("chinchilla", same, target(), Options(bootstraps=0))


def test_rows_of_more_compute_can_be_left_out() -> None:
    """The run is too small for a forecast from the whole table, but large enough for one from its
    smaller rows.
    """
    run = target(tokens=20_000_000)
    made = forecast.make("chinchilla", table(0), run, FEW, most_compute=4.8e13)
    assert made["times"] >= 30
    assert made["largest_compute"] <= 4.8e13
    assert made["rows"] == 60 - 12
    assert "12 of 60 rows have more than 4.8e+13 FLOPs" in made["left_out"]
    with pytest.raises(UserError, match=r"most_compute=1 leaves no row of sweep, whose least has"):
        forecast.make("chinchilla", table(0), run, FEW, most_compute=1.0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    corpus = lab.write_corpus(tmp_path / "corpus")
    return tiny.config(lab.CHANGES | {"data.sources": lab.sources(corpus)})


def run_folder(folder: Path, config: Config, losses: tuple[float, float], **facts: Any) -> Path:
    """The part of a finished run that a score reads. Its mark says that the run began a day from
    now.
    """
    folder.mkdir()
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    with metrics.Writer(folder) as writer:
        for step in (config.run_steps // 2, config.run_steps):
            found = {f"eval/{n}/loss": x for n, x in zip(("text", "held"), losses, strict=True)}
            writer.write({"step": step, "tokens": step * config.tokens_per_step, **found})
    (folder / "config.json").write_text(json.dumps(formats.write(config)))
    (folder / "run.json").write_text(json.dumps({"started": later.isoformat()} | facts))
    mark = folder / files.MARK
    mark.write_text("launch.train\n")
    os.utime(mark, (later.timestamp(), later.timestamp()))
    return folder


def written(path: Path, config: Config, loss: float = 3.0) -> Path:
    made = forecast.make("chinchilla", table(0), target(digest=forecast.digest(config)), FEW)
    made |= {"loss": loss, "low": loss - 0.1, "high": loss + 0.1}
    forecast.write(path, HEAD, made)
    return path


def test_a_run_is_scored(tmp_path: Path, config: Config) -> None:
    path = written(tmp_path / "forecast.json", config)
    before = forecast.read(path)
    assert before["score"] is None
    assert shown.row(before)[8:] == ("not run yet", "", "")
    workdir = run_folder(tmp_path / "run", config, (2.9, 3.12), commit="c0ffee")
    after = forecast.score(path, workdir)
    assert after["score"]["loss"] == pytest.approx(3.01)
    assert after["score"]["error"] == pytest.approx(0.01)
    assert after["score"]["is_inside"] is True
    assert after["score"]["commit"] == "c0ffee"
    assert after["forecast"] == before["forecast"]
    assert forecast.read(path) == after
    text = tables.render(after)
    assert "| 2.9000 to 3.1000 |" in text
    assert "| 3.0100 | +0.0100 | yes |" in text
    with pytest.raises(UserError, match="is scored already"):
        forecast.score(path, workdir)
    other = written(tmp_path / "other.json", config, loss=3.5)
    assert forecast.score(other, workdir)["score"]["is_inside"] is False


def test_a_forecast_is_written_once_and_kept_as_it_is(tmp_path: Path, config: Config) -> None:
    path = written(tmp_path / "forecast.json", config)
    with pytest.raises(UserError, match=r"forecast.json is there, .* not written twice"):
        written(path, config, loss=2.0)
    values = json.loads(path.read_text())
    for change in ({"date": "2020-01-01T00:00:00+00:00"}, {"forecast": {"low": 0.0}}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match="was changed after it was written; restore it"):
            forecast.read(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a forecast"):
        forecast.read(path)


def test_runs_that_are_not_scored(tmp_path: Path, config: Config) -> None:
    path = written(tmp_path / "forecast.json", config)
    rate = dataclasses.replace(config.schedule, peak_learning_rate=0.017)
    others = (
        dataclasses.replace(config, schedule=rate),
        dataclasses.replace(config, seed=config.seed + 1),
    )
    for i, other in enumerate(others):
        workdir = run_folder(tmp_path / f"other{i}", other, (3.0, 3.0))
        with pytest.raises(UserError, match=r"configuration has digest \w+; the forecast is of"):
            forecast.score(path, workdir)
    early = run_folder(tmp_path / "early", config, (3.0, 3.0), started="2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match="before it: it is not a forecast of that run"):
        forecast.score(path, early)
    # run.json has the time of the last resume; the mark of the folder is older.
    resumed = run_folder(tmp_path / "resumed", config, (3.0, 3.0))
    os.utime(resumed / files.MARK, (0, 0))
    with pytest.raises(UserError, match="began 1970-01-01"):
        forecast.score(path, resumed)
    unfinished = run_folder(tmp_path / "unfinished", config, (3.0, 3.0))
    lines = (unfinished / metrics.FILE).read_text().splitlines(keepends=True)
    (unfinished / metrics.FILE).write_text(lines[0])
    with pytest.raises(UserError, match="is at step 6 of 12; finish that run first"):
        forecast.score(path, unfinished)
    bad = run_folder(tmp_path / "bad", config, (3.0, float("nan")))
    with pytest.raises(UserError, match="no finite validation loss"):
        forecast.score(path, bad)
    assert forecast.read(path)["score"] is None


def test_the_digest_is_that_of_the_run(config: Config) -> None:
    """It does not depend on what a resumed run may change, nor on the unit of a length. It does
    depend on the text.
    """
    own = forecast.digest(config)
    length = Duration(float(config.run_tokens), "tokens")
    for same in (
        dataclasses.replace(config, run=dataclasses.replace(config.run, length=length)),
        dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep_last=1)),
    ):
        assert forecast.digest(same) == own
    longer = dataclasses.replace(config.run, length=Duration(24.0, "steps"))
    assert forecast.digest(dataclasses.replace(config, run=longer)) != own
    corpus = Path(config.data.sources["text"].path).parent
    (corpus / "00.txt").write_text("another text")
    assert forecast.digest(config) != own


def test_a_target_counts_the_body(config: Config) -> None:
    run = forecast.target(config)
    assert run.tokens == config.run_tokens
    assert run.mixer == "softmax"
    assert (run.vocab, run.context) == (257, 32)
    width, ffn, layers = 32, 48, 2
    # q and out of four heads, k and v of two, three matrices of the feed-forward; norms.
    matrices = width * (2 * 32 + 2 * 16) + 3 * width * ffn
    assert run.body_parameters == pytest.approx(
        layers * matrices + (2 * layers + 1) * width, abs=64
    )


@pytest.mark.slow
def test_runs_are_a_table_and_a_real_run_is_scored(tmp_path: Path) -> None:
    """Real runs of three seeds at three lengths are fitted by a law of compute. A longer run is
    forecast, trained and scored.
    """
    place = Lab(tmp_path / "lab")
    lengths = {"schedule.decay": "25 percent", "evaluate.every": "100 percent"}
    runs = []
    for seed in range(3):
        for steps in (8, 12, 24):
            changes = lengths | {"seed": seed, "run.length": f"{steps} steps"}
            workdir = tmp_path / f"run-{seed}-{steps}"
            assert place.run(workdir, changes).finished
            runs.append(workdir)
    found = forecast.table_of(runs)
    assert len(found) == 9
    assert sorted(set(found.columns["tokens"])) == [128.0 * n for n in (8, 12, 24)]
    big = lengths | {"seed": 7, "run.length": "96 steps"}
    config = place.config(big)
    made = forecast.make("compute", found, forecast.target(config), FEW, factor=3.9)
    forecast.write(tmp_path / "forecast.json", HEAD, made)
    workdir = tmp_path / "big"
    # A run records its start in whole seconds.
    time.sleep(1.1)
    assert place.run(workdir, big).finished
    scored = forecast.score(tmp_path / "forecast.json", workdir)["score"]
    last = metrics.read(workdir)[-1]
    mean = (last["eval/text/loss"] + last["eval/held/loss"]) / 2
    assert scored["loss"] == pytest.approx(mean)
    assert scored["is_inside"] == (made["low"] <= mean <= made["high"])
