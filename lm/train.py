"""Training, in one straight line.

    config -> data -> devices, build -> restore or init -> record -> loop -> samples -> report

The loop never waits for the device: the metrics of step n are fetched after step n + 1 is
dispatched. Each step has one record in metrics.jsonl, which is complete before the checkpoint of
that step starts. So a run that is killed anywhere and resumed leaves the same records and the same
parameters, bit for bit. All processes run the same lines; the first one writes the shared files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import build as build_lib
from lm import evals, files, layers, metrics, trackers
from lm.build import Build
from lm.config import Config, Duration, UserError, nearest, to_mapping
from lm.data import growth
from lm.data import loader as loader_lib
from lm.data.loader import Loader, Rows
from lm.data.prepare import Prepared
from lm.data.tokenizers import Tokenizer
from lm.evals import Given
from lm.evaluation import evaluate, generate
from lm.evaluation.scoring import Scorer
from lm.parallel import mesh as mesh_lib
from lm.parallel import processes, watch
from lm.plan import explain
from lm.plan import program as plan
from lm.run import checkpoint, record
from lm.run import origin as origin_lib
from lm.run.clock import Clock, Profiler
from lm.run.items import Meta
from lm.run.progress import TrainingBar
from lm.run.saver import Checkpointer
from lm.run.start import Start

log = logging.getLogger(__name__)

Record = dict[str, Any]
EVALUATED = ("eval/", "task/")  # prefixes of the names that an evaluation adds to a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run lives, and what it reads. `profile_steps`: number of steps traced into
    workdir/profile. `rows`: generated rows to train on in place of data.sources, which must then be
    empty. `until`: label of a task -> value; the run ends once the headline of every such task is
    at least that good. `accept_lost_records`: continue although metrics.jsonl has lost records.
    `like`: a build whose compiled functions may be reused (lm/build.py). `with_report`: write the
    report, which takes seconds; a study of many runs has a page of its own.
    """

    workdir: Path
    data_dir: Path
    profile_steps: int = 0
    rows: Rows | None = None
    until: Mapping[str, float] = dataclasses.field(default_factory=dict)
    accept_lost_records: bool = False
    like: Build | None = None
    with_report: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`step`: the last step. `finished`: False if a signal stopped the run, which was then saved at
    `step`. `stopped`: whether a signal came, even after the last step; a study should then stop
    too. `evaluation`: bits per byte by validation set. `samples`: records of samples.jsonl.
    `report`: the page, None if none was written. `build`: what trained.
    """

    step: int
    finished: bool
    stopped: bool
    evaluation: dict[str, float]
    samples: list[dict[str, Any]]
    report: Path | None
    build: Build


class DivergedError(UserError):
    """The run was stopped because too many steps in a row were skipped."""


def run(config: Config, options: Options) -> Outcome:
    """Trains to the end of the configured length, or until `options.until` is reached. Resumes from
    whatever the workdir holds.

    Raises:
      UserError: a mistake in the configuration, the data, the workdir or a checkpoint.
      DivergedError: too many skipped steps.
    """
    workdir, start = options.workdir, Start()
    build_lib.check(config)
    tasks = evals.create(config.evaluate.tasks, "evaluate.tasks") | evaluate.always(config.data)
    _check_options(config, options)
    track = trackers.opener(config, workdir)
    is_first = processes.is_first()
    processes.check_equal("config", to_mapping(config))
    mesh_lib.create(config.mesh, jax.devices())  # what it refuses, before any text is read
    with contextlib.ExitStack() as stack, watch.one_fate():
        with processes.first_alone():
            stack.enter_context(record.locked(workdir))
            origin = origin_lib.find(config, workdir, options.data_dir)
        prepared, decay_start = origin.data, origin.decay_start
        start.done("data")
        built = build_lib.build(config, jax.devices(), decay_start, like=options.like)
        stack.enter_context(_out_of_memory(built))
        loader = stack.enter_context(_loader(built, prepared, options.rows))
        saver = stack.enter_context(Checkpointer(workdir, config, built.keeps))
        state, records = origin_lib.begin(origin, built, saver, loader)
        step, end = int(state.step), round(config.steps_of(built.run_tokens))
        start.done("model")
        _check_not_past(step, end, workdir)
        if is_first:
            is_accepted = options.accept_lost_records
            is_lost = metrics.cut(workdir, step, records, is_loss_accepted=is_accepted)
            read = loader.identity | {"left_out": prepared.left_out_counts}
            facts = read, decay_start, options.until
            lost_until = step if is_lost else 0
            record.warn_of_changes(workdir, built)
            record.write(workdir, built, prepared.tokenizer, *facts, lost_until=lost_until)
            _log_start(built, options, step)
        saver.remove_old()  # not before everything above is known to be right
        stop = stack.enter_context(processes.stop_signals())
        bar = stack.enter_context(_bar(config, step, end))
        token_bytes = built.put_replicated(_padded_bytes(prepared.tokenizer, built))
        numbers = built.put_replicated(built.numbers)
        given = Given(prepared.tokenizer, prepared, config.data, config.evaluate.max_tokens)
        questions = evaluate.prepare(tasks, given)
        every = evaluate.spaced(config, questions, built.run_tokens)
        clock = Clock(built, config)
        profile_steps = options.profile_steps if is_first else 0
        profiler = stack.enter_context(Profiler(workdir, profile_steps, step, end))

        def evaluation() -> Record | None:
            return _evaluate(questions, Scorer(built, state.params), stop)

        def finish(
            pending: tuple[int, Any] | None, extra: Record, timing: Record | None = None
        ) -> None:
            """Fetches a step's metrics, which may wait for the device, and writes its record."""
            if pending is None:
                return
            at, arrays = pending
            values = {k: float(v) for k, v in jax.device_get(arrays).items()}
            start.end()
            in_row = values.pop("optim/skipped_in_row")
            bar.update(at, values | extra)
            if at == end or built.due(at, config.log.every) or built.due(at, every):
                counts = {"step": at, "tokens": config.tokens_before(at)}
                times = clock.lap(at) if timing is None else timing
                writer.write(counts | values | times | extra)
            _stop_if_stuck(config, options, at, in_row, values["train/loss"])

        def save() -> None:
            counts = Meta(step, config.tokens_before(step), decay_start, {}, {})
            meta = counts._replace(records=writer.sealed())
            saver.save(state, loader.state() | {"identity": loader.identity}, meta)

        def due(every: Duration) -> bool:
            return step == end or built.due(step, every)

        if step and due(every):
            _mend_record(workdir, step, evaluation, track)
        writer = stack.enter_context(metrics.Writer(workdir, track=track, is_active=is_first))
        pending: tuple[int, Any] | None = None
        is_enough = functools.partial(evaluate.is_enough, options.until, tasks)
        is_over = processes.agree(step == end or is_enough(_last(workdir, step)))
        start.done("tasks")
        while not is_over and not stop():
            batch = built.put(next(loader))
            profiler.at(step)
            saver.check()
            state, arrays = built.step(state, batch, token_bytes, numbers)
            start.done("compile")
            before, step, pending = pending, step + 1, (step + 1, arrays)
            is_evaluated = due(every)
            is_saved = due(config.checkpoint.every) or step == built.last_before_decay
            if not (is_evaluated or is_saved):
                finish(before, {})
                continue
            # The host waits here, so both steps share one lap; the second would seem to take none.
            jax.block_until_ready(arrays)
            timing = clock.lap(step)
            finish(before, {}, timing)
            with clock.stopped():
                extra = evaluation() if is_evaluated else None
                finish(pending, extra or {}, timing)
                pending = None
                is_over = step == end or is_enough(extra or {})
                if is_saved:
                    save()
        finish(pending, {})
        save()
        saver.wait()
        finished = is_over and not stop()
        loaded = checkpoint.Loaded(
            built.model, state.params, prepared.tokenizer, config, step, built
        )
        samples = _sample(workdir, loaded) if finished else []
        page = _report(workdir) if options.with_report else None
        stopped = stop()
    return Outcome(step, finished, stopped, _last_evaluation(workdir), samples, page, built)


def _log_start(built: Build, options: Options, step: int) -> None:
    """Logs the step at which a resumed run continues; and, unless `options.like` has the same
    layers, which form each op takes and how it splits rows.
    """
    if step:
        log.info("%s goes on from step %d", options.workdir, step)
    if options.like is None or options.like.layers != built.layers:
        for line in layers.summary(built.layers):
            log.info("%s", line)


def _check_not_past(step: int, end: int, workdir: Path) -> None:
    if step > end:
        raise UserError(
            f"run.length ends at step {end} and --workdir={workdir} is at step {step} already; "
            "lengthen the run or choose another workdir"
        )


def _check_options(config: Config, options: Options) -> None:
    if options.rows is None and not config.data.sources:
        raise UserError("data.sources is empty; name at least one source to train on")
    if options.rows is not None and config.data.sources:
        raise UserError(
            f"data.sources names {next(iter(config.data.sources))!r} and this run trains on rows "
            "that are generated; set data.sources to {}"
        )
    if options.rows is not None and config.data.batch_warmup.first:
        raise UserError(
            f"data.batch_warmup.first={config.data.batch_warmup.first} and rows that are generated "
            f"in batches of one size; {growth.REMEDY}"
        )
    for label in options.until:
        if label not in config.evaluate.tasks:
            known = nearest(label, config.evaluate.tasks)
            raise UserError(f"training until {label!r} is good: no such evaluate.tasks; {known}")


def _loader(built: Build, prepared: Prepared, rows: Rows | None) -> Loader:
    """This process's share of every batch."""
    config, share = built.config, built.share
    if rows is not None:
        return loader_lib.generated(rows, batch_size=config.data.batch_size, share=share)
    return loader_lib.create(
        prepared, config.data, seed=config.seed, batches=config.batches, share=share
    )


def _bar(config: Config, start: int, end: int) -> TrainingBar:
    return TrainingBar(
        start=start,
        end=end,
        tokens=config.tokens_before,
        is_shown=processes.is_first(),
    )


@contextlib.contextmanager
def _out_of_memory(built: Build) -> Iterator[None]:
    """Where a run does not fit the devices: what takes their memory, and what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not plan.is_out_of_memory(str(error)):
            raise
        if processes.is_first():
            devices = list(built.mesh.devices.flat)
            print(explain.explain(built.config, devices, str(error)), file=sys.stderr)
        raise UserError(
            f"each of {built.mesh.size} devices has too little memory for this run; take "
            "a change of the table above, and plan it with espalier plan"
        ) from None


def _padded_bytes(tokenizer: Tokenizer, built: Build) -> np.ndarray:
    """UTF-8 bytes per id, as long as the configured vocabulary (a trained one may be smaller)."""
    size = built.abstract_token_bytes.shape[0]
    return np.pad(tokenizer.token_bytes, (0, size - len(tokenizer.token_bytes))).astype(np.int32)


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
    if processes.is_first():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.replace(workdir / "samples.jsonl", text)
    return lines


def _report(workdir: Path) -> Path:
    page = workdir / "report.html"
    if processes.is_first():
        from lm import report  # here, since matplotlib would delay the first step by a second

        report.write([workdir], page)
    return page


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


def _mend_record(
    workdir: Path,
    step: int,
    evaluation: Callable[[], Record | None],
    track: Callable[[int], trackers.Log],
) -> None:
    """A signal may have cut the evaluation at `step` short: its record is then written once more,
    after what the checkpoint of that step counts on.
    """
    last = _last(workdir, step)
    if processes.agree(bool(last) and not any(key.startswith(EVALUATED) for key in last)):
        found = evaluation()
        if found and processes.is_first():
            with metrics.Writer(workdir, track=track) as writer:
                writer.write(last | found)


def _stop_if_stuck(config: Config, options: Options, step: int, in_row: float, loss: float) -> None:
    limit = config.optimizer.max_skipped
    if in_row >= limit:
        page = _report(options.workdir) if options.with_report else options.workdir
        processes.wait()  # or the others would end the first before it has written that
        raise DivergedError(
            f"stopped at step {step}: optimizer.max_skipped={limit} steps in a row were skipped, "
            "their loss or update not finite or their gradient norm over "
            f"{config.optimizer.spike_ratio:g} times its mean (last loss {loss:g}); lower "
            f"schedule.peak_learning_rate; see {page}"
        )


def _last(workdir: Path, step: int) -> Record:
    """The record of `step`, if it is the last."""
    last = metrics.read(workdir)[-1:]
    return last[0] if last and last[0]["step"] == step else {}


def _last_evaluation(workdir: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in metrics.read(workdir):
        bits = {k: v for k, v in line.items() if k.startswith("eval/") and k.endswith("/bpb")}
        found |= {key.split("/")[1]: value for key, value in bits.items()}
    return found
