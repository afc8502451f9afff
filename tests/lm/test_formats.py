"""Run folders that earlier commits wrote (tests/lm/formats/make.py) are resumed, branched from,
loaded and evaluated, with the results of the commit that wrote them.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import pytest

import lm
from lm import metrics, report, train
from lm.data import prepare
from lm.evals import Given
from lm.evaluation import evaluate, generate
from lm.evaluation.generate import GenerateOptions
from lm.evaluation.scoring import Scorer
from lm.parallel import mesh
from lm.run import checkpoint
from lm.train import Options
from tests.lm import lab
from tests.lm.formats import make

FORMATS = Path(__file__).parent / "formats"
NUMBERS = json.loads((FORMATS / "numbers.json").read_text(encoding="utf-8"))
# The numbers come from XLA's default emitters, which tests/conftest.py turns off.
IS_SAME = make.cpu() == NUMBERS["cpu"] and "disable_new_fusion" not in os.environ["XLA_FLAGS"]
# The relative tolerance on another processor, which may add in another order. Between the vector
# widths of SSE4.2, AVX2 and AVX-512 no number of these runs differs by more than 2e-7. A batch or a
# learning rate that is one step off changes them by more than 1e-3.
TOLERANCE = 1e-5
DATA = Path("data")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders as they were packed, and the text that they read. Tests change only
    copies.
    """
    folder = tmp_path_factory.mktemp("formats")
    make.write_corpus(folder / "corpus")
    for name in make.RUNS:
        with tarfile.open(FORMATS / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def here(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a copy of `room` the current folder, with one device."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))
    monkeypatch.setattr(report, "write", lambda workdirs, out: out)  # saves a second
    monkeypatch.chdir(shutil.copytree(room, tmp_path / "room"))
    return tmp_path / "room"


def run(workdir: str, written: str) -> train.Outcome:
    """Trains in `workdir` to the end, with the configuration of the run folder `written`."""
    config = checkpoint.read_config(checkpoint.locate(Path(written)))
    return train.run(config, Options(workdir=Path(workdir), data_dir=DATA))


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found == (wanted if IS_SAME else pytest.approx(wanted, rel=TOLERANCE))


def assert_as_written(workdir: str, name: str) -> None:
    """The records and the final arrays equal those of the commit that wrote the run."""
    found, wanted = lab.records(Path(workdir)), NUMBERS[name]["records"]
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert_close({key: one.get(key) for key in other}, other)
    sums = lab.meta(Path(workdir)).digest
    assert sums.keys() >= NUMBERS[name]["digest"].keys()
    if IS_SAME:
        assert sums | NUMBERS[name]["digest"] == sums


@pytest.mark.parametrize("name", ["finished", "interrupted", "branch"])
def test_resumed(name: str, here: Path) -> None:
    if name == "finished":
        shutil.rmtree(here / name / checkpoint.FOLDER / "24")
    begun = checkpoint.steps(Path(name))[-1]
    assert run(name, name).finished
    assert begun < checkpoint.steps(Path(name))[-1]
    assert_as_written(name, name)


@pytest.mark.parametrize("name", ["branch", "tuned"])
def test_started_from(name: str, here: Path) -> None:
    """A new run: a decay from the trunk's state, and a run from another's weights."""
    assert run("anew", name).finished
    assert_as_written("anew", name)


def test_loaded(here: Path) -> None:
    loaded = lm.load("finished")
    data = loaded.config.data
    prepared = prepare.prepare(data, DATA, tokenizer=loaded.tokenizer)
    given = Given(loaded.tokenizer, prepared, data, loaded.config.evaluate.max_tokens)
    questions = evaluate.prepare(evaluate.always(data), given)
    results = evaluate.run(questions, Scorer(loaded.build, loaded.params))
    last = metrics.read(Path("finished"))[-1]
    message = {key: value for key, value in last.items() if key.startswith("eval/")}
    assert message
    assert_close(evaluate.to_record(results), message)
    sample = NUMBERS["finished"]["samples"][0]
    assert sample["kind"] == "greedy"
    options = GenerateOptions(max_new_tokens=8, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    assert generate.complete(loaded, [sample["prompt"]], options) == [sample["text"]]
