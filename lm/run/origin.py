"""What a run starts from: an earlier launch in its workdir, a checkpoint that the configuration
names, or nothing. Also what it takes over from there, and the data it reads.

                  params   moments   step and tokens   place in the stream   phase of the schedule
    RESUMED       yes      yes       yes               yes                   yes
    decay_from    yes      yes       yes               yes                   the decay begins
    init_from     yes      -         -                 -                     -

A "-" means that the run starts fresh: zero moments, step 0, the first row, the warmup.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal, NamedTuple

from lm.build import Build
from lm.config import Config, UserError
from lm.data import loader as loader_lib
from lm.data import prepare, tokenizers
from lm.data.loader import Loader
from lm.data.prepare import Prepared
from lm.data.tokenizers import Tokenizer
from lm.families import OPTIMIZERS
from lm.metrics import Records
from lm.parallel import processes
from lm.run import checkpoint, formats, record
from lm.run.checkpoint import Restored
from lm.run.items import Meta
from lm.run.saver import Checkpointer
from lm.schedules import Run, Schedule
from lm.state import TrainState


class Carried(NamedTuple):
    """What a run takes over from the checkpoint it starts from. `moments`: the whole optimizer
    state. `step`: the completed steps, and the tokens and rows they took. `stream`: the place in
    the data. `phase`: the phase of the schedule, which otherwise begins with its warmup.
    """

    params: bool
    moments: bool
    step: bool
    stream: bool
    phase: Literal["anew", "same", "decay"]


NOTHING = Carried(False, False, False, False, "anew")
WEIGHTS = NOTHING._replace(params=True)
RESUMED = Carried(True, True, True, True, "same")
DECAY = RESUMED._replace(phase="decay")


class Origin(NamedTuple):
    """`folder`: the checkpoint that the configuration names, None if it names none or the run has
    checkpoints of its own. `decay_start`: tokens at the checkpoint from which the decay branched,
    None for other runs.
    """

    folder: Path | None
    carried: Carried
    decay_start: float | None
    data: Prepared


class Beginning(NamedTuple):
    """`records`: what the run had written by then; None if its checkpoint does not say."""

    state: TrainState
    records: Records | None


def find(config: Config, workdir: Path, data_dir: Path) -> Origin:
    """Finds the checkpoint to start from, checks it against the configuration, and prepares the
    data.

    Raises:
      UserError: the workdir holds another run, or a named checkpoint or source cannot be used.
    """
    record.check_unchanged(workdir, config)
    # A run named here may still be writing checkpoints: all processes use what the first one found.
    named = processes.agree(str(_locate(config, workdir) or ""))
    folder = Path(named) if named else None
    if folder is not None and _carried(config).moments:
        _check_optimizer(config, folder)
    if folder is not None and _carried(config).phase == "decay":
        _check_trunk(folder)
    data = prepare.prepare(
        config.data,
        data_dir,
        progress=processes.is_first(),
        tokenizer=_tokenizer(config, workdir, folder),
        verify=not (workdir / "run.json").exists(),
        is_writer=processes.is_first(),
    )
    return Origin(folder, _carried(config), _decay_start(config, workdir, folder), data)


def begin(origin: Origin, built: Build, saver: Checkpointer, loader: Loader) -> Beginning:
    """The state before the first step, with `loader` moved to its row. It comes from the run's own
    newest checkpoint, or else from what is carried over from the origin.

    Raises:
      UserError: a checkpoint is damaged, or belongs to another model or other data; or the run
      would continue from decayed weights at another learning rate.
    """
    restored = saver.restore_latest(built.abstract_state)
    if restored is not None:
        _check_length(restored, built, saver.folder)
        return Beginning(_continue(RESUMED, restored, built, loader), restored.meta.records)
    return Beginning(_first(origin, built, loader), Records.of(b""))


def _first(origin: Origin, built: Build, loader: Loader) -> TrainState:
    abstract, carried = built.abstract_state, origin.carried
    if origin.folder is None:
        return built.init(built.config.seed)
    if not (carried.moments or carried.step or carried.stream):
        # Only the weights are read: the checkpoint may be from another optimizer or other data.
        params = checkpoint.restore_params(origin.folder, abstract)
        return built.init(built.config.seed)._replace(params=params)
    return _continue(carried, checkpoint.restore(origin.folder, abstract), built, loader)


def _continue(carried: Carried, restored: Restored, built: Build, loader: Loader) -> TrainState:
    if carried.stream:
        loader_lib.check_identity(restored.loader["identity"], loader.identity)
        loader.set_state(restored.loader)
    if carried.params and carried.moments and carried.step:
        return restored.state
    return carry(carried, restored.state, built.init(built.config.seed))


def carry(carried: Carried, before: TrainState, fresh: TrainState) -> TrainState:
    """`fresh` with what is carried over from `before`. Counters are carried over with the step."""
    taken = {"params": carried.params, "opt_state": carried.moments}
    fields = [name for name in TrainState._fields if taken.get(name, carried.step)]
    return fresh._replace(**{name: getattr(before, name) for name in fields})


def _carried(config: Config) -> Carried:
    if config.decay_from:
        return DECAY
    return WEIGHTS if config.init_from else NOTHING


def _check_optimizer(config: Config, folder: Path) -> None:
    """Moments fit only the optimizer that made them."""
    theirs = OPTIMIZERS.name_of(type(checkpoint.read_config(folder).optimizer))
    ours = OPTIMIZERS.name_of(type(config.optimizer))
    if theirs != ours:
        raise UserError(
            f"checkpoint {folder} was trained with optimizer.family={theirs!r}, this run has "
            f"{ours!r}; set it to {theirs!r}, or name the checkpoint in init_from"
        )


def _schedule(config: Config, meta: Meta) -> Schedule:
    """The learning rate of the run that wrote a checkpoint, as planned when it was written."""
    return config.schedule.schedule(
        Run(config.run_tokens, config.tokens_per_step, meta.decay_start)
    )


def _check_trunk(folder: Path) -> None:
    """A decay must branch from weights that have not decayed and have reached the full batch."""
    config, meta = checkpoint.read_config(folder), checkpoint.read_meta(folder)
    if meta.step < (grown := config.batches.warmup_steps):
        raise UserError(
            f"decay_from={folder} is in the batch-size warmup of its run, which ends at step "
            f"{grown}; name a later checkpoint"
        )
    schedule = _schedule(config, meta)
    if not _is_decayed([schedule], config, meta.step):
        return
    earlier = _before(folder.parent, [schedule], config)
    advice = f"set decay_from to {earlier}" if earlier else "none from before it is kept there"
    raise UserError(
        f"decay_from={folder} has decayed already, since step "
        f"{schedule.last_before_decay(config.steps_of)} of its run; {advice}"
    )


def _check_length(restored: Restored, built: Build, folder: Path) -> None:
    """Another run.length moves the decay. Refused if the weights have decayed, in the old plan or
    in the new one.
    """
    meta, config = restored.meta, built.config
    planned = formats.read(restored.config, f"{folder}/{meta.step}/config")
    schedules = [_schedule(planned, meta), built.schedule]
    is_past = meta.tokens > built.run_tokens  # lm/train.py reports this case
    if is_past or schedules[0].phases[1:] == schedules[1].phases[1:]:
        return
    if not _is_decayed(schedules, config, meta.step):
        return
    message = (
        f"run.length={config.run.length} in place of {planned.run.length} moves the decay of the "
        f"learning rate, and the weights of step {meta.step} in {folder.parent} have decayed or "
        "would be in it"
    )
    earlier = _before(folder, schedules, config)
    if earlier is None:
        raise UserError(f"{message}; no checkpoint from before it is kept: choose a new workdir")
    later = [folder / str(s) for s in checkpoint.steps(folder.parent) if s > int(earlier.name)]
    aside = folder.parent / "decayed"
    command = (
        f"mkdir -p {shlex.quote(str(aside))} && {shlex.join(['mv', *map(str, later), str(aside)])}"
    )
    raise UserError(f"{message}; to go on from {earlier}, move what came after it away: {command}")


def _before(folder: Path, schedules: list[Schedule], config: Config) -> Path | None:
    """The newest checkpoint in the same folder as `folder` that no schedule has decayed yet."""
    for step in reversed(checkpoint.steps(folder.parent)):
        if not _is_decayed(schedules, config, step):
            return folder / str(step)
    return None


def _is_decayed(schedules: list[Schedule], config: Config, step: int) -> bool:
    """Whether the weights after `step` steps lie in the decay of one of these schedules."""
    tokens = config.tokens_before(step)
    last = tokens - config.tokens_before(step - 1)
    return any(schedule.is_decayed(tokens, last) for schedule in schedules)


def _locate(config: Config, workdir: Path) -> Path | None:
    """The checkpoint folder that the configuration names; None if the run has checkpoints of its
    own and no longer needs it.
    """
    named = config.decay_from or config.init_from
    return checkpoint.locate(Path(named)) if named and not checkpoint.steps(workdir) else None


def _decay_start(config: Config, workdir: Path, origin: Path | None) -> float | None:
    """Tokens at which the decay branched. A resumed run reads this from its own checkpoints and
    never reads the trunk again.
    """
    if _carried(config).phase != "decay":
        return None
    if origin is not None:
        return float(checkpoint.read_meta(origin).tokens)
    return checkpoint.newest(workdir)[1].decay_start


def _tokenizer(config: Config, workdir: Path, origin: Path | None) -> Tokenizer | None:
    """The tokenizer that this run, or the run it starts from, already uses.

    Raises:
      UserError: it differs from the recorded one, or from the one that the configuration names.
    """
    own = workdir / checkpoint.TOKENIZER
    if own.exists():
        used, known = tokenizers.load(own), record.recorded(workdir, "tokenizer", "sha256")
        if known is not None and used.sha256 != known:
            raise UserError(
                f"{own} has sha256 {used.sha256[:12]}, recorded was {known[:12]}; restore it or "
                "choose another workdir"
            )
        return used
    if origin is None:
        return None
    path = origin.parent.parent / checkpoint.TOKENIZER
    used, asked = tokenizers.load(path), config.data.tokenizer
    # A trained tokenizer is known by its file alone; the configuration defines every other kind.
    known = used.kind if asked.kind == "bpe" else tokenizers.create(asked).sha256
    if known != ("tokenizers" if asked.kind == "bpe" else used.sha256):
        raise UserError(
            f"{path} is another tokenizer (kind {used.kind}, sha256 {used.sha256[:12]}) than "
            f"data.tokenizer.kind={asked.kind!r} gives; set data.tokenizer to the one it came from"
        )
    return used
