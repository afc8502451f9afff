"""The configuration of a run: frozen dataclasses, and the checks that involve more than one field.

A file in experiments/ gives nested values, flags override some of them, and `from_mapping` turns
the result into `Config` once. Nothing after that reads the mapping. No field has a default:
experiments/base.py states every key. The sections are in lm/sections.py. A field marked with a
family (lm/families.py) holds a member of it; the options and checks of a member are in its own
file.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from lm import families
from lm.data import config as data_config
from lm.data import growth
from lm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.growth import Batches
from lm.mapping import (
    FREE,
    Bound,
    Duration,
    Holds,
    UserError,
    convert,
    difference,
    flatten,
    nearest,
    to_mapping,
)
from lm.sections import (
    CheckpointConfig,
    EvaluateConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MupConfig,
    RunConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Duration",
    "EvaluateConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "MupConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "UserError",
    "convert",
    "difference",
    "flatten",
    "nearest",
    "to_mapping",
]

REPLICABLE = ("D", "F", "H", "G", "vocab")  # letters that mesh.replicate may name
SEED = Bound("must lie in [0, 2^31)", lambda x: 0 <= x < 1 << 31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      seed: seed of the parameters and of the order of the data
      init_from: checkpoint, WORKDIR or WORKDIR/checkpoints/STEP, whose weights the run starts from;
        empty: random ones
      decay_from: checkpoint of another run, its trunk, from which this run decays
        (lm/run/origin.py); empty: the run has no trunk but its own
      model: the model
      mup: its parametrization
      data: the training data
      schedule: the learning rate as a function of tokens
      optimizer: the optimizer
      objective: the loss, summed over tokens, whose gradient is taken
      loss: the cross-entropy
      mesh: the devices
      run: the length of the run
      evaluate: evaluation while training
      log: the log
      checkpoint: checkpoints
    """

    seed: Annotated[int, SEED]
    init_from: str
    decay_from: str
    model: ModelConfig
    mup: MupConfig
    data: DataConfig
    schedule: Annotated[Any, families.SCHEDULES]
    optimizer: Annotated[Any, families.OPTIMIZERS]
    objective: Annotated[Any, families.OBJECTIVES]
    loss: LossConfig
    mesh: Annotated[MeshConfig, FREE]
    run: RunConfig
    evaluate: Annotated[EvaluateConfig, FREE]
    log: Annotated[LogConfig, FREE]
    checkpoint: Annotated[CheckpointConfig, FREE]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step with the full batch size."""
        return self.data.batch_size * self.data.context_length

    @property
    def batches(self) -> Batches:
        """The number of rows of every batch."""
        data = self.data
        return growth.batches(data.batch_size, data.batch_warmup, data.context_length)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before number `step`; the first step is number 0."""
        return self.batches.before(step) * self.data.context_length

    def steps_of(self, tokens: float) -> float:
        """The inverse of `tokens_before`; a token count between two steps gives a fraction."""
        return self.batches.steps(tokens / self.data.context_length)

    @property
    def run_steps(self) -> int:
        """Length of the run in optimizer steps, rounded up to whole steps."""
        length = self.run.length
        steps = length.value if length.unit == "steps" else self.steps_of(length.value)
        return max(1, math.ceil(steps))

    @property
    def run_tokens(self) -> int:
        return self.tokens_before(self.run_steps)

    def steps(self, duration: Duration) -> int:
        """A duration in whole steps of the full batch, at least 1; a duration of 0 stays 0."""
        tokens = duration.tokens(run_tokens=self.run_tokens, tokens_per_step=self.tokens_per_step)
        return max(1, round(tokens / self.tokens_per_step)) if tokens > 0 else 0


# In a study: the plain values of a whole run, which each of its trainings changes.
RunValues = Annotated[Mapping[str, Any], Holds(Config)]


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Nested plain values -> validated Config.

    Raises:
      UserError: a key is unknown or missing, a value has the wrong type, or two values contradict
      each other.
    """
    config = typing.cast(Config, convert(Config, mapping, "config"))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Checks that involve several fields, before any device is touched."""
    m, d = config.model, config.data
    if m.num_heads % m.num_kv_heads:
        raise UserError(
            f"model.num_heads={m.num_heads} is not a multiple of "
            f"model.num_kv_heads={m.num_kv_heads}; "
            f"set model.num_kv_heads={math.gcd(m.num_heads, m.num_kv_heads)} or another divisor"
        )
    if d.batch_size % config.run.accumulation:
        raise UserError(
            f"data.batch_size={d.batch_size} is not a multiple of "
            f"run.accumulation={config.run.accumulation}; set run.accumulation="
            f"{math.gcd(d.batch_size, config.run.accumulation)} or another divisor"
        )
    data_config.check(d)
    if d.batch_warmup.first % config.run.accumulation:
        raise UserError(
            f"data.batch_warmup.first={d.batch_warmup.first} is not a multiple of "
            f"run.accumulation={config.run.accumulation}; set run.accumulation="
            f"{math.gcd(d.batch_warmup.first, config.run.accumulation)}"
        )
    if not all(config.log.samples) and not config.data.tokenizer.bos:
        raise UserError(
            "log.samples holds an empty prompt, and the model predicts no first token; remove it"
        )
    if config.run.length.unit == "percent" or config.run.length.value <= 0:
        raise UserError(
            f"run.length={config.run.length} must be a positive number of tokens or steps"
        )
    _validate_sizes(config)
    if config.init_from and config.decay_from:
        raise UserError(
            f"init_from={config.init_from!r} and decay_from={config.decay_from!r} exclude each "
            "other; set one of them to ''"
        )
    message = config.schedule.misfit(
        run_tokens=config.run_tokens,
        tokens_per_step=config.tokens_per_step,
        is_branch=bool(config.decay_from),
    )
    if message is not None:
        raise UserError(message)
    _validate_parametrization(config.mup, config.model.num_layers)
    validate_mesh(config.mesh)


def _validate_sizes(config: Config) -> None:
    """Checks that products of sizes fit the integers that count them, and fit any machine."""
    m, d = config.model, config.data
    if config.tokens_per_step >= 1 << 31:
        raise UserError(
            f"data.batch_size={d.batch_size} rows of data.context_length={d.context_length} are "
            f"{config.tokens_per_step} tokens a step, which must be below 2^31; lower either"
        )
    if config.run_steps >= 1 << 31:
        raise UserError(
            f"run.length={config.run.length} is {config.run_steps} steps, which must be below "
            "2^31; shorten it"
        )
    heads = max(m.num_heads, m.num_kv_heads) * m.head_dim
    layers = f" in model.num_layers={m.num_layers}"
    for name, size, count, where in (
        ("data.tokenizer.vocab_size", d.tokenizer.vocab_size, 1, ""),
        ("model.ffn_dim", m.ffn_dim, m.num_layers, layers),
        ("model.num_heads * model.head_dim", heads, m.num_layers, layers),
    ):
        if (weights := m.width * size * count) >= 1 << 44:
            raise UserError(
                f"model.width={m.width} with {name}={size}{where} are {weights:.1e} weights, which "
                "must be below 2^44 (70 TB); lower one of them"
            )


def _validate_parametrization(mup: MupConfig, num_layers: int) -> None:
    if mup.parametrization == "completep" and not mup.base_depth:
        raise UserError(
            "mup.parametrization='completep' needs the depth at which its rates are stated; set "
            f"mup.base_depth={num_layers} or another, or mup.parametrization='mup'"
        )
    for name, neutral in (("base_depth", 0), ("alpha", 1.0)):
        if mup.parametrization != "completep" and getattr(mup, name) != neutral:
            raise UserError(
                f"mup.{name}={getattr(mup, name)} is only used by completep, and "
                f"mup.parametrization={mup.parametrization!r}; set mup.{name}={neutral}"
            )
    if mup.parametrization == "standard":
        for name in ("embedding_multiplier", "residual_multiplier"):
            if getattr(mup, name) != 1.0:
                raise UserError(
                    f"mup.{name}={getattr(mup, name)} with mup.parametrization='standard'; set "
                    f"mup.{name}=1.0"
                )


def validate_mesh(mesh: MeshConfig) -> None:
    """UserError for sizes that no number of devices has, and letters that are not replicable."""
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor, "sequence": mesh.sequence}
    if [*sizes.values()].count(-1) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
        given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        wrong = [axis for axis, size in sizes.items() if size < 1]
        key = next((axis for axis in wrong if sizes[axis] != -1), wrong[-1])
        raise UserError(
            f"mesh {given}: sizes must be positive, and one may be -1 (all that is left); set "
            f"mesh.{key}=1"
        )
    for letter in mesh.replicate:
        if letter not in REPLICABLE:
            raise UserError(
                f"mesh.replicate: {letter!r} is not a size; {nearest(letter, REPLICABLE)}"
            )
