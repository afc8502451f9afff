"""Recall against the size of the state: multi-query associative recall, learnt by each mixer.

    for every problem, pattern, width: for every learning rate: for every seed:
        train on generated rows until every test setting is solved or the steps are over
    -> points/<point>.json, whole or not there -> recall.json, recall.md, recall.svg

The question and the grid are those of Zoology (Arora et al. 2023, arXiv 2312.04927, fig. 2): small
models without a feed-forward, a width and a state that vary, the best of several learning rates by
the test accuracy itself. Once a rate is solved for every seed, the rates after it are not trained:
they could add less than what is missing to 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import build as build_lib
from lm import files
from lm import layers as layer_lib
from lm.config import Config, UserError, convert, difference, from_mapping, to_mapping
from lm.data import mqar
from lm.data.batch import Batch
from lm.evals.mqar import Mqar, questions
from lm.evaluation.scoring import Scorer
from lm.report import recall as recall_page
from lm.report.figures import standalone
from lm.run import record
from lm.studies import measure

TRAIN, TEST = 1, 2  # of the seeds of rows: what is tested is of no training set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """`examples` rows of a setting."""

    setting: mqar.Setting
    examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is learnt. A batch is of one training set; sets are gone through in epochs."""

    train: tuple[Rows, ...]
    test: tuple[Rows, ...]
    batch_size: int
    steps: int
    evaluate_every: int  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """`run`: a whole configuration, of which pattern, width, head_dim = width / num_heads, learning
    rate, seed, sizes of a batch and length are replaced. `solved`: accuracy at every test setting
    that ends a training.
    """

    run: Mapping[str, Any]
    problems: Mapping[str, Problem]
    patterns: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    solved: float


class Point(NamedTuple):
    """One training."""

    problem: str
    pattern: str
    width: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        pattern = self.pattern.replace(",", "-").replace(" ", "")
        return f"{self.problem}_{pattern}_{self.width}_{self.learning_rate:g}_{self.seed}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training came to. `accuracy` by test setting; `seconds` with compilation."""

    accuracy: dict[str, float]
    steps: int
    skipped: int
    seconds: float
    parameters: int
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A pattern at a width: the best learning rate's accuracy by test setting, mean over seeds, and
    by seed; steps by seed. `seconds`: of all that was trained for it. `state_bytes`: of one row
    after the longest test setting, all layers. `parameters`: without the embedding.
    """

    problem: str
    pattern: str
    width: int
    learning_rate: float
    accuracy: dict[str, float]
    by_seed: dict[str, list[float]]
    steps: list[int]
    num_trained: int
    state_bytes: int
    parameters: int
    seconds: float


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, a setting that does not fit its length or
      the vocabulary, or a run that is refused.
    """
    study: Study = convert(Study, mapping, "config")
    for name in ("problems", "patterns", "widths", "learning_rates", "seeds"):
        values = getattr(study, name)
        if not values:
            raise UserError(f"config.{name} is empty; name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{name}={values} names one twice; name each once")
    if not 0 < study.solved <= 1:
        raise UserError(f"config.solved={study.solved} must lie in (0, 1]; 1 never stops early")
    for label, problem in study.problems.items():
        _check(problem, f"config.problems.{label}")
    names = [point.name for point in points(study)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two points would share the file {twice[0]}.json; rename what they differ in"
        )
    first = points(study)[0]
    for point in points(study):  # layers by themselves, and all else with the first of them
        if point[1:3] != first[1:3] and point != (first[0], *point[1:3], *first[3:]):
            continue
        config = configuration(study, point)
        layer_lib.check(config.model)
        problem = study.problems[point.problem]
        for rows in (*problem.train, *problem.test):
            if (told := rows.setting.problem(config.data.tokenizer.vocab_size)) is not None:
                raise UserError(f"config.problems.{point.problem}: {told}")
    return study


def _check(problem: Problem, where: str) -> None:
    for name in ("train", "test"):
        if not getattr(problem, name):
            raise UserError(f"{where}.{name} is empty; give at least one setting")
    for name in ("batch_size", "steps", "evaluate_every"):
        if getattr(problem, name) < 1:
            raise UserError(f"{where}.{name}={getattr(problem, name)} must be at least 1")
    names = [rows.setting.name for rows in problem.test]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}.test has {twice[0]} twice; keep one")
    for rows in problem.train:
        if rows.examples < problem.batch_size:
            raise UserError(
                f"{where}: examples={rows.examples} make no batch of {problem.batch_size}; "
                "set batch_size to that or less"
            )
    if any(rows.examples < 1 for rows in problem.test):
        raise UserError(f"{where}.test: examples must be at least 1")


def points(study: Study) -> list[Point]:
    """All that may be trained, in this order."""
    axes = study.problems, study.patterns, study.widths, study.learning_rates, study.seeds
    return [Point(*values) for values in itertools.product(*axes)]


def configuration(study: Study, point: Point) -> Config:
    """The run of a point.

    Raises:
      UserError: a width that num_heads does not divide, or a run that is refused.
    """
    values: Any = to_mapping(dict(study.run))
    problem, heads = study.problems[point.problem], values["model"]["num_heads"]
    if point.width % heads:
        raise UserError(f"config.widths: {point.width} is not a multiple of num_heads={heads}")
    sizes = {"width": point.width, "head_dim": point.width // heads, "pattern": point.pattern}
    length = max(rows.setting.length for rows in problem.train)
    values["seed"] = point.seed
    values["model"] |= sizes
    values["data"] |= {"context_length": length, "batch_size": problem.batch_size}
    values["schedule"]["peak_learning_rate"] = point.learning_rate
    values["run"]["length"] = f"{problem.steps} steps"
    return from_mapping(values)


def run(study: Study, workdir: Path, told: Callable[[Point, int, str], object]) -> list[Row]:
    """Every row, from what the workdir holds or by training. `told(point, step, note)`: progress;
    step 0 for a point that is taken as it is or not needed.

    Raises:
      UserError: the workdir holds points of another configuration, or is in use.
    """
    with record.locked(workdir):
        (workdir / "points").mkdir(exist_ok=True)
        found = _read(study, workdir / "points")
        combinations = itertools.product(study.problems, study.patterns, study.widths)
        return [_row(study, workdir / "points", found, told, at) for at in combinations]


def _read(study: Study, folder: Path) -> dict[Point, Outcome]:
    """The finished points, all checked before the first is trained."""
    found = {}
    for point in points(study):
        path = folder / f"{point.name}.json"
        if not path.exists():
            continue
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            changed = difference(kept["asked"], _asked(study, point))
            outcome = Outcome(**kept["outcome"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path} is damaged; remove it to train the point again") from None
        if changed:
            key, (old, new) = next(iter(changed.items()))
            raise UserError(
                f"{path} was trained with another config ({key}: {old!r} -> {new!r}); choose a new "
                "workdir"
            )
        found[point] = outcome
    return found


def _asked(study: Study, point: Point) -> dict[str, Any]:
    """All that a point's outcome depends on."""
    asked = {"solved": study.solved, "problem": study.problems[point.problem]}
    return to_mapping(asked | {"run": configuration(study, point)})


def _row(
    study: Study,
    folder: Path,
    found: dict[Point, Outcome],
    told: Callable[[Point, int, str], object],
    at: tuple[str, str, int],
) -> Row:
    by_rate: dict[float, list[Outcome]] = {}
    is_solved = False
    for rate in study.learning_rates:
        made = [Point(*at, rate, seed) for seed in study.seeds]
        for point in made:
            if not is_solved and point not in found:
                outcome = train(study, point, functools.partial(told, point))
                kept = {"asked": _asked(study, point), "outcome": dataclasses.asdict(outcome)}
                files.replace(folder / f"{point.name}.json", json.dumps(kept, indent=1) + "\n")
                found[point] = outcome
            told(point, 0, "")
        if not is_solved:
            by_rate[rate] = [found[point] for point in made]
            is_solved = all(min(x.accuracy.values()) >= study.solved for x in by_rate[rate])
    return _best(at, by_rate)


def _best(at: tuple[str, str, int], by_rate: dict[float, list[Outcome]]) -> Row:
    def score(rate: float) -> float:
        return float(np.mean([list(one.accuracy.values()) for one in by_rate[rate]]))

    rate = max(by_rate, key=score)
    best, trained = by_rate[rate], list(itertools.chain(*by_rate.values()))
    by_seed = {name: [one.accuracy[name] for one in best] for name in best[0].accuracy}
    return Row(
        *at,
        learning_rate=rate,
        accuracy={name: float(np.mean(values)) for name, values in by_seed.items()},
        by_seed=by_seed,
        steps=[one.steps for one in best],
        num_trained=len(trained),
        state_bytes=best[0].state_bytes,
        parameters=best[0].parameters,
        seconds=sum(one.seconds for one in trained),
    )


def train(study: Study, point: Point, told: Callable[[int, str], object]) -> Outcome:
    """Trains one point to the end of its steps, or until it is solved."""
    start, problem = time.perf_counter(), study.problems[point.problem]
    built = build_lib.build(configuration(study, point), jax.devices())
    size = built.config.data.tokenizer.vocab_size
    tests = _tests(problem, size)
    token_bytes = built.put_replicated(np.ones(size, np.int32))
    state, step, metrics, accuracy = built.init(point.seed), 0, {}, {}
    for batch in itertools.islice(batches(problem, size, point.seed), problem.steps):
        state, metrics = built.step(state, built.put(batch), token_bytes)
        step += 1
        if step % problem.evaluate_every == 0 or step == problem.steps:
            scorer = Scorer(built, state.params)
            accuracy = {
                name: task.numbers(items, scorer(items.rows))["accuracy"].value
                for name, (task, items) in tests.items()
            }
            lowest = min(accuracy.values())
            told(step, f"loss {float(metrics['train/loss']):.3f}  accuracy {lowest:.3f}")
            if lowest >= study.solved:
                break
    return Outcome(
        accuracy=accuracy,
        steps=step,
        skipped=int(metrics["optim/skipped_total"]),
        seconds=time.perf_counter() - start,
        parameters=measure.parameters(built),
        state_bytes=measure.state_bytes(
            built.model, max(rows.setting.length for rows in problem.test)
        ),
    )


def batches(problem: Problem, vocab_size: int, seed: int) -> Iterator[Batch]:
    """Every training set in a new order each epoch, batches of the sets shuffled; without end."""
    sets = _sets(problem, vocab_size, seed)
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, TRAIN, len(sets), epoch])
        plan = []
        for rows in sets:
            order = rng.permutation(len(rows.tokens))
            whole = len(order) // problem.batch_size * problem.batch_size
            plan += [(rows, chosen) for chosen in order[:whole].reshape(-1, problem.batch_size)]
        for i in rng.permutation(len(plan)):
            rows, chosen = plan[i]
            yield mqar.batch(mqar.Examples(*(field[chosen] for field in rows)))


@functools.lru_cache(maxsize=1)
def _sets(problem: Problem, vocab_size: int, seed: int) -> list[mqar.Examples]:
    return [
        mqar.examples(rows.setting, vocab_size, rows.examples, [seed, TRAIN, i])
        for i, rows in enumerate(problem.train)
    ]


def _tests(problem: Problem, vocab_size: int) -> dict[str, tuple[Mqar, Any]]:
    """Setting -> its task and items; the same rows for every seed of the study."""
    found = {}
    for i, rows in enumerate(problem.test):
        task = Mqar(**dataclasses.asdict(rows.setting), rows=rows.examples)
        drawn = mqar.examples(rows.setting, vocab_size, rows.examples, [0, TEST, i])
        found[rows.setting.name] = task, questions(drawn)
    return found


def write(rows: list[Row], head: Mapping[str, Any], workdir: Path) -> None:
    """recall.json, recall.md and recall.svg in the workdir."""
    values = [dataclasses.asdict(row) for row in rows]
    text = json.dumps({**head, "recall": values}, indent=1) + "\n"
    files.replace(workdir / "recall.json", text)
    files.replace(workdir / "recall.md", recall_page.table(values))
    files.replace(workdir / "recall.svg", standalone(recall_page.figure(values)))
