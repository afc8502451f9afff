"""Whole training runs of a tiny model, for the tests of training, checkpoints and resume.

Runs that differ only in values that compiled code does not see share one build. A `Lab` keeps
finished runs; a test that changes a run works on a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm import build as build_lib
from lm import metrics, report, schedules, train
from lm.build import Build, build
from lm.config import Config, to_mapping
from lm.parallel import mesh
from lm.run import checkpoint
from lm.run.items import NONE, Meta
from lm.train import Options, Outcome
from tests.lm import tiny

STEPS = 12
DECAY_START = 9
CHANGES: dict[str, Any] = {
    "model.num_layers": 2,
    "model.pattern": "softmax",
    "data.tokenizer.vocab_size": 257,
    "data.context_length": 32,
    "schedule.warmup": "256 tokens",
    "schedule.decay": "3 steps",
    "run.length": f"{STEPS} steps",
    "evaluate.every": "6 steps",
    "evaluate.max_tokens": 256,
    "evaluate.share": 0.0,
    "checkpoint.every": "3 steps",
    "checkpoint.keep_last": 20,
    "log.samples": (),
    "log.sample_tokens": 4,
}
WORDS = ("the", "quick", "fox", "jumps", "over", "été", "naïve", "def", "f(x):", "return x + 1")

# A hook is called before `step` or `score`, with the number of earlier calls and the arguments. If
# it returns something, that replaces the arguments.
Hook = Callable[[int, Any], Any]


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(WORDS, k=120)), encoding="utf-8")
    return folder


def sources(corpus: Path) -> dict[str, Any]:
    """One source for training and validation, and one for validation only."""
    plain = {"text_key": "text", "weight": 1.0, "valid_fraction": 0.3}
    return {
        "text": plain | {"path": str(corpus / "*.txt")},
        "held": plain | {"path": str(corpus / "0*.txt"), "weight": 0.0, "valid_fraction": 1.0},
    }


@dataclasses.dataclass
class Lab:
    """`root` holds corpus/, data/ and a folder for each run."""

    root: Path
    builds: dict[str, Build] = dataclasses.field(default_factory=dict)
    steps: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        write_corpus(self.root / "corpus")

    def config(self, changes: dict[str, Any] | None = None) -> Config:
        found = {"data.sources": sources(self.root / "corpus")}
        return tiny.config(CHANGES | found | (changes or {}))

    def run(self, workdir: Path, changes: dict[str, Any] | None = None, **options: Any) -> Outcome:
        """Calls `train.run`. The options `step` and `score` are hooks of these functions of the
        build. Without `is_page_written` no report.html is written, which would take a second.
        """
        hooks = {name: options.pop(name, None) for name in ("step", "score")}
        is_page_written = options.pop("is_page_written", False)
        given: dict[str, Any] = {"workdir": workdir, "data_dir": self.root / "data"} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))
            patch.setattr(build_lib, "build", functools.partial(self._build, hooks))
            if not is_page_written:
                patch.setattr(report, "write", lambda workdirs, out: out)
            return train.run(self.config(changes), Options(**given))

    def _build(
        self,
        hooks: dict[str, Hook | None],
        config: Config,
        devices: Any,
        decay_start: Any = None,
        like: Any = None,
    ) -> Build:
        """A build on one device, compiled with few optimisations, and shared by all configurations
        that compile to the same programs.
        """
        mapping = to_mapping(config)
        for unseen in ("evaluate", "log", "checkpoint", "seed", "init_from", "decay_from", "run"):
            mapping.pop(unseen)
        mapping["optimizer"].pop("max_skipped")
        run = schedules.Run(config.run_tokens, config.tokens_per_step, decay_start)
        schedule = config.schedule.schedule(run)
        for unseen in ("warmup", "decay"):
            mapping["schedule"].pop(unseen)
        key = json.dumps(mapping)
        if key not in self.builds:
            built = build(config, devices[:1], decay_start)
            self.builds[key] = dataclasses.replace(
                built, init=compiled_once(built.init), score=compiled_once(built.score)
            )
        built = self.builds[key]
        key += str(schedule.phases)
        if key not in self.steps:
            fresh = build(config, devices[:1], decay_start)
            self.steps[key] = compiled_once(fresh.step)
        return dataclasses.replace(
            built,
            config=config,
            schedule=schedule,
            run_tokens=int(build_lib.schedule_end(config, decay_start)),
            step=hooked(self.steps[key], hooks["step"]),
            score=hooked(built.score, hooks["score"]),
        )

    @property
    def whole(self) -> Path:
        """The finished, uninterrupted run. Tests must not change it."""
        return self._kept("whole", {})

    @property
    def longer(self) -> Path:
        """The same run, planned for twice the length."""
        return self._kept("longer", {"run.length": f"{2 * STEPS} steps"})

    def _kept(self, name: str, changes: dict[str, Any]) -> Path:
        if not (self.root / name).exists():
            assert self.run(self.root / name, changes).finished
        return self.root / name


def compiled_once(jitted: Any) -> Any:
    """The jitted function, compiled once for each shape of its arguments, with few
    optimisations.
    """
    found: dict[tuple[Any, ...], Any] = {}

    def call(*args: Any) -> Any:
        shapes = tuple(np.shape(x) for x in jax.tree.leaves(args))
        if shapes not in found:
            found[shapes] = tiny.compiled(jitted, *args)
        return found[shapes](*args)

    return call


def hooked(function: Any, hook: Hook | None) -> Any:
    calls = iter(range(1_000_000))
    return function if hook is None else lambda *a: function(*(hook(next(calls), a) or a))


def copy(workdir: Path, to: Path, last: int | None = None) -> Path:
    """A copy of a run, as it was when checkpoint `last` was the newest."""
    shutil.copytree(workdir, to)
    if last is not None:
        for step in checkpoint.steps(to):
            if step > last:
                shutil.rmtree(to / checkpoint.FOLDER / str(step))
    return to


def meta(workdir: Path, step: int | None = None) -> Meta:
    """The meta of the newest checkpoint, or of `step`. Its digest covers every bit of every array.

    Left out are the digest of the configuration, which may have another length, and that of the
    records, which hold timings.
    """
    path = checkpoint.locate(workdir)
    found = checkpoint.read_meta(path if step is None else path.parent / str(step))
    return found._replace(items=NONE, records=None)


def records(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    lines = metrics.read(workdir)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def assert_equal_runs(a: Path, b: Path) -> None:
    assert meta(a) == meta(b)
    assert records(a) == records(b)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
