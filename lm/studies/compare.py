"""Runs that differ in the pattern of mixers and the seed alone, at equal parameters and tokens.

    solve the feed-forward width of every pattern -> train each (pattern, seed), resuming
    -> time one step of each, in turn -> compare.json, compare.md

Equal are the parameters outside the embedding, within `TOLERANCE` of the first pattern's: the width
of the feed-forward is solved in steps of 8. The order of the data depends on the seed alone. Times
are of train steps run in turn, so that a slow minute of the machine hits all patterns alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import build as build_lib
from lm import checkpoint, record, train
from lm import model as model_lib
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, UserError, convert, from_mapping, to_mapping
from lm.data.batch import Batch
from lm.report import folder

TOLERANCE, GRAIN = 0.01, 8  # of the parameters; of the feed-forward width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """`run`: a whole configuration. The other patterns are made equal to the first in size."""

    run: Mapping[str, Any]
    patterns: tuple[str, ...]
    seeds: tuple[int, ...]
    timing_rounds: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What a pattern came to. `bits`: bits per byte by seed; `state_bytes`: of one row after a
    context of training length; `seconds`: lower quartile of a train step.
    """

    pattern: str
    ffn_dim: int
    parameters: int
    bits: list[float]
    seconds: float
    tokens_per_second: float
    state_bytes: int
    flops_per_token: float


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, or a run that is refused.
    """
    study: Study = convert(Study, mapping, "config")
    for name in ("patterns", "seeds"):
        if not getattr(study, name):
            raise UserError(f"config.{name} is empty; name at least one")
    if study.timing_rounds < 1:
        raise UserError(f"config.timing_rounds={study.timing_rounds} must be at least 1")
    for pattern in study.patterns:
        model_lib.check(_config(study, pattern, study.seeds[0]).model)
    return study


def run(study: Study, workdir: Path, data_dir: Path) -> list[Row] | None:
    """Every row, from what the workdir holds or by training; None if a signal stopped it.

    Raises:
      UserError: parameters that cannot be made equal, or a mistake that training reports.
    """
    widths = equal_widths(study)
    planned = {
        workdir / f"{pattern.replace(',', '-')}-{seed}": _config(
            study, pattern, seed, widths[pattern]
        )
        for seed in study.seeds
        for pattern in study.patterns
    }
    for place, config in planned.items():  # all, before the first of them takes its hours
        record.check_unchanged(place, config)
    for place, config in planned.items():
        if is_finished(place, config):
            continue
        outcome = train.run(config, train.Options(workdir=place, data_dir=data_dir))
        if not outcome.finished:
            return None
    builds = {pattern: build(study, pattern, widths[pattern]) for pattern in study.patterns}
    seconds = time_steps(builds, study.timing_rounds)
    return [_row(study, workdir, built, p, seconds[p]) for p, built in builds.items()]


def write(rows: list[Row], head: Mapping[str, Any], workdir: Path) -> None:
    """compare.json and compare.md in the workdir."""
    values = [dataclasses.asdict(row) for row in rows]
    text = json.dumps({**head, "rows": values}, indent=1) + "\n"
    record.replace(workdir / "compare.json", text)
    record.replace(workdir / "compare.md", table(values))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, best first."""
    lines = [
        "| pattern | bits per byte | by seed | parameters | ffn_dim | state, bytes a row "
        "| tokens/s | MFLOP a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: float(np.mean(row["bits"]))):
        bits = ", ".join(f"{value:.4f}" for value in row["bits"])
        lines.append(
            f"| {row['pattern']} | {np.mean(row['bits']):.4f} | {bits} | {row['parameters']:,} "
            f"| {row['ffn_dim']} | {row['state_bytes']:,} | {row['tokens_per_second']:,.0f} "
            f"| {row['flops_per_token'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _config(study: Study, pattern: str, seed: int, ffn_dim: int | None = None) -> Config:
    values: Any = to_mapping(dict(study.run))
    values |= {"seed": seed}
    values["model"] = values["model"] | {"pattern": pattern}
    if ffn_dim is not None:
        values["model"]["ffn_dim"] = ffn_dim
    return from_mapping(values)


def build(study: Study, pattern: str, ffn_dim: int) -> Build:
    """Everything to train the pattern at this feed-forward width."""
    return build_lib.build(_config(study, pattern, study.seeds[0], ffn_dim), jax.devices())


def parameters(built: Build) -> int:
    """Parameters outside the embedding and the output matrix."""
    infos = {k: v for k, v in built.infos.items() if k not in ("embed", "output")}
    return params_lib.count(infos)["total"]


def equal_widths(study: Study) -> dict[str, int]:
    """The feed-forward width of every pattern, by the straight line through two of its sizes."""

    def size(pattern: str, ffn_dim: int) -> int:
        return parameters(build(study, pattern, ffn_dim))

    first = study.patterns[0]
    given = _config(study, first, study.seeds[0]).model.ffn_dim
    target, widths = size(first, given), {first: given}
    for pattern in study.patterns[1:]:
        small, large = size(pattern, GRAIN), size(pattern, 2 * GRAIN)
        slope = (large - small) / GRAIN
        wanted = GRAIN + (target - small) / slope if slope else 0.0
        widths[pattern] = max(GRAIN, GRAIN * round(wanted / GRAIN))
        found = small + slope * (widths[pattern] - GRAIN)
        if abs(found - target) > TOLERANCE * target:
            raise UserError(
                f"pattern {pattern!r} has {found:,.0f} parameters at ffn_dim={widths[pattern]}, "
                f"{first!r} has {target:,}; set a larger run.model.ffn_dim"
            )
    return widths


def is_finished(workdir: Path, config: Config) -> bool:
    """Whether the run's last step has been saved and its report written."""
    steps = checkpoint.steps(workdir) if (workdir / "report.html").exists() else []
    return bool(steps) and steps[-1] == config.run_steps


def time_steps(builds: Mapping[str, Build], rounds: int) -> dict[str, float]:
    """Seconds of a train step of every pattern: lower quartile over rounds that visit all."""
    sides = {pattern: _stepper(built) for pattern, built in builds.items()}
    samples: dict[str, list[float]] = {pattern: [] for pattern in sides}
    for i in range(rounds + 1):
        for pattern, side in sides.items():
            start = time.perf_counter()
            side()
            if i:  # the first round warms up
                samples[pattern].append(time.perf_counter() - start)
    return {pattern: float(np.quantile(x, 0.25)) for pattern, x in samples.items()}


def _stepper(built: Build) -> Any:
    held = [built.init(0)]
    shape = built.config.data.batch_size, built.config.data.context_length
    tokens = np.random.default_rng(0).integers(0, built.config.data.tokenizer.vocab_size, shape)
    ones, index = np.ones(shape, np.int32), np.arange(shape[1], dtype=np.int32)
    batch = Batch(
        tokens=tokens.astype(np.int32),
        targets=np.roll(tokens, -1, axis=1).astype(np.int32),
        segment_ids=ones,
        positions=np.broadcast_to(index, shape),
        source_ids=0 * ones,
        loss_weights=ones.astype(np.float32),
    )
    placed = built.put(batch)
    token_bytes = built.put_replicated(jnp.ones(built.config.data.tokenizer.vocab_size, jnp.int32))

    def side() -> None:
        held[0], _ = built.step(held[0], placed, token_bytes)
        jax.block_until_ready(held[0])

    return side


def _row(study: Study, workdir: Path, built: Build, pattern: str, seconds: float) -> Row:
    name = pattern.replace(",", "-")
    runs = folder.load([workdir / f"{name}-{seed}" for seed in study.seeds])
    length = built.config.data.context_length
    state = jax.eval_shape(lambda: built.model.init_state(1, length))
    return Row(
        pattern=pattern,
        ffn_dim=built.config.model.ffn_dim,
        parameters=parameters(built),
        bits=[float(np.mean(list(run.validation().values()))) for run in runs],
        seconds=seconds,
        tokens_per_second=built.config.tokens_per_step / seconds,
        state_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)),
        flops_per_token=build_lib.flops_per_token(built),
    )
