"""The configuration of a run: frozen dataclasses, and the checks that involve more than one field.

Order of steps: a file in experiments/ gives nested values, flags override some of them,
`from_mapping` turns the result into `Config` once. Nothing below reads the mapping again. No field
has a default: experiments/base.py states every key.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from lm.mapping import Duration, UserError, convert, difference, flatten, nearest, to_mapping

__all__ = [
    "Config",
    "Duration",
    "UserError",
    "convert",
    "difference",
    "flatten",
    "nearest",
    "to_mapping",
]

REPLICABLE = ("D", "F", "H", "G", "vocab")  # letters that mesh.replicate may name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and layers. `layers` maps a label to {"mixer", "mlp", **mixer options}; a bare mixer
    name needs no label.

    `pattern`: "a", "a,b" or a tuple of labels cycled over depth, or groups ((repeat, (label, ...)),
    ...).

    `remat`: what the backward pass computes anew; under "named" everything but the tensors of
    `kept`, name (lm/modules/remat.py: NAMES) -> where it waits.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    layers: Mapping[str, Mapping[str, Any]]
    pattern: Any
    tied_embeddings: bool
    norm_eps: float
    precision: Literal["float32", "bfloat16", "bfloat16_operands"]
    remat: Literal["none", "full", "dots", "named"]
    kept: Mapping[str, Literal["device", "host"]]
    unroll: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Width parametrization (lm/mup.py). Under `standard` the two multipliers must be 1."""

    parametrization: Literal["mup", "standard"]
    base_width: float
    init_std: float
    embedding_multiplier: float
    residual_multiplier: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`bytes` and `bpe` (trained on the sources) need no path; `json` (tokenizers) and `tiktoken`
    read `path`.
    """

    kind: Literal["bytes", "bpe", "json", "tiktoken"]
    path: str
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Text: `stdlib`, a glob of .txt .md .py .jsonl[.gz] files, or Parquet.

    `weight` is the share of training tokens (0: not trained on). `valid_fraction` of the documents,
    chosen by the hash of their path or id, form the validation set of this source's name (0: none,
    1: all).
    """

    path: str
    text_key: str
    weight: float
    valid_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    tokenizer: TokenizerConfig
    sources: Mapping[str, SourceConfig]
    context_length: int
    batch_size: int
    packing: Literal["concat", "best_fit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of tokens (lm/schedules). `a`, `b` are Power's; `decay_from` a
    trunk checkpoint.
    """

    family: Literal["power", "wsd", "cosine"]
    peak_learning_rate: float
    a: float
    b: float
    warmup: Duration
    decay: Duration
    decay_shape: Literal["exponential", "linear", "sqrt", "cosine"]
    final_ratio: float
    decay_from: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. A step whose loss or gradient is not finite, or whose gradient norm exceeds
    `spike_ratio` times its running mean (0: never), changes nothing but the counters; `max_skipped`
    of them in a row stop the run. `memory`: where the moments live between steps.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    weight_decay_mode: Literal["coupled", "independent", "width_invariant"]
    clip_norm: float
    spike_ratio: float
    max_skipped: int
    memory: Literal["device", "host"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`chunk_size` tokens of logits exist at a time; `z_loss` multiplies the squared log
    normaliser.
    """

    z_loss: float
    chunk_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one may be -1 (all the rest). `replicate`: letters allowed not to
    divide. `zero1` spreads the optimizer state over the data axis, `sequence_parallel` the residual
    stream's time over the tensor axis.
    """

    data: int
    fsdp: int
    tensor: int
    sequence: int
    replicate: tuple[str, ...]
    zero1: bool
    sequence_parallel: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`length` in tokens or steps; `accumulation` microbatches to a step."""

    length: Duration
    accumulation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`max_tokens` of each validation set, every `every`. `tasks`: label -> {"task": a file of
    lm/evals, **its options}; a bare task name as label needs no "task".
    """

    every: Duration
    max_tokens: int
    tasks: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: Duration
    samples: tuple[str, ...]
    sample_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Duration
    keep_last: int
    keep_every: Duration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int
    init_from: str
    model: ModelConfig
    mup: MupConfig
    data: DataConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    mesh: MeshConfig
    run: RunConfig
    evaluate: EvaluateConfig
    log: LogConfig
    checkpoint: CheckpointConfig

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.context_length

    @property
    def run_steps(self) -> int:
        """Length of the run in optimizer steps, rounded up to whole steps."""
        length = self.run.length
        steps = length.value if length.unit == "steps" else length.value / self.tokens_per_step
        return max(1, math.ceil(steps))

    @property
    def run_tokens(self) -> int:
        return self.run_steps * self.tokens_per_step

    def steps(self, duration: Duration) -> int:
        """A duration in whole steps, at least 1 (0 stays 0: never)."""
        tokens = duration.tokens(run_tokens=self.run_tokens, tokens_per_step=self.tokens_per_step)
        return max(1, round(tokens / self.tokens_per_step)) if tokens > 0 else 0


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Nested plain values -> validated Config.

    Raises:
      UserError: an unknown or missing key, a value of the wrong type, or two values that contradict
      each other.
    """
    config = typing.cast(Config, convert(Config, mapping, "config"))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Checks that involve ranges or several fields, before any device is touched."""
    _positive(config)
    m, d, o = config.model, config.data, config.optimizer
    if m.num_heads % m.num_kv_heads:
        raise UserError(
            f"model.num_heads={m.num_heads} is not a multiple of "
            f"model.num_kv_heads={m.num_kv_heads}; "
            "set num_kv_heads to a divisor"
        )
    if d.batch_size % config.run.accumulation:
        raise UserError(
            f"data.batch_size={d.batch_size} is not a multiple of "
            f"run.accumulation={config.run.accumulation}; "
            "set accumulation to a divisor"
        )
    if not all(config.log.samples):
        raise UserError("log.samples holds an empty prompt; nothing is known of a first token")
    if config.run.length.unit == "percent" or config.run.length.value <= 0:
        raise UserError(
            f"run.length={config.run.length} must be a positive number of tokens or steps"
        )
    if config.init_from and config.schedule.decay_from:
        raise UserError(
            f"init_from={config.init_from!r} and "
            f"schedule.decay_from={config.schedule.decay_from!r} exclude each "
            "other; set one of them to ''"
        )
    for name, value in (("beta1", o.beta1), ("beta2", o.beta2)):
        if not 0.0 <= value < 1.0:
            raise UserError(f"optimizer.{name}={value} must lie in [0, 1)")
    _validate_parametrization(config)
    _validate_schedule(config)
    _validate_sources(d)
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, at most one of them -1")
    for letter in config.mesh.replicate:
        if letter not in REPLICABLE:
            raise UserError(f"mesh.replicate: {letter!r} is no size; {nearest(letter, REPLICABLE)}")


def _positive(config: Config) -> None:
    must = {
        "model": (
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_dim",
            "norm_eps",
        ),
        "mup": ("base_width", "init_std", "embedding_multiplier", "residual_multiplier"),
        "data": ("context_length", "batch_size"),
        "schedule": ("peak_learning_rate",),
        "optimizer": ("eps", "clip_norm", "max_skipped"),
        "loss": ("chunk_size",),
        "run": ("accumulation",),
        "evaluate": ("max_tokens",),
        "checkpoint": ("keep_last",),
        "log": ("sample_tokens",),
    }
    for section, names in must.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value <= 0:
                raise UserError(f"{section}.{name}={value} must be positive")
    for where, value in (
        ("seed", config.seed),
        ("loss.z_loss", config.loss.z_loss),
        ("optimizer.weight_decay", config.optimizer.weight_decay),
        ("optimizer.spike_ratio", config.optimizer.spike_ratio),
    ):
        if value < 0:
            raise UserError(f"{where}={value} must be >= 0")
    if config.seed >= 1 << 31:
        raise UserError(f"seed={config.seed} must be below 2^31")


def _validate_parametrization(config: Config) -> None:
    mup = config.mup
    if mup.parametrization == "standard":
        for name in ("embedding_multiplier", "residual_multiplier"):
            if getattr(mup, name) != 1.0:
                raise UserError(
                    f"mup.{name}={getattr(mup, name)} with mup.parametrization='standard'; set it "
                    "to 1.0"
                )


def _validate_schedule(config: Config) -> None:
    s = config.schedule
    if s.family == "power" and not (s.a > 0 and s.b < 0):
        raise UserError(
            f"schedule.a={s.a}, schedule.b={s.b}: Power needs a > 0 and b < 0 (published: 4, -0.51)"
        )
    if not 0.0 <= s.final_ratio <= 1.0:
        raise UserError(f"schedule.final_ratio={s.final_ratio} must lie in [0, 1]")
    tokens = {
        name: d.tokens(run_tokens=config.run_tokens, tokens_per_step=config.tokens_per_step)
        for name, d in (("warmup", s.warmup), ("decay", s.decay))
    }
    if s.decay_from:
        if s.decay.value <= 0 or (s.decay.unit == "percent" and s.decay.value >= 100):
            raise UserError(
                f"schedule.decay={s.decay} with schedule.decay_from; set a decay > 0 (percent < "
                "100)"
            )
    elif s.family != "cosine" and tokens["warmup"] + tokens["decay"] > config.run_tokens:
        raise UserError(
            f"schedule.warmup={s.warmup} and schedule.decay={s.decay} take "
            f"{sum(tokens.values()):.0f} tokens, "
            f"run.length has {config.run_tokens}; shorten them or lengthen the run"
        )


def _validate_sources(data: DataConfig) -> None:
    if data.sources and not any(source.weight > 0 for source in data.sources.values()):
        raise UserError(
            "data.sources has no source with weight > 0; set the weight of at least one"
        )
    for name, source in data.sources.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"data.sources.{name}: a name takes letters, digits, _ and -; rename it"
            )
        if source.weight < 0:
            raise UserError(f"data.sources.{name}.weight={source.weight} must be >= 0")
        if not 0.0 <= source.valid_fraction <= 1.0:
            raise UserError(
                f"data.sources.{name}.valid_fraction={source.valid_fraction} must lie in [0, 1]"
            )
        if source.valid_fraction == 1.0 and source.weight > 0:
            raise UserError(
                f"data.sources.{name} has valid_fraction=1 and weight={source.weight}: nothing is "
                "left to train on; "
                "set weight to 0 or valid_fraction below 1"
            )
    if data.tokenizer.kind in ("json", "tiktoken") and not data.tokenizer.path:
        raise UserError(f"data.tokenizer.kind={data.tokenizer.kind!r} needs data.tokenizer.path")
    if data.tokenizer.kind in ("bytes", "bpe") and data.tokenizer.path:
        raise UserError(
            f"data.tokenizer.path is set but kind={data.tokenizer.kind!r} reads no file; set path "
            "to ''"
        )
    if data.tokenizer.vocab_size < 257:
        raise UserError(
            f"data.tokenizer.vocab_size={data.tokenizer.vocab_size} must be >= 257 (bytes and end "
            "of text)"
        )
