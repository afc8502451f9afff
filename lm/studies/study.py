"""The question of a comparison, and the configuration of each of its runs; see compare.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax

from lm import build as build_lib
from lm import evals, families
from lm import layers as layer_lib
from lm.build import Build
from lm.config import Config, RunValues, UserError, convert, from_mapping, to_mapping
from lm.mapping import Holds
from lm.studies import grid, measure, recall, sizes, verdict
from lm.studies.sizes import Size
from lm.studies.verdict import Primary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The runs of a pattern, read with other options of its layers.

    Attributes:
      of: the pattern
      layers: label -> options
    """

    of: str
    layers: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of patterns. The other patterns are made equal to the first in size.

    Attributes:
      question: the question of the study, which is the title of its page
      run: a whole configuration
      patterns: the patterns that are compared
      variants: name -> a pattern whose runs are read with other options of layers, as --layer sets
        them; variants are not trained
      primary: the comparisons that the question rests on, at most five; they are named before the
        study is run, and only they have verdicts (lm/studies/verdict.py)
      seeds: seeds of the runs of each pattern
      tuned_on: seeds under which learning rates or other settings were chosen; such a seed favors
        those settings, so no verdict uses it
      tasks: like evaluate.tasks of a run, evaluated after training
      recall: a whole study of recall (lm/studies/recall.py) that is made too; {}: none
      timing_rounds: rounds in which every pattern is timed once
      decode_contexts: tokens before the one whose time and state are measured
    """

    question: str
    run: RunValues
    patterns: tuple[str, ...]
    variants: Mapping[str, Variant]
    primary: tuple[Primary, ...]
    seeds: tuple[int, ...]
    tuned_on: tuple[int, ...]
    tasks: Annotated[Mapping[str, Mapping[str, Any]], families.Labels(families.TASKS)]
    recall: Annotated[Mapping[str, Any], Holds(recall.Study)]
    timing_rounds: int
    decode_contexts: tuple[int, ...]


class Cell(NamedTuple):
    """One training and its evaluation."""

    pattern: str
    seed: int


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, a name twice, a refused run or task, or a
      primary comparison with something that is not there, or under a seed that was tuned on.
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
    # Before the comparisons: an unknown mixer is in neither list of names.
    for pattern in study.patterns:
        layer_lib.check(configuration(study, pattern, study.seeds[0]).model)
    labels = evals.create(study.tasks, "config.tasks").keys() | {"bits_per_byte"}
    verdict.check(study.primary, (*study.patterns, *study.variants), labels)
    if study.primary and (tuned := set(study.seeds) & set(study.tuned_on)):
        raise UserError(
            f"config.seeds={study.seeds} has {min(tuned)}, under which settings were chosen "
            f"(config.tuned_on={study.tuned_on}); a verdict needs others, take it out of seeds"
        )
    _check_names(study)
    if study.recall:
        recall.create(study.recall)
    for name, variant in study.variants.items():
        if name in study.patterns or variant.of not in study.patterns:
            raise UserError(
                f"config.variants.{name}.of={variant.of!r}: a variant has a name of its own and is "
                f"of one of the patterns {', '.join(study.patterns)}"
            )
        model = configuration(study, variant.of, study.seeds[0]).model
        layer_lib.change_layers(model, variant.layers)
    return study


def _check_names(study: Study) -> None:
    """Checks that runs, and patterns and variants within a run, can each have their own file."""
    grid.check_names([Cell(pattern, seed) for pattern in study.patterns for seed in study.seeds])
    grid.check_names([(name,) for name in (*study.patterns, *study.variants)])


def configuration(study: Study, pattern: str, seed: int, size: Size | None = None) -> Config:
    """The run of a pattern under a seed, at the size that makes it equal to the first."""
    values: Any = to_mapping(dict(study.run))
    values |= {"seed": seed}
    values["model"] = values["model"] | {"pattern": pattern}
    if size is not None:
        values["model"] |= size._asdict()
    return from_mapping(values)


def build(
    study: Study, pattern: str, size: Size, layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Build:
    """The build that trains the pattern at this size, with other options of `layers`."""
    config = configuration(study, pattern, study.seeds[0], size)
    model = layer_lib.change_layers(config.model, layers or {})
    return build_lib.build(dataclasses.replace(config, model=model), jax.devices())


def equal_sizes(study: Study) -> dict[str, Size]:
    """The size of every pattern.

    Raises:
      UserError: the parameters cannot be made equal.
    """
    model = configuration(study, study.patterns[0], study.seeds[0]).model
    count = lambda pattern, size: measure.parameters(build(study, pattern, size))
    return sizes.equal(study.patterns, Size(model.ffn_dim, model.num_layers), count)
