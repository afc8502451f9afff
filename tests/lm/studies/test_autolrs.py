"""AutoLRS: what a search trains, how it resumes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lm import build as build_lib
from lm import metrics
from lm.config import Config, UserError, to_mapping
from lm.report import autolrs as page
from lm.run import checkpoint
from lm.studies import autolrs
from lm.studies.autolrs import Stage
from lm.studies.trainer import Trainer
from tests.lm import lab, tiny

pytestmark = pytest.mark.usefixtures("one_device")


def values(corpus: Path, **changes: Any) -> dict[str, Any]:
    schedule = {
        "family": "wsd",
        "peak_learning_rate": 0.5,
        "warmup": "2 steps",
        "decay": "4 steps",
        "decay_shape": "linear",
        "final_ratio": 0.0,
    }
    small = {"schedule": schedule, "run.length": "66 steps", "checkpoint.every": "100 percent"}
    text = {"text": lab.sources(corpus)["text"]}
    of_run = {key: x for key, x in lab.CHANGES.items() if not key.startswith("schedule.")}
    run = tiny.config(of_run | small | {"data.sources": text})
    numbers = {"lowest": 1e-3, "highest": 1e-1, "first_stage": 30, "longest_stage": 30, "probes": 3}
    numbers |= {"validation": 0, "anneal": 0}
    return {"run": to_mapping(run)} | numbers | changes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.write_corpus(tmp_path_factory.mktemp("autolrs") / "corpus")


def pretend(monkeypatch: pytest.MonkeyPatch, interrupts: Callable[[int], bool]) -> list[str]:
    """Replaces training; losses fall fastest at a rate of 0.02.

    Returns the names of the folders in which something was trained. Training number n is
    interrupted if `interrupts(n)`.
    """
    trained: list[str] = []
    calls = itertools.count()

    def call(self: Trainer, config: Config, workdir: Path, *, with_report: bool = False) -> bool:
        if interrupts(next(calls)):
            raise KeyboardInterrupt
        start = int(Path(config.decay_from).name) if config.decay_from else 0
        tokens = start * config.tokens_per_step if start else None
        end = build_lib.schedule_end(config, tokens) // config.tokens_per_step
        if checkpoint.steps(workdir) != [end]:
            trained.append(workdir.name)
        (workdir / checkpoint.FOLDER / str(end)).mkdir(parents=True, exist_ok=True)
        rate = config.schedule.peak_learning_rate
        speed = 0.0 if rate == autolrs.STILL else 0.01 - 1e-3 * abs(math.log(rate / 0.02))
        lines = [
            {"step": step, "tokens": 0, "train/nll": 5.0 - speed * (step - start)}
            for step in range(start + 1, end + 1)
        ]
        (workdir / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return True

    monkeypatch.setattr(Trainer, "train", call)
    return trained


def test_a_search_that_is_interrupted_is_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that is interrupted many times has the result of one that is not, and trains nothing
    twice.
    """
    search = autolrs.create(values(corpus, probes=6))
    assert autolrs.stages(search) == [(2, 32), (32, 62)]
    trained = pretend(monkeypatch, lambda n: False)
    found = autolrs.run(search, tmp_path / "whole", tmp_path)
    assert found is not None
    assert trained[-1] == "decay"
    assert all(0.01 < stage.rate < 0.04 for stage in found)
    again = pretend(monkeypatch, lambda n: n % 3 == 2)
    for attempt in range(20):
        try:
            other = autolrs.run(search, tmp_path / "cut", tmp_path)
            break
        except KeyboardInterrupt:
            assert attempt < 19
    assert other == found
    assert again == trained
    once_more = pretend(monkeypatch, lambda n: False)
    assert autolrs.run(search, tmp_path / "cut", tmp_path) == found
    assert once_more == []


@pytest.mark.parametrize(("validation", "anneal"), [(0, 0), (256, 0), (256, 3)])
def test_a_search_that_trains(corpus: Path, tmp_path: Path, validation: int, anneal: int) -> None:
    run = values(corpus)["run"]
    run["run"] |= {"length": "66 steps"}
    measured = {"validation": validation, "anneal": anneal}
    search = autolrs.create(values(corpus, run=run, probes=2, **measured))
    whole = tmp_path / "whole"
    found = autolrs.run(search, whole, tmp_path / "data")
    assert found is not None
    rates = {line["step"]: line["lr/input"] for line in metrics.read(whole / "stage-001")}
    assert set(rates) == set(range(33, 63))
    assert all(rate == pytest.approx(found[1].rate) for rate in rates.values())
    last = metrics.read(whole / "decay")
    assert [line["step"] for line in last] == [63, 64, 65, 66]
    assert last[1]["lr/input"] == pytest.approx(0.75 * found[1].rate)
    assert autolrs.loss(whole) == last[-1]["eval/text/loss"]
    assert autolrs.loss(whole / "no decay") is None
    assert all(stage.rate in stage.rates for stage in found)
    assert not list(whole.glob("probe-*")), "probes leave nothing"
    assert not checkpoint.steps(whole / "stage-000"), "nothing begins there any more"


@pytest.mark.parametrize(
    ("losses", "message"),
    [([4.9, 4.8, 4.7, 4.6], (-1.5, -0.4)), ([5.1, 4.9, 4.8, 4.7], -0.3), ([4.0, 6.0], 1.0)],
)
def test_a_probe_on_held_out_text(corpus: Path, tmp_path: Path, losses: Any, message: Any) -> None:
    """If its losses all lie below the loss at its beginning, a probe's loss is forecast. Otherwise
    its last loss counts.
    """
    work = autolrs._Work(
        autolrs.create(values(corpus, validation=256)), cast(Any, None), tmp_path, Trainer(tmp_path)
    )
    for name, of in (("still", [5.0] * len(losses)), ("probe", losses)):
        steps = [34 + 2 * i for i in range(len(of))]
        lines = [
            {"step": at, "tokens": 0, "eval/text/loss": x} for at, x in zip(steps, of, strict=True)
        ]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / metrics.FILE).write_text(text)
    found = work._change(1, Stage(32, 62, (), (), 0.0), tmp_path / "probe", tmp_path / "still")
    if isinstance(message, tuple):
        assert message[0] < found < message[1]
    else:
        assert found == pytest.approx(message)


def test_probes_that_diverge_are_not_chosen(corpus: Path, tmp_path: Path) -> None:
    run = values(corpus)["run"]
    run["optimizer"] |= {"max_skipped": 2}
    run["run"] |= {"length": "36 steps"}
    search = autolrs.create(values(corpus, run=run, lowest=1e-2, highest=1e38))
    found = autolrs.run(search, tmp_path / "a", tmp_path / "data")
    assert found is not None
    assert None in found[0].forecasts
    assert found[0].rate == min(found[0].rates)
    search = autolrs.create(values(corpus, run=run, lowest=1e36, highest=1e38))
    with pytest.raises(UserError, match="every probe of the stage from step 2 on diverged"):
        autolrs.run(search, tmp_path / "b", tmp_path / "data")


def test_another_search_in_the_folder(corpus: Path, tmp_path: Path) -> None:
    asked = {"lowest": 1.0}
    (tmp_path / "search.json").write_text(json.dumps({"asked": asked, "stages": []}))
    with pytest.raises(UserError, match="holds another search"):
        autolrs.run(autolrs.create(values(corpus)), tmp_path, tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(UserError, match="remove the folder to search again"):
        autolrs.run(autolrs.create(values(corpus)), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowest": 0.0}, "set 0 < lowest < highest"),
        ({"highest": 1e-4}, "set 0 < lowest < highest"),
        ({"probes": 1}, "needs at least 2"),
        ({"validation": -1}, "validation=-1 tokens must be >= 0"),
        ({"anneal": 5}, "measured on held-out text; set validation=16384 or more tokens, or"),
        ({"first_stage": 20}, "set 30 <= first_stage <= longest_stage"),
        ({"longest_stage": 20}, "set 30 <= first_stage <= longest_stage"),
        ({"first_stage": 61, "longest_stage": 61}, "leave 60 of 66 steps, first_stage is 61"),
    ],
)
def test_a_search_that_is_refused(corpus: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        autolrs.create(values(corpus, **changes))


def test_runs_that_cannot_be_searched(corpus: Path) -> None:
    run = values(corpus)["run"]
    with pytest.raises(UserError, match="set init_from and decay_from to"):
        autolrs.create(values(corpus, run=run | {"init_from": "x"}))
    cosine = {"family": "cosine", "warmup": "2 steps"}
    schedule = {"horizon": "100 percent", "final_ratio": 0.0, "peak_learning_rate": 0.1}
    with pytest.raises(UserError, match="set schedule=wsd"):
        autolrs.create(values(corpus, run=run | {"schedule": cosine | schedule}))


def test_stages_double_and_the_last_takes_what_is_left(corpus: Path) -> None:
    run = values(corpus)["run"]
    run["run"] |= {"length": "506 steps"}
    search = autolrs.create(values(corpus, run=run, longest_stage=120))
    ends = (2, 32, 92, 212, 332, 452, 502)
    assert autolrs.stages(search) == list(itertools.pairwise(ends))


def test_what_is_shown() -> None:
    found = [
        Stage(2, 32, (0.1, 0.01), (-0.5, None), 0.1),
        Stage(32, 62, (0.1,), (0.5,), 0.0),
    ]
    assert "| 2-32 | 0.1 | -0.500 | 2 | 1 |" in page.table(found)
    assert "<svg" in page.figure(found)
    kept = json.loads(json.dumps(page.plain(found, 2.5)))
    assert (
        page.summary(kept)
        == f"{page.table(found)}\nValidation loss after the decay: 2.5000 nats a token.\n"
    )
    assert page.summary(kept | {"loss": None}) == page.table(found)
