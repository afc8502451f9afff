"""Runs that differ in the pattern of mixers and the seed alone, at equal parameters and tokens.

    solve sizes -> train each (pattern, seed) -> ask each the tasks -> time all in turn -> verdicts
    -> compare.json -> compare.md, compare.html, figures

Every arrow resumes: what the workdir holds is not done again. Equal are the parameters outside the
embedding, within `TOLERANCE` of the first pattern's: the width of the feed-forward is solved in
steps of 8, or the depth where no layer of the pattern has one. The order of the data depends on the
seed alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import build as build_lib
from lm import evals, files, train
from lm import layers as layer_lib
from lm.build import Build
from lm.config import Config, UserError, convert, from_mapping, to_mapping
from lm.data import prepare
from lm.evals import Given, Task
from lm.evaluation import evaluate
from lm.evaluation.statistics import Number
from lm.report import comparison, folder
from lm.report import recall as recall_page
from lm.report.figures import standalone
from lm.run import checkpoint, record
from lm.studies import answers, measure, recall, verdict
from lm.studies.answers import Reading

TOLERANCE, GRAIN = 0.01, 8  # of the parameters; of the feed-forward width
CURVE_POINTS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The runs of pattern `of` under other options of its layers; `layers`: label -> options."""

    of: str
    layers: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """`run`: a whole configuration. The other patterns are made equal to the first in size.
    `variants` are not trained: a pattern's runs read with other options of layers, as --layer gives
    them. `tasks`: as `evaluate.tasks` of a run, asked after training. `recall`: a whole study of
    recall (lm/studies/recall.py) that is made beside, or nothing. `decode_contexts` in tokens.
    """

    question: str
    run: Mapping[str, Any]
    patterns: tuple[str, ...]
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    recall: Mapping[str, Any]
    timing_rounds: int
    decode_contexts: tuple[int, ...]


class Size(NamedTuple):
    """What makes a pattern as large as the first: the solved width or depth."""

    ffn_dim: int
    num_layers: int


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, a name twice, or a run or task that is
      refused.
    """
    study: Study = convert(Study, mapping, "config")
    for name in ("patterns", "seeds"):
        values = getattr(study, name)
        if not values:
            raise UserError(f"config.{name} is empty; name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{name}={values} names one twice; name each once")
    if study.timing_rounds < 1:
        raise UserError(f"config.timing_rounds={study.timing_rounds} must be at least 1")
    if any(context < 1 for context in study.decode_contexts):
        raise UserError(f"config.decode_contexts={study.decode_contexts} must be positive")
    evals.create(study.tasks, "config.tasks")
    _check_names(study)
    if study.recall:
        recall.create(study.recall)
    for pattern in study.patterns:
        layer_lib.check(_config(study, pattern, study.seeds[0]).model)
    for name, variant in study.variants.items():
        if name in study.patterns or variant.of not in study.patterns:
            raise UserError(
                f"config.variants.{name}.of={variant.of!r}: a variant has a name of its own and is "
                f"of one of the patterns {', '.join(study.patterns)}"
            )
        model = _config(study, variant.of, study.seeds[0]).model
        layer_lib.change_layers(model, variant.layers)
    return study


def run(study: Study, workdir: Path, data_dir: Path) -> list[dict[str, Any]] | None:
    """The row of every pattern, from what the workdir holds or by work; None if a signal stopped
    it.

    Raises:
      UserError: parameters that cannot be made equal, or a mistake that training or a task reports.
    """
    sizes = equal_sizes(study)
    planned = {
        (pattern, seed): _config(study, pattern, seed, sizes[pattern])
        for seed in study.seeds
        for pattern in study.patterns
    }
    places = {key: workdir / place(*key) for key in planned}
    readings = {pattern: Variant(of=pattern, layers={}) for pattern in study.patterns}
    readings |= study.variants
    runs = {
        (name, seed): Reading(places[reading.of, seed], name, reading.layers)
        for seed in study.seeds
        for name, reading in readings.items()
    }
    for key, config in planned.items():  # all, before the first of them takes its hours
        record.check_unchanged(places[key], config)
    for reading in runs.values():
        answers.known(reading)
    questions = answers.questions(study.tasks, study.run["evaluate"]["max_tokens"])
    left = [key for key, config in planned.items() if not is_finished(places[key], config)]
    if left:  # a task that cannot be asked is told now, not after the training
        data = planned[left[0]].data
        prepared = prepare.prepare(data, data_dir)
        given = Given(prepared.tokenizer, prepared, data, questions.max_tokens)
        evaluate.prepare(questions.tasks, given)
    for key, config in planned.items():
        if key not in left:
            continue
        outcome = train.run(config, train.Options(workdir=places[key], data_dir=data_dir))
        if not outcome.finished:
            return None
    found = {key: answers.ask(reading, questions, data_dir) for key, reading in runs.items()}
    builds = {
        name: build(study, reading.of, sizes[reading.of], reading.layers)
        for name, reading in readings.items()
    }
    training = measure.train_steps(builds, study.timing_rounds)
    decoding = measure.decode_steps(builds, study.decode_contexts, study.timing_rounds)
    rows = []
    for name, built in builds.items():
        trained = [places[name, seed] for seed in study.seeds if name in study.patterns]
        rows.append(
            {"pattern": name, "parameters": measure.parameters(built)}
            | sizes[readings[name].of]._asdict()
            | _cost(built, training[name], decoding[name])
            | {"curve": _curve(folder.load(trained))}
            | {"tasks": _by_task(questions.tasks, [found[name, seed] for seed in study.seeds])}
        )
    return rows


def recalled(study: Study, workdir: Path) -> list[recall_page.Row] | None:
    """The rows of the study of recall, from what the workdir holds or by training; None if a signal
    stopped it.
    """
    if not study.recall:
        return []
    asked = recall.create(study.recall)
    found = recall.run(asked, recall.create_grid(asked, workdir / "recall", ()))
    return None if found is None else recall.rows(asked, found)


def place(pattern: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{answers.stem(pattern)}-{seed}"


def verdicts(rows: list[dict[str, Any]], variants: Collection[str] = ()) -> list[verdict.Verdict]:
    """Every pattern against the first, for the headline of every task; `variants`: those that were
    not trained.
    """
    found = []
    for label, asked in rows[0]["tasks"].items():
        name = asked["headline"]
        numbers = {
            row["pattern"]: [
                Number.from_mapping(seed["numbers"][name]) for seed in row["tasks"][label]["seeds"]
            ]
            for row in rows
        }
        what = label if name == label else f"{label} {name}"
        found += verdict.judge(
            what, numbers, is_better=asked["is_better"], unit=asked["unit"], variants=variants
        )
    return verdict.shortened(found)


def write(
    study: Study,
    rows: list[dict[str, Any]],
    recalls: Sequence[recall_page.Row],
    head: Mapping[str, Any],
    workdir: Path,
) -> None:
    """compare.json, compare.md, compare.html and the figures in the workdir. `recalls`: what
    `recalled` gave.
    """
    found = {
        **head,
        "question": study.question,
        "seeds": list(study.seeds),
        "tokens": _config(study, study.patterns[0], study.seeds[0]).run_tokens,
        "rows": _without_units(rows),
        "verdicts": verdict.to_mapping(verdicts(rows, study.variants)),
        "recall": to_mapping(recalls),
    }
    files.replace(workdir / "compare.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    files.replace(workdir / "compare.md", comparison.markdown(found))
    files.replace(workdir / "compare.html", comparison.page(found))
    for name, svg in comparison.figures(found).items():
        files.replace(workdir / f"{name}.svg", standalone(svg))


def _check_names(study: Study) -> None:
    """Variants, and patterns beside them, need files of their own."""
    stems = [answers.stem(name) for name in (*study.patterns, *study.variants)]
    for name in study.variants:
        if not re.fullmatch(r"[\w ,.+-]+", name):
            raise UserError(
                f"config.variants holds {name!r}, and names of variants are those of files; use "
                "letters, digits, spaces and , . + - _"
            )
    if twice := [x for x in stems if stems.count(x) > 1]:
        raise UserError(
            f"two patterns or variants would share the file tasks-{twice[0]}.json (a comma is "
            "written + there); rename one"
        )


def _config(study: Study, pattern: str, seed: int, size: Size | None = None) -> Config:
    values: Any = to_mapping(dict(study.run))
    values |= {"seed": seed}
    values["model"] = values["model"] | {"pattern": pattern}
    if size is not None:
        values["model"] |= size._asdict()
    return from_mapping(values)


def build(
    study: Study, pattern: str, size: Size, layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Build:
    """Everything to train the pattern at this size, with other options of `layers`."""
    config = _config(study, pattern, study.seeds[0], size)
    model = layer_lib.change_layers(config.model, layers or {})
    return build_lib.build(dataclasses.replace(config, model=model), jax.devices())


def equal_sizes(study: Study) -> dict[str, Size]:
    """The size of every pattern: its feed-forward width by the straight line through two, or, where
    no layer has one, its depth.
    """

    def count(pattern: str, size: Size) -> int:
        return measure.parameters(build(study, pattern, size))

    first = study.patterns[0]
    model = _config(study, first, study.seeds[0]).model
    given = Size(model.ffn_dim, model.num_layers)
    target, sizes = count(first, given), {first: given}
    for pattern in study.patterns[1:]:
        small, large = (count(pattern, given._replace(ffn_dim=n * GRAIN)) for n in (1, 2))
        slope = (large - small) / GRAIN
        if not slope:
            sizes[pattern] = _equal_depth(study, pattern, given, target)
            continue
        wanted = GRAIN + (target - small) / slope
        width = max(GRAIN, GRAIN * round(wanted / GRAIN))
        found = small + slope * (width - GRAIN)
        if abs(found - target) > TOLERANCE * target:
            raise UserError(
                f"pattern {pattern!r} has {found:,.0f} parameters at ffn_dim={width}, "
                f"{first!r} has {target:,}; set a larger run.model.ffn_dim"
            )
        sizes[pattern] = given._replace(ffn_dim=width)
    return sizes


def _equal_depth(study: Study, pattern: str, given: Size, target: int) -> Size:
    """The depth nearest to `target` parameters: half a layer is the best there is."""
    period = len(pattern.split(","))
    sizes = [given._replace(num_layers=n * period) for n in (1, 2)]
    one, two = (measure.parameters(build(study, pattern, size)) for size in sizes)
    periods = max(1, round(1 + (target - one) / (two - one)))
    return given._replace(num_layers=periods * period)


def is_finished(workdir: Path, config: Config) -> bool:
    """Whether the run's last step has been saved and its report written."""
    steps = checkpoint.steps(workdir) if (workdir / "report.html").exists() else []
    return bool(steps) and steps[-1] == config.run_steps


def _cost(built: Build, training: measure.Training, decoding: dict[int, float]) -> dict[str, Any]:
    return {
        "seconds": training.seconds,
        "tokens_per_second": built.config.tokens_per_step / training.seconds,
        "peak_bytes": training.peak_bytes,
        "flops_per_token": build_lib.flops_per_token(built),
        "decode_seconds": {str(context): x for context, x in decoding.items()},
        "state_bytes": {
            str(context): measure.state_bytes(built.model, context)
            for context in sorted({built.config.data.context_length, *decoding})
        },
    }


def _curve(runs: list[folder.Run]) -> dict[str, Any]:
    """Training bits per byte of every seed, thinned to means of neighbors; nothing of no runs."""
    if not runs:
        return {}
    tokens, _ = runs[0].series("train/bpb")
    parts = np.array_split(np.arange(len(tokens)), min(CURVE_POINTS, len(tokens)))
    thin = lambda values: [round(float(values[part].mean()), 5) for part in parts]
    return {"tokens": thin(tokens), "bits": [thin(run.series("train/bpb")[1]) for run in runs]}


def _by_task(tasks: Mapping[str, Task], answers: list[Any]) -> dict[str, Any]:
    return {
        label: {
            "headline": task.headline,
            "is_better": task.is_better,
            "unit": task.unit,
            "seeds": [found[label] for found in answers],
        }
        for label, task in tasks.items()
    }


def _without_units(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as they are committed: every document's sums would be most of the file. What is not
    finite is None.
    """
    digits = lambda x: round(x, 6) if isinstance(x, float) else x
    drop = lambda number: {k: digits(v) for k, v in number.items() if k != "units"}
    plain = json.loads(json.dumps(rows), parse_constant=lambda _: None)
    for row in plain:
        for task in row["tasks"].values():
            for seed in task["seeds"]:
                seed["numbers"] = {name: drop(x) for name, x in seed["numbers"].items()}
    return plain
