"""Training, in one straight line.

    config -> data -> devices, build -> restore or init -> record -> loop -> samples -> report

The loop never waits for the device: the metrics of step n are fetched after step n + 1 is
dispatched. One record a step goes to metrics.jsonl, complete before the checkpoint of that step
starts, so that a run killed anywhere and resumed leaves the same records and the same parameters,
bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import build as build_lib
from lm import checkpoint, evals, evaluate, files, generate, metrics, record, report
from lm import model as model_lib
from lm.build import Build
from lm.checkpoint import Checkpointer, Meta
from lm.config import Config, Duration, UserError
from lm.data import loader as loader_lib
from lm.data import prepare as prepare_lib
from lm.data import tokenizers
from lm.data.loader import Loader
from lm.data.tokenizers import Tokenizer
from lm.evals import Given
from lm.progress import TrainingBar
from lm.scoring import Scorer
from lm.state import TrainState

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run lives and reads from. `profile_steps` of them are traced into workdir/profile (0:
    none).
    """

    workdir: Path
    data_dir: Path
    profile_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`finished` False: stopped by a signal, saved at `step`. `evaluation`: bits per byte by
    validation set; `samples`: records of samples.jsonl.
    """

    step: int
    finished: bool
    evaluation: dict[str, float]
    samples: list[dict[str, Any]]
    report: Path


def run(config: Config, options: Options) -> Outcome:
    """Trains to the end of the configuration's length, resuming what the workdir holds.

    Raises:
      UserError: a mistake in the configuration, the data, the workdir or a checkpoint; or too many
      skipped steps.
    """
    workdir = options.workdir
    model_lib.check(config.model)
    tasks = evals.create(config.evaluate.tasks, "evaluate.tasks") | evaluate.always(config.data)
    with contextlib.ExitStack() as stack:
        stack.enter_context(record.locked(workdir))
        record.check_unchanged(workdir, config)
        origin = _origin(config, workdir)
        decay_start = _decay_start(config, workdir, origin)
        is_new = not (workdir / "run.json").exists()
        tokenizer = _tokenizer(config, workdir, origin)
        prepared = prepare_lib.prepare(
            config.data, options.data_dir, tokenizer=tokenizer, verify=is_new
        )
        _one_process()
        built = build_lib.build(config, jax.devices(), decay_start)
        loader = stack.enter_context(
            loader_lib.create(
                prepared, config.data, seed=config.seed, batch_size=config.data.batch_size
            )
        )
        saver = stack.enter_context(Checkpointer(workdir, config))
        state = _restore_or_init(config, built, saver, loader, origin)
        step, end = int(state.step), built.run_tokens // config.tokens_per_step
        _check_not_past(step, end, workdir)
        record.write(workdir, built, prepared.tokenizer, loader.identity, decay_start)
        metrics.truncate(workdir, step)
        stop = stack.enter_context(_stop_signals())
        bar = stack.enter_context(
            TrainingBar(start=step, end=end, tokens_per_step=config.tokens_per_step)
        )
        token_bytes = built.put_replicated(_padded_bytes(prepared.tokenizer, built))
        given = Given(prepared.tokenizer, prepared, config.data, config.evaluate.max_tokens)
        questions = evaluate.prepare(tasks, given)
        clock = _Clock(built, config)
        profiler = stack.enter_context(_Profiler(workdir, options.profile_steps, step, end))

        def evaluation() -> Record | None:
            return _evaluate(questions, Scorer(built, state.params), stop)

        def finish(pending: tuple[int, Any] | None, extra: Record) -> None:
            """Fetches a step's metrics, which may wait for the device, and writes its record."""
            if pending is None:
                return
            at, arrays = pending
            values = {k: float(v) for k, v in jax.device_get(arrays).items()}
            in_row = values.pop("optim/skipped_in_row")
            bar.update(at, values | extra)
            if at == end or any(
                _due(at, built, e) for e in (config.log.every, config.evaluate.every)
            ):
                counts = {"step": at, "tokens": at * config.tokens_per_step}
                writer.write(counts | values | clock.lap(at) | extra)
            _stop_if_stuck(config, workdir, at, in_row, values["train/loss"])

        def save() -> None:
            meta = Meta(step, step * config.tokens_per_step, decay_start, {}, {})
            saver.save(state, loader.state() | {"identity": loader.identity}, meta)

        def due(every: Duration) -> bool:
            return step == end or _due(step, built, every)

        if step and due(config.evaluate.every):
            _mend_record(workdir, step, evaluation)
        writer = stack.enter_context(metrics.Writer(workdir))
        pending: tuple[int, Any] | None = None
        while step < end and not stop():
            batch = built.put(next(loader))
            profiler.at(step)
            state, arrays = built.step(state, batch, token_bytes)
            finish(pending, {})
            step, pending = step + 1, (step + 1, arrays)
            if due(config.evaluate.every):
                jax.block_until_ready(arrays)
                timing = clock.lap(step)
                finish(pending, timing | (evaluation() or {}))
                pending = None
                clock.pause()
            if due(config.checkpoint.every):
                finish(pending, {})
                pending = None
                save()
        finish(pending, {})
        save()
        saver.wait()
        finished = step >= end and not stop()
        loaded = checkpoint.Loaded(
            built.model, state.params, prepared.tokenizer, config, step, built
        )
        samples = _sample(workdir, loaded) if finished else []
        page = report.write([workdir], workdir / "report.html")
    return Outcome(step, finished, _last_evaluation(workdir), samples, page)


def _origin(config: Config, workdir: Path) -> Path | None:
    """The checkpoint folder the configuration names, if it is still to be read: a run that has
    checkpoints of its own no longer needs it.
    """
    named = config.schedule.decay_from or config.init_from
    return checkpoint.locate(Path(named)) if named and not checkpoint.steps(workdir) else None


def _decay_start(config: Config, workdir: Path, origin: Path | None) -> float | None:
    """Tokens at which the decay branched; a resumed run reads its own record, never again the
    trunk.
    """
    if not config.schedule.decay_from:
        return None
    if origin is not None:
        return float(checkpoint.read_meta(origin).tokens)
    return record.recorded(workdir, "decay_start")


def _tokenizer(config: Config, workdir: Path, origin: Path | None) -> Tokenizer | None:
    """The tokenizer this run, or the one it starts from, already uses.

    Raises:
      UserError: it is not the one recorded, or not the one that the configuration gives.
    """
    own = workdir / checkpoint.TOKENIZER
    if own.exists():
        used, known = tokenizers.load(own), record.recorded(workdir, "tokenizer", "sha256")
        if used.sha256 != known:
            raise UserError(
                f"{own} has sha256 {used.sha256[:12]}, recorded was {known[:12]}; restore it or "
                "choose another workdir"
            )
        return used
    if origin is None:
        return None
    path = origin.parent.parent / checkpoint.TOKENIZER
    used, asked = tokenizers.load(path), config.data.tokenizer
    # A trained one is known by its file alone; every other kind the configuration gives whole.
    known = used.kind if asked.kind == "bpe" else tokenizers.create(asked).sha256
    if known != ("tokenizers" if asked.kind == "bpe" else used.sha256):
        raise UserError(
            f"{path} is another tokenizer (kind {used.kind}, sha256 {used.sha256[:12]}) than "
            f"data.tokenizer.kind={asked.kind!r} gives; set data.tokenizer to the one it came from"
        )
    return used


def _check_not_past(step: int, end: int, workdir: Path) -> None:
    if step > end:
        raise UserError(
            f"run.length ends at step {end} and --workdir={workdir} is at step {step} already; "
            "lengthen the run or choose another workdir"
        )


def _restore_or_init(
    config: Config, built: Build, saver: Checkpointer, loader: Loader, origin: Path | None
) -> TrainState:
    restored = saver.restore_latest(built.abstract_state)
    if restored is None and config.schedule.decay_from and origin is not None:
        restored = checkpoint.restore(origin, built.abstract_state)
    if restored is not None:
        loader_lib.check_identity(restored.loader["identity"], loader.identity)
        loader.set_state(restored.loader)
        return restored.state
    state = built.init(config.seed)
    if config.init_from and origin is not None:
        state = state._replace(params=checkpoint.restore_params(origin, built.abstract_state))
    return state


def _one_process() -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes: training runs in one process so far; start one"
        )


def _padded_bytes(tokenizer: Tokenizer, built: Build) -> np.ndarray:
    """UTF-8 bytes per id, as long as the configured vocabulary (a trained one may be smaller)."""
    size = built.abstract_token_bytes.shape[0]
    return np.pad(tokenizer.token_bytes, (0, size - len(tokenizer.token_bytes))).astype(np.int32)


def _due(step: int, built: Build, every: Duration) -> bool:
    """Whether a multiple of `every` falls on this step; a fraction of a step counts, so that the
    last quarter of a run ends with the run.
    """
    per_step = built.config.tokens_per_step
    tokens = every.tokens(run_tokens=built.run_tokens, tokens_per_step=per_step)
    period = max(1.0, tokens / per_step)
    return tokens > 0 and int(step / period + 1e-9) > int((step - 1) / period + 1e-9)


def _sample(workdir: Path, loaded: checkpoint.Loaded) -> list[dict[str, Any]]:
    """Continues the prompts of log.samples, greedily and sampled, into samples.jsonl."""
    log = loaded.config.log
    lines: list[dict[str, Any]] = []
    for kind, temperature in (("greedy", 0.0), ("sampled", 0.8)) if log.samples else ():
        options = generate.GenerateOptions(
            max_new_tokens=log.sample_tokens,
            temperature=temperature,
            top_k=0,
            top_p=0.95,
            seed=loaded.config.seed,
        )
        texts = generate.complete(loaded, list(log.samples), options)
        for prompt, text in zip(log.samples, texts, strict=True):
            lines.append({"step": loaded.step, "kind": kind, "prompt": prompt, "text": text})
    files.replace(workdir / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _evaluate(
    questions: Mapping[str, evaluate.Prepared], scorer: Scorer, stop: Callable[[], bool]
) -> Record | None:
    """Loss and bits per byte of every validation set, and the numbers of the tasks; None if a stop
    was asked for meanwhile.
    """
    try:
        return evaluate.to_record(evaluate.run(questions, scorer, stop))
    except evaluate.Stopped:
        return None


def _mend_record(workdir: Path, step: int, evaluation: Callable[[], Record | None]) -> None:
    """A signal may have cut the evaluation at `step` short: its record is then written anew."""
    last = [line for line in metrics.read(workdir) if line["step"] == step]
    if last and not any(key.startswith("eval/") for key in last[-1]):
        found = evaluation()
        if found:
            metrics.truncate(workdir, step - 1)
            with metrics.Writer(workdir) as writer:
                writer.write(last[-1] | found)


def _stop_if_stuck(config: Config, workdir: Path, step: int, in_row: float, loss: float) -> None:
    limit = config.optimizer.max_skipped
    if in_row >= limit:
        page = report.write([workdir], workdir / "report.html")
        raise UserError(
            f"stopped at step {step}: optimizer.max_skipped={limit} steps in a row were skipped, "
            f"their loss not finite or their gradient norm over {config.optimizer.spike_ratio:g} "
            f"times its mean (last loss {loss:g}); lower schedule.peak_learning_rate; see {page}"
        )


def _last_evaluation(workdir: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in metrics.read(workdir):
        bits = {k: v for k, v in line.items() if k.startswith("eval/") and k.endswith("/bpb")}
        found |= {key.split("/")[1]: value for key, value in bits.items()}
    return found


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask for a stop at the next step; a second one acts as it would have."""
    requested: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def handle(signum: int, frame: Any) -> None:
        requested.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for signum in before:
        signal.signal(signum, handle)
    try:
        yield lambda: bool(requested)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Clock:
    """Wall time between records, evaluation and saving left out."""

    def __init__(self, built: Build, config: Config) -> None:
        kind = built.mesh.devices.flat[0].device_kind
        peak = metrics.peak_flops(kind, config.model.precision)
        self._peak = None if peak is None else peak * built.mesh.size
        self._flops = build_lib.flops_per_token(built)
        self._tokens_per_step = config.tokens_per_step
        self._last: tuple[float, int] | None = None

    def lap(self, step: int) -> Record:
        """time/ entries for the steps since the last record."""
        now, last = time.monotonic(), self._last
        self._last = (now, step)
        if last is None or step == last[1]:
            return {}
        seconds = (now - last[0]) / (step - last[1])
        rate = self._tokens_per_step / seconds
        values = {"time/step_seconds": seconds, "time/tokens_per_second": rate}
        return (
            values if self._peak is None else values | {"time/mfu": rate * self._flops / self._peak}
        )

    def pause(self) -> None:
        self._last = None


class _Profiler:
    """Traces steps [first, first + count) for TensorBoard's profile plugin or Perfetto."""

    def __init__(self, workdir: Path, count: int, step: int, end: int) -> None:
        self._folder = str(workdir / "profile")
        first = max(step, min(step + 5, end - count))  # compilation and the first steps left out
        self._first, self._last = (first, first + count) if count else (math.inf, math.inf)
        self._is_on = False

    def __enter__(self) -> _Profiler:
        return self

    def at(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._is_on = True
        elif step == self._last:
            self.__exit__()

    def __exit__(self, *error: Any) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
