"""What a trained run answers to the tasks of a study, stored in its folder.

WORKDIR/tasks-NAME.json holds the answers of one reading of the run (with its own layers, or with a
variant's options), and everything they depend on: the step, those options, and for every task its
options, `max_tokens` and the content of its files. What is unchanged is not evaluated again.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm import evals, files
from lm.config import UserError, to_mapping
from lm.data import prepare
from lm.evals import Given, Task
from lm.evaluation import evaluate
from lm.evaluation.scoring import Scorer
from lm.report import compared
from lm.report.compared import Answer
from lm.run import checkpoint
from lm.run.progress import ScoringBar
from lm.studies import grid


class Reading(NamedTuple):
    """A trained run, with options of its layers; `name` is the pattern's or the variant's."""

    workdir: Path
    name: str
    layers: Mapping[str, Mapping[str, Any]]

    @property
    def path(self) -> Path:
        """The file of its answers."""
        return self.workdir / f"tasks-{grid.name((self.name,))}.json"


class Questions(NamedTuple):
    """`asked[label]` is everything that the answer to a task depends on, apart from the run."""

    tasks: Mapping[str, Task]
    max_tokens: int
    asked: Mapping[str, Any]


def questions(tasks: Mapping[str, Mapping[str, Any]], max_tokens: int) -> Questions:
    """The tasks of a study, and bits per byte; their files are read, to notice when they change."""
    created = evals.create({"bits_per_byte": {}} | dict(tasks), "config.tasks")
    asked = {}
    for label, task in created.items():
        options = dataclasses.asdict(task)
        found = {key: digest(value) for key, value in options.items() if isinstance(value, str)}
        contents = {key: value for key, value in found.items() if value}
        # Contents instead of paths, which differ between machines.
        asked[label] = [type(task).__name__, options | contents, max_tokens]
    return Questions(created, max_tokens, _plain(asked))


def digest(path: str) -> str:
    """A digest of the names and contents of the files that a path, folder or glob means; "" if
    there are none.

    Raises:
      UserError: a file cannot be read.
    """
    matched = [Path(x) for x in glob.glob(os.path.expanduser(path), recursive=True)]
    inside = [
        file for place in matched for file in (place.rglob("*") if place.is_dir() else [place])
    ]
    found = hashlib.sha256()
    for file in sorted(file for file in inside if file.is_file()):
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        found.update(f"{file.name} {content}\n".encode())
    return found.hexdigest() if inside else ""


def known(reading: Reading) -> dict[str, Any]:
    """The content of its file.

    Raises:
      UserError: the file is damaged.
    """
    empty = {"step": None, "layers": {}, "asked": {}, "found": {}}
    if not reading.path.exists():
        return empty
    try:
        values = json.loads(reading.path.read_text(encoding="utf-8"))
        found = {key: values[key] for key in empty}
        complete = found["asked"].keys() == found["found"].keys()
    except (ValueError, TypeError, KeyError, AttributeError):
        complete, found = False, empty
    if not complete:
        raise UserError(f"{reading.path} is damaged; remove it to ask its tasks again")
    return found


def ask(reading: Reading, questions: Questions, data_dir: Path) -> dict[str, Answer]:
    """label -> the answer of a trained run. A task is evaluated only if something that its answer
    depends on has changed.
    """
    step = checkpoint.steps(reading.workdir)[-1]
    before, layers = known(reading), _plain(to_mapping(dict(reading.layers)))
    is_same = (before["step"], before["layers"]) == (step, layers)
    asked = questions.asked
    kept = {
        label: before["found"][label]
        for label in asked
        if is_same and before["asked"].get(label) == asked[label]
    }
    left = {label: task for label, task in questions.tasks.items() if label not in kept}
    if left:
        loaded = checkpoint.load(reading.workdir, reading.layers)
        data = loaded.config.data
        prepared = prepare.prepare(data, data_dir, tokenizer=loaded.tokenizer)
        given = Given(loaded.tokenizer, prepared, data, questions.max_tokens)
        scorer = Scorer(loaded.build, loaded.params)
        items = evaluate.prepare(left, given)
        who = reading.workdir.name + (f" as {reading.name}" if reading.layers else "")
        totals = {f"{who} {k}": evaluate.num_tokens(x) for k, x in items.items()}
        with ScoringBar(totals) as bar:
            for label, item in items.items():  # saved one by one, as each takes minutes
                advance = lambda name, tokens: bar.advance(f"{who} {name}", tokens)
                results = evaluate.run({label: item}, scorer, advance=advance)
                kept |= evaluate.to_mapping(results, with_units=True)
                done = {"step": step, "layers": layers, "found": kept}
                done["asked"] = {name: asked[name] for name in kept}
                files.replace(reading.path, json.dumps(done, allow_nan=False) + "\n")
    return {label: compared.answer(kept[label]) for label in questions.tasks}


def _plain(values: Any) -> Any:
    """The values as JSON returns them."""
    return json.loads(json.dumps(values))
