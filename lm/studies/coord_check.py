"""The coordinate check: do activations keep their size when the model becomes wider, or deeper?

    for every pattern, parametrization, width (or depth): for every seed:
        train a few steps at a constant rate; before the first and after every step take the mean
        |activation| of each probe on the first batch
    -> a `Curve` for each training (lm/report/coord_check.py) -> slopes of log |activation| against
       log width for every probe and step, and the verdict

The protocol follows the muP guide of Cerebras and EleutherAI. Heads have a fixed width, so their
number grows; AdamW with clipping. A slope from -0.1 to 0.1 passes. The standard parametrization
must fail, otherwise the check had no power.

    embedding   the token embedding, times its multiplier
    mixer, mlp  outputs of the branches before their multiplier, mean over layers
    stream      the residual stream after the last layer
    logits      in the second half of the steps. With a readout that is not zero, logits at init are
                a sum of m independent terms divided by m. They fall as m^-1/2 by design, until the
                steps have outgrown these initial values.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import build as build_lib
from lm import files
from lm.build import Build
from lm.config import Config, Duration, UserError, from_mapping, to_mapping
from lm.data import loader
from lm.data.batch import Batch
from lm.data.prepare import Prepared
from lm.families import OPTIMIZERS
from lm.mapping import lasting
from lm.report import coord_check as page
from lm.report.coord_check import Curve
from lm.report.figures import standalone
from lm.studies import answers, grid, sizes

BOTH = "both"
# A few steps take less time than optimizing their compiled code would.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Cell(NamedTuple):
    """One model of the check; its trainings differ only in the seed."""

    pattern: str
    parametrization: str
    width: int
    layers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """`run` is the configuration at the base width, and has its own `mup.base_width` and
    `mup.base_depth`. With more than one of `depths`, slopes are over depth, at the width of `run`.
    """

    run: Config
    patterns: tuple[str, ...]
    parametrizations: tuple[str, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int

    @property
    def cells(self) -> list[Cell]:
        axes = self.patterns, self.parametrizations, self.widths, self.depths
        return [Cell(*values) for values in itertools.product(*axes)]


class Asked(NamedTuple):
    """The command line's values; an empty one means the configuration's value."""

    patterns: Sequence[str]
    parametrization: str
    widths: Sequence[int]
    depths: Sequence[int]
    seeds: Sequence[int]
    steps: int


def create(run: Config, asked: Asked) -> Check:
    """A check of `run`.

    Raises:
      UserError: fewer than two widths or depths, several of both, one twice, or a size that is
      refused as a run.
    """
    widths = tuple(asked.widths) or (run.model.width,)
    depths = tuple(asked.depths) or (run.model.num_layers,)
    for name, values in (("widths", widths), ("depths", depths), ("seeds", tuple(asked.seeds))):
        if not values or len(set(values)) < len(values) or min(values) < 0:
            raise UserError(f"--{name}={','.join(map(str, values))} must name each once")
    if (len(widths) > 1) == (len(depths) > 1):
        raise UserError(
            f"--widths={','.join(map(str, widths))} and --depths={','.join(map(str, depths))}: a "
            "slope is over one of them; give several of one, and of the other none"
        )
    if asked.steps < 1:
        raise UserError(f"--steps={asked.steps} must be at least 1")
    chosen = (asked.parametrization,)
    if asked.parametrization == BOTH:
        over = "layers" if len(depths) > 1 else "width"
        chosen = page.JUDGED[over][0], page.CONTROL[over]
    patterns = tuple(asked.patterns) or (_text(run.model.pattern),)
    check = Check(
        run=run,
        patterns=patterns,
        parametrizations=chosen,
        widths=widths,
        depths=depths,
        seeds=tuple(asked.seeds),
        steps=asked.steps,
    )
    for cell in check.cells:
        build_lib.check(configuration(check, cell))
    return check


def _text(pattern: Any) -> str:
    if isinstance(pattern, str):
        return pattern
    raise UserError(f"model.pattern={pattern} is of groups; name a pattern such as --mixer=a,b")


def configuration(check: Check, cell: Cell) -> Config:
    """The run of a cell; its length and rate are the same for all cells."""
    values: Any = to_mapping(check.run)
    values["model"]["pattern"] = cell.pattern
    mup = values["mup"] | {"parametrization": cell.parametrization, "base_depth": 0, "alpha": 1.0}
    if cell.parametrization == "standard":
        mup |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    if cell.parametrization == "completep":
        own = check.run.mup
        mup |= {"base_depth": own.base_depth or check.run.model.num_layers, "alpha": own.alpha}
    values["mup"] = mup
    wide = sizes.widened(from_mapping(values), cell.width)
    config = sizes.deepened(wide, cell.layers)
    length = dataclasses.replace(config.run, length=Duration(check.steps, "steps"))
    return dataclasses.replace(config, run=length)


def digest(check: Check, cell: Cell) -> str:
    """A digest of everything that a curve depends on except the seed; contents replace paths."""
    config = configuration(check, cell)
    asked = lasting(config) | {"steps": check.steps}
    for name, source in config.data.sources.items():
        asked[f"data.sources.{name}.path"] = answers.digest(source.path) or source.path
    return grid.digest({key: value for key, value in asked.items() if key != "seed"})


def run(
    check: Check,
    prepared: Prepared,
    table: Sequence[Curve],
    report: Callable[[Cell, list[Curve]], None],
) -> list[Curve]:
    """Every curve of the check; those in `table` are not trained again. After each cell,
    `report(cell, curves so far)` is called.
    """
    known = {(curve.digest, curve.seed): curve for curve in table}
    for cell in check.cells:
        name = digest(check, cell)
        missing = [seed for seed in check.seeds if (name, seed) not in known]
        for curve in trained(check, cell, missing, prepared) if missing else ():
            known[name, curve.seed] = curve
        report(cell, list(known.values()))
    return list(known.values())


def trained(check: Check, cell: Cell, seeds: Sequence[int], prepared: Prepared) -> list[Curve]:
    """The curves of one model, which is compiled once for all seeds."""
    config = configuration(check, cell)
    built = build_lib.build(config, jax.devices()[:1])
    token_bytes = built.put_replicated(np.ones(config.data.tokenizer.vocab_size, np.int32))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(state: Any, batch: Batch, at: Batch, numbers: Any) -> Any:
        """The probes before the step, on the batch `at`, and the state after it."""
        return probes(built, state.params, at), built.step(state, batch, token_bytes, numbers)[0]

    init = jax.jit(built.init, compiler_options=QUICK)
    curves = []
    for seed in seeds:
        numbers = built.numbers._replace(seed=np.uint32(seed))
        with loader.create(prepared, config.data, seed=seed, batches=config.batches) as stream:
            batches = [built.put(next(stream)) for _ in range(check.steps + 1)]
        state, taken = init(seed), []
        for batch in batches:  # the result of the last step is not used
            means, state = step(state, batch, batches[0], numbers)
            taken.append(means)
        values = {name: tuple(float(means[name]) for means in taken) for name in taken[0]}
        curves.append(_curve(check, cell, seed, values))
    return curves


def _curve(check: Check, cell: Cell, seed: int, values: Mapping[str, tuple[float, ...]]) -> Curve:
    return Curve(
        **cell._asdict(),
        optimizer=OPTIMIZERS.name_of(type(check.run.optimizer)),
        seed=seed,
        digest=digest(check, cell),
        over="layers" if len(check.depths) > 1 else "width",
        probes=values,
    )


def probes(built: Build, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """The mean |x| of every probe, over the tokens of a batch."""
    inputs = batch.tokens, batch.segment_ids, batch.positions
    applied: Any = built.model.apply(
        {"params": params},
        *inputs,
        method="train",
        mutable=["intermediates"],
        capture_intermediates=lambda _, method: method in ("__call__", "span"),
    )
    (hidden, _), captured = applied
    head: Any = built.model.apply({"params": params}, method="head")
    vocab = head[: built.config.data.tokenizer.vocab_size].astype(jnp.float32)
    logits = hidden.astype(jnp.float32) @ vocab.T
    found = _intermediates(built, captured["intermediates"])
    found |= {"logits": [logits]}
    mean = lambda parts: jnp.mean(jnp.stack([jnp.mean(jnp.abs(part)) for part in parts]))
    return {name: mean(parts) for name, parts in found.items() if parts}


def _intermediates(built: Build, captured: Any) -> dict[str, list[jax.Array]]:
    """The outputs of each kind of module; those of a group are stacked over its repeats."""
    found: dict[str, list[jax.Array]] = {"embedding": [captured["embed"]["__call__"][0]]}
    found |= {"mixer": [], "mlp": [], "stream": []}
    for i, period in enumerate(built.model.groups):
        for j, block in enumerate(period.blocks):
            own = captured[f"groups_{i}"][f"blocks_{j}"]
            found["mixer"].append(own["mixer"]["span"][0][0])
            if block.mlp is not None:
                out = own["mlp"]["__call__"][0]
                found["mlp"].append(out[0] if isinstance(out, tuple) else out)
            found["stream"] = [own["__call__"][0][0][-1]]
    return found


def save(curves: Sequence[Curve], head: Mapping[str, Any], folder: Path) -> None:
    """Writes coord_check.json to the folder, one curve per line."""
    rows = ",\n".join(json.dumps(to_mapping(curve)) for curve in curves)
    text = json.dumps({**head, "coord_check": []}, indent=1)
    files.replace(folder / "coord_check.json", text.replace("[]", f"[\n{rows}\n]", 1) + "\n")


def write(curves: Sequence[Curve], head: Mapping[str, Any], folder: Path) -> None:
    """As `save`, and also coord_check.md, slopes.svg and curves.svg."""
    save(curves, head, folder)
    files.replace(folder / "coord_check.md", page.table(curves))
    files.replace(folder / "slopes.svg", standalone(page.slopes_figure(curves)))
    files.replace(folder / "curves.svg", standalone(page.curves_figure(curves)))


def read(path: Path) -> list[Curve]:
    """The curves of an earlier check.

    Raises:
      UserError: the file does not exist, or is not that of a check.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = [dict(row) for row in values["coord_check"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a table of a coordinate check ({error!r}); name another"
        ) from None
    return page.curves_of(rows)
