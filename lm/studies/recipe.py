"""A recipe from a budget: what the published laws say about rate, batch, warmup, decay, vocabulary
and growth, side by side, and a configuration that follows them.

Order of steps: `budget` makes the budget from any two of FLOPs, parameters and tokens (C = 6 N D,
N without embeddings). `sized` returns a configuration of that size. `rows` returns every law's
answer, the evidence for it, and which parts of the budget lie outside its domain. `configured`
returns the recipe itself: Power's schedule under muP, with the geometric mean of the laws' batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import build as build_lib
from lm import mup
from lm import params as params_lib
from lm.config import Config, UserError, from_mapping, to_mapping
from lm.laws import chinchilla as chinchilla_law
from lm.laws.chinchilla import Chinchilla
from lm.laws.critical_batch import CriticalBatch
from lm.laws.growth_timing import GrowthTiming
from lm.laws.over_training import OverTraining
from lm.laws.power import Power
from lm.laws.step_law import StepLaw
from lm.laws.vocabulary import Vocabulary
from lm.studies import sizes

STEPS = 100  # in fewer steps a schedule has hardly any effect
WARMUP_STEPS, WARMUP, DECAY = 2500, 0.01, 0.10  # PowerLM [P], 1 % [S], MiniCPM's decay [P]
FAR = 0.1  # a size that differs from the requested one by more than this share gets a warning


class Budget(NamedTuple):
    """`flops` = 6 `parameters` (without embeddings) `tokens`."""

    flops: float
    parameters: float
    tokens: float


class Row(NamedTuple):
    """What a law says. `tag` is the evidence for its constants; `notes` say what lies outside its
    domain.
    """

    quantity: str
    law: str
    value: float
    unit: str
    tag: str
    notes: tuple[str, ...] = ()


class Spread(NamedTuple):
    """For the laws of one quantity: the smallest value, the middle (geometric mean), and the ratio
    of the largest to the smallest.
    """

    quantity: str
    least: float
    middle: float
    times: float


def budget(flops: float | None, parameters: float | None, tokens: float | None) -> Budget:
    """The budget; any two values give the third.

    Raises:
      UserError: not exactly two are given, or one is not positive.
    """
    given = {"flops": flops, "parameters": parameters, "tokens": tokens}
    known = {name: value for name, value in given.items() if value is not None}
    if len(known) != 2:
        named = ", ".join(f"--{name}" for name in known) or "none of them"
        raise UserError(f"{named} is given; set two of --flops, --parameters and --tokens")
    for name, value in known.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name}={value:g} must be positive and finite")
    first, second = known
    if flops is None:
        flops = 6.0 * (parameters or 0.0) * (tokens or 0.0)
    elif parameters is None:
        parameters = flops / 6.0 / (tokens or 1.0)
    else:
        tokens = flops / 6.0 / parameters
    found = Budget(float(flops), float(parameters or 0.0), float(tokens or 0.0))
    for name, value in found._asdict().items():
        if not 1 <= value < math.inf:
            raise UserError(
                f"--{first}={known[first]:g} and --{second}={known[second]:g} make {value:g} "
                f"{name}, which must be at least 1 and finite; set others"
            )
    return found


def body_parameters(config: Config) -> int:
    """Parameters without embeddings and head; nothing is allocated."""
    infos = build_lib.local(config).infos
    return params_lib.count(infos, without="vocab")["total"]


def sized(base: Config, parameters: float) -> Config:
    """`base` with about this many parameters without embeddings. Heads keep their width, and the
    ratio of width to depth stays about the same.

    Raises:
      UserError: fewer parameters than a model of one layer has.
    """
    m = base.model
    unit = m.width // math.gcd(m.num_heads, m.num_kv_heads, m.ffn_dim, m.width)
    layer = body_parameters(base) / m.num_layers / m.width**2  # per layer and width squared
    aspect = m.width / m.num_layers
    ideal = (parameters * aspect / layer) ** (1 / 3)
    width = unit * max(1, round(ideal / unit))
    num_layers = round(parameters / (layer * width**2))
    if num_layers < 1:
        raise UserError(
            f"{parameters:.3g} parameters are fewer than one layer of width {width} has, "
            f"{layer * width**2:.3g}; set more, or a --config with narrower heads"
        )
    return sizes.deepened(sizes.widened(base, width), num_layers)


def rows(asked: Budget, config: Config) -> list[Row]:
    """Every law's answer for a budget and a sized configuration."""
    return [
        *_split(asked),
        *_losses(asked),
        *_batches(asked),
        *_rates(asked, config),
        *_lengths(asked, config),
        *_vocabulary(asked, config),
        *_growth(asked),
    ]


def _row(quantity: str, name: str, value: Any, unit: str, law: Any, constant: str, at: Any) -> Row:
    tag = law.constant(constant).tag
    return Row(quantity, name, float(value), unit, tag, law.outside(**at))


def _at(asked: Budget) -> dict[str, float]:
    return {
        "body_parameters": asked.parameters,
        "tokens": asked.tokens,
        "tokens_per_parameter": asked.tokens / asked.parameters,
    }


def _split(asked: Budget) -> Iterable[Row]:
    at = _at(asked)
    laws = {
        "chinchilla": (Chinchilla(), "A"),
        "chinchilla, refit": (chinchilla_law.refitted(), "A of the refit"),
    }
    for name, (law, constant) in laws.items():
        best = law.best_parameters(asked.flops)
        yield _row("parameters at these FLOPs", name, best, "", law, constant, at)
    ratio = Chinchilla.constant("tokens per parameter of MiniCPM")
    best = math.sqrt(asked.flops / 6.0 / ratio.value)
    yield Row("parameters at these FLOPs", "MiniCPM", best, "", ratio.tag, ratio.outside(**at))


def _losses(asked: Budget) -> Iterable[Row]:
    at, n, d = _at(asked), asked.parameters, asked.tokens
    what = "loss", "nats a token"
    yield _row(what[0], "chinchilla", Chinchilla().loss(n, d), what[1], Chinchilla, "A", at)
    refit = chinchilla_law.refitted()
    yield _row(what[0], "chinchilla, refit", refit.loss(n, d), what[1], refit, "A of the refit", at)
    over = OverTraining()
    yield _row(what[0], "over_training", over.loss(asked.flops, d / n), what[1], over, "a", at)


def _batches(asked: Budget) -> Iterable[Row]:
    at, law = _at(asked), CriticalBatch()
    step = StepLaw()
    yield _row("batch", "step_law", step.batch(asked.tokens), "tokens", step, "h", at)
    critical = law.batch(asked.parameters)
    yield _row("batch", "critical_batch, Zhang", critical, "tokens", law, "k", at)
    loss = chinchilla_law.refitted().loss(asked.parameters, asked.tokens)
    minicpm = law.batch_of_loss(loss)
    yield _row("batch", "critical_batch, MiniCPM", minicpm, "tokens", law, "h", at)


def _rates(asked: Budget, config: Config) -> Iterable[Row]:
    """Peak rates of a run that decays to zero. Under muP they are the schedule's; the rate of
    hidden matrices is that divided by their multiplier.
    """
    batch = config.tokens_per_step
    at = _at(asked) | {"batch_tokens": float(batch)}
    power, step = Power(), StepLaw()
    rate = power.capped(batch, asked.tokens)
    yield _row("rate, muP", "power, of a WSD run", rate, "", power, "a", at)
    yield Row("rate, muP", "MiniCPM", 0.01, "", "P", _outside("MiniCPM", asked, 40e6, 2.1e9))
    rate = step.rate(asked.parameters, asked.tokens)
    yield _row("rate, standard", "step_law, of a cosine", rate, "", step, "k", at)


def _outside(name: str, asked: Budget, low: float, high: float) -> tuple[str, ...]:
    if low <= asked.parameters <= high:
        return ()
    return (
        f"body_parameters={asked.parameters:.4g} lies outside {low:.4g} to {high:.4g} ({name})",
    )


def _lengths(asked: Budget, config: Config) -> Iterable[Row]:
    steps = config.tokens_per_step
    yield Row("warmup", "PowerLM, 2,500 steps", WARMUP_STEPS * steps, "tokens", "P")
    yield Row("warmup", "DeepSeek, 2,000 steps", 2000.0 * steps, "tokens", "S")
    yield Row("warmup", "Ibrahim et al., 1 %", WARMUP * asked.tokens, "tokens", "S")
    yield Row("decay", "MiniCPM, 10 %", DECAY * asked.tokens, "tokens", "P")
    yield Row("decay", "Hagele et al., 20 %", 0.20 * asked.tokens, "tokens", "S")


def _vocabulary(asked: Budget, config: Config) -> Iterable[Row]:
    law = Vocabulary()
    note = _outside("Tao et al.", asked, 3e9, 300e9)
    yield Row("vocabulary", "vocabulary, by size", law.best(asked.parameters), "words", "S", note)
    words = law.at_compute(asked.flops)[1] / config.model.width
    yield Row("vocabulary", "vocabulary, by FLOPs", words, "words", "S", note)


def _growth(asked: Budget) -> Iterable[Row]:
    law = GrowthTiming()
    tokens = law.tokens(asked.parameters, asked.flops)
    what = "tokens before growth", f"growth_timing, stacked {law.factor} times"
    yield _row(*what, tokens, "tokens", law, "a", _at(asked))


def spreads(found: Sequence[Row]) -> list[Spread]:
    """The spread of every quantity that several laws predict."""
    values: dict[str, list[float]] = {}
    for row in found:
        values.setdefault(row.quantity, []).append(row.value)
    return [
        Spread(name, min(xs), float(np.exp(np.mean(np.log(xs)))), max(xs) / min(xs))
        for name, xs in values.items()
        if len(xs) > 1
    ]


def configured(base: Config, asked: Budget) -> Config:
    """The recipe: `base` at the size of the budget, with the middle of the laws' batches, Power's
    schedule (which needs no tuned peak) and, if a tokenizer is trained, the laws' vocabulary.

    Raises:
      UserError: the budget does not allow such a run.
    """
    config = sized(base, asked.parameters)
    middle = {spread.quantity: spread.middle for spread in spreads([*_batches(asked)])}
    context = config.data.context_length
    most = int(asked.tokens / STEPS / context)
    if most < 1:
        raise UserError(
            f"{asked.tokens:.3g} tokens are fewer than {STEPS} steps of one row of "
            f"data.context_length={context}; set more tokens, or a shorter context"
        )
    batch = min(2 ** round(math.log2(max(middle["batch"] / context, 1.0))), most)
    values: Any = to_mapping(config)
    values["data"]["batch_size"] = batch
    values["data"].pop("batch_warmup", None)  # it was for another batch size
    if config.data.tokenizer.kind == "bpe":
        best = Vocabulary().best(asked.parameters)
        values["data"]["tokenizer"]["vocab_size"] = max(320, 64 * round(best / 64))
    steps = math.ceil(asked.tokens / (batch * context))
    warmup = min(WARMUP_STEPS, max(1, round(WARMUP * steps)))
    values["run"] |= {"length": f"{steps} steps", "accumulation": 1}
    law = Power()
    values["schedule"] = {
        "family": "power",
        "peak_learning_rate": law.eta_max,
        "a": law.a,
        "b": law.b,
        "warmup": f"{warmup} steps",
        "decay": f"{100 * DECAY:g} percent",
    }
    if config.mup.parametrization == "mup":  # MiniCPM's rule (arXiv 2404.06395)
        values["mup"]["residual_multiplier"] = round(1.4 / math.sqrt(config.model.num_layers), 4)
    return from_mapping(values)


def multipliers(config: Config) -> dict[str, float]:
    """The multipliers of the configuration, by name."""
    made = mup.create(config)
    groups: Mapping[str, Callable[[str], float]] = {"rate": made.learning_rate}
    found = {
        "width over base width": made.width,
        "embedding": made.embedding,
        "residual branches": made.residual,
        "logits": made.logits,
        "attention logits": made.attention_scale(config.model.head_dim),
        "init std of hidden matrices": made.init_std("hidden"),
        "init std of embeddings": made.init_std("input"),
    }
    return found | {
        f"{name} of {group}": value(group)
        for name, value in groups.items()
        for group in made.groups
    }


def warnings(found: Sequence[Row], asked: Budget, config: Config) -> list[str]:
    """One sentence for each value outside a law's domain, and for a size far from the requested."""
    notes = list(dict.fromkeys(note for row in found for note in row.notes))
    actual = body_parameters(config)
    if abs(actual / asked.parameters - 1.0) > FAR:
        notes.append(
            f"the configuration has {actual:,} parameters without embeddings, "
            f"{asked.parameters:.3g} were asked for: widths and depths are whole"
        )
    advice = Vocabulary().advice(config.data.tokenizer.vocab_size, asked.parameters)
    return notes + ([advice] if advice else [])
