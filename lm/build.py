"""Builds everything that compiled code needs from a configuration and devices. The devices may be a
topology that is not attached.

    config -> mesh -> model (forms resolved) -> abstract parameters -> schedule, tx -> abstract
    state, shardings -> step

Train, plan, evaluate, generate, interop and bench start here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm import layers as layer_lib
from lm import model as model_lib
from lm import mup, optimizers, schedules
from lm import params as params_lib
from lm import state as state_lib
from lm import step as step_lib
from lm.config import Config, Duration, MeshConfig, UserError
from lm.data.batch import Batch, Share
from lm.families import OBJECTIVES, SCHEDULES
from lm.layers import LayerRecord
from lm.modules.block import Block
from lm.modules.context import Context
from lm.parallel import mesh as mesh_lib
from lm.parallel import placement, sharding
from lm.parallel.matmul import Numerics
from lm.parallel.sharding import AnyMesh
from lm.state import TrainState
from lm.step import Metrics, Parts

ONE_DEVICE = MeshConfig(
    data=1,
    fsdp=1,
    tensor=1,
    sequence=1,
    replicate=(),
    zero1=False,
    stream_over_tensor=False,
    sequence_strategy="auto",
    sequence_layout="contiguous",
)

# Sections and keys of a configuration on which no compiled function depends, because a step takes
# what they say as arguments. The one exception is log.gradient_noise.
ARGUMENTS = (
    "seed",
    "init_from",
    "decay_from",
    "schedule",
    "evaluate",
    "log",
    "checkpoint",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Build(Parts):
    """The parts of a step, and three jitted functions made of them: `init(seed)`, and the functions
    of lm/step.py `step(state, batch, token_bytes, numbers, frozen)` and `score(params, batch,
    frozen)`.
    """

    layers: list[LayerRecord]
    run_tokens: int
    init: Callable[[int], TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    score: Callable[..., tuple[jax.Array, jax.Array]]

    @property
    def last_before_decay(self) -> int | None:
        """As `schedules.Schedule.last_before_decay`. A run keeps the checkpoint of this step."""
        return self.schedule.last_before_decay(self.config.steps_of)

    def due(self, step: int, every: Duration) -> bool:
        """Whether a multiple of `every` falls on this step. Fractions of a step count: for the last
        25 percent of a run, this is the last step. A duration in steps counts steps of any size.
        """
        if every.unit == "steps":
            period, now, before = max(1.0, every.value), float(step), step - 1.0
        else:
            period = every.tokens(run_tokens=self.run_tokens, tokens_per_step=0)
            now, before = (float(self.config.tokens_before(n)) for n in (step, step - 1))
        return every.value > 0 and int(now / period + 1e-9) > int(before / period + 1e-9)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step stays when newer ones are saved."""
        every = self.config.checkpoint.keep_every
        return self.due(step, every) or step == self.last_before_decay

    @property
    def share(self) -> Share:
        """The rows of every batch that this process loads."""
        return placement.share(self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        return sharding.batch(self.mesh)

    @property
    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a batch, for ahead-of-time compilation."""
        shape = (self.config.data.batch_size, self.config.data.context_length)
        make = functools.partial(jax.ShapeDtypeStruct, shape, sharding=self.batch_sharding)
        return Batch(
            **{
                f: make(dtype=jnp.float32 if f == "loss_weights" else jnp.int32)
                for f in Batch._fields
            }
        )

    @property
    def abstract_token_bytes(self) -> jax.ShapeDtypeStruct:
        size = self.config.data.tokenizer.vocab_size
        return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding.replicated(self.mesh))

    def lowered(self) -> jax.stages.Lowered:
        """The step lowered on abstract arguments, ready to compile, even for absent devices."""
        step: Any = self.step
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
        replicated = sharding.replicated(self.mesh)
        numbers = jax.tree.map(like, self.numbers)
        return step.lower(
            self.abstract_state, self.abstract_batch, self.abstract_token_bytes, numbers
        )

    def put(self, batch: Batch) -> Batch:
        """The rows that this process loads (`share`) -> global arrays on the mesh."""
        return placement.put(batch, self.mesh, self.config.mesh.sequence_layout)

    def put_replicated(self, x: Any) -> jax.Array:
        return jax.device_put(x, sharding.replicated(self.mesh))


def check(config: Config) -> None:
    """Checks what `build` would refuse, as far as possible before a device is initialized.

    Raises:
      UserError: the same as `build`.
    """
    count, targets = mesh_lib.foreseen()
    mesh = mesh_lib.before(config.mesh, count)
    _check_batch(config, mesh)
    _check_noise(config, mesh)
    _check_hypergradient(config)
    layers = layer_lib.check(config.model)
    layer_lib.check_devices(layers, config, mesh, targets)
    sharding.weights(config.mesh, mesh, _sizes(config))
    _check_objective(config, all(layer.is_causal for layer in layers.values()))


def build(
    config: Config,
    devices: Sequence[Any],
    decay_start: float | None = None,
    *,
    like: Build | None = None,
) -> Build:
    """Builds a run's step for `devices`. `decay_start`: tokens at the trunk checkpoint of
    decay_from, None for a run without a trunk. `like`: an earlier build, whose compiled functions
    are reused if the two configurations differ only in what a step takes as arguments, and which is
    ignored otherwise.

    Raises:
      UserError: sizes do not fit the mesh, a layer or an option is unknown, or the schedule
      contradicts itself.
    """
    if like is not None and compiles_alike(config, like.config, devices, like.mesh):
        return _again(like, config, decay_start)
    mesh = mesh_lib.create(config.mesh, devices)
    _check_batch(config, mesh)
    _check_noise(config, mesh)
    context = _context(config, mesh)
    multipliers, vocab_size = context.multipliers, config.data.tokenizer.vocab_size
    model, layers = model_lib.create(config.model, vocab_size, context, config.mesh)
    _check_objective(config, model.is_causal)

    def init_params(seed: jax.Array) -> Any:
        dummy = model_lib.dummy_inputs(batch_ways(mesh), 8 * mesh.shape["sequence"])
        return model.init(jax.random.key(seed), *dummy, method="init_all")["params"]

    _, infos = params_lib.split(jax.eval_shape(init_params, 0))
    per_step = config.tokens_per_step
    schedule = config.schedule.schedule(schedules.Run(config.run_tokens, per_step, decay_start))
    tx = optimizers.create(config.optimizer, multipliers, infos)

    def init(seed: jax.Array) -> TrainState:
        params, _ = params_lib.split(init_params(seed))
        none = jnp.asarray(state_lib.count(0))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), none, none)

    abstract = jax.eval_shape(init, 0)
    shardings = _state_shardings(abstract, infos, mesh, config)
    parts = Parts(
        config=config,
        model=model,
        infos=infos,
        schedule=schedule,
        tx=tx,
        abstract_state=jax.tree.map(_with_sharding, abstract, shardings),
    )
    return Build(
        **vars(parts),
        layers=layers,
        run_tokens=int(schedule_end(config, decay_start)),
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step_lib.create(parts), donate_argnums=0, out_shardings=(shardings, None)),
        score=jax.jit(functools.partial(step_lib.score, parts)),
    )


def compiles_alike(a: Config, b: Config, devices: Sequence[Any], mesh: Mesh) -> bool:
    """Whether building `a` on `devices` would compile the same functions as `b` on `mesh` has. So
    it does if they differ only in the seed, the schedule, the length, where the run starts, and
    what it evaluates, logs and keeps.
    """
    same: dict[str, Any] = {name: getattr(b, name) for name in ARGUMENTS}
    run = dataclasses.replace(a.run, length=b.run.length)
    is_alike = dataclasses.replace(a, run=run, **same) == b
    is_alike = is_alike and a.log.gradient_noise == b.log.gradient_noise
    return is_alike and list(devices) == list(mesh.devices.flat)


def _again(like: Build, config: Config, decay_start: float | None) -> Build:
    run = schedules.Run(config.run_tokens, config.tokens_per_step, decay_start)
    schedule, run_tokens = config.schedule.schedule(run), int(schedule_end(config, decay_start))
    return dataclasses.replace(like, config=config, schedule=schedule, run_tokens=run_tokens)


def _context(config: Config, mesh: Mesh) -> Context:
    return Context(
        numerics=Numerics.create(config.model.precision),
        multipliers=mup.create(config),
        norm_eps=config.model.norm_eps,
        matrix=config.model.matrix,
        context_length=config.data.context_length,
        mesh=mesh,
        rules=sharding.activations(config.mesh, mesh),
        weights=sharding.weights(config.mesh, mesh, _sizes(config)),
        strategies={},
        layout=config.mesh.sequence_layout,
    )


def local(
    config: Config, decay_start: float | None = None, mesh: MeshConfig | None = None
) -> Build:
    """A build for one device of this machine, or for all of its devices on `mesh`, whatever mesh
    and memory the configuration asks for. Except for `mesh`, its `config` is the given one.
    """
    here = dataclasses.replace(
        config,
        mesh=mesh or ONE_DEVICE,
        optimizer=dataclasses.replace(config.optimizer, memory="device"),
        log=dataclasses.replace(config.log, gradient_noise=False),
    )
    built = build(here, jax.devices()[: None if mesh else 1], decay_start)
    return dataclasses.replace(built, config=dataclasses.replace(config, mesh=mesh or config.mesh))


def schedule_end(config: Config, decay_start: float | None) -> int:
    """Tokens after which the run ends: its length, or the end of the decay that branches at
    `decay_start`.
    """
    if decay_start is None:
        return config.run_tokens
    return schedules.branch_tokens(config.schedule.decay, decay_start, config.tokens_per_step)


def flops_per_token(built: Build) -> float:
    """Model FLOPs of forward and backward per token at the training context length, without
    recomputed work: three times the forward's (Kaplan et al. 2020, sec. 2.1, but with attention).
    """
    length = built.config.data.context_length
    return 3.0 * forward_flops(built, length) / length


def forward_flops(built: Build, length: int) -> float:
    """Model FLOPs of a forward pass over one row of `length` tokens: those that the layers state,
    and two per token for every element of the head. An embedding lookup has none.
    """
    head = 2.0 * built.config.model.width * built.model.padded_vocab_size * length
    return head + sum(n * block.flops(sizes, length) for n, block, sizes in _layers(built))


def saved_flops(built: Build, length: int) -> dict[str, float]:
    """Tensor -> FLOPs that the backward pass need not repeat if model.kept names the tensor."""
    found: dict[str, float] = {}
    for repeat, block, _ in _layers(built):
        for name, flops in block.saved(length).items():
            found[name] = found.get(name, 0.0) + repeat * flops
    return found


def _layers(built: Build) -> Iterator[tuple[int, Block, dict[str, int]]]:
    """For every block of a period: how often it occurs, the block, and the number of matrix
    elements in each of its parts.
    """
    for i, (repeat, period) in enumerate(zip(built.model.repeats, built.model.groups, strict=True)):
        for j, block in enumerate(period.blocks):
            parts = built.infos[f"groups_{i}"][f"blocks_{j}"]
            sizes = {name: params_lib.matrix_elements(part) for name, part in parts.items()}
            yield repeat, block, {name: size // repeat for name, size in sizes.items()}


def _sizes(config: Config) -> dict[str, int]:
    """Letter -> size, for weights that every layer has."""
    vocab = model_lib.padded_vocab_size(config.data.tokenizer.vocab_size)
    return {"D": config.model.width, "vocab": vocab}


def _check_objective(config: Config, is_causal: bool) -> None:
    if config.objective.is_causal and not is_causal:
        raise UserError(
            f"model.pattern={config.model.pattern!r} has a mixer that sees later tokens, but "
            f"objective {OBJECTIVES.name_of(type(config.objective))!r} predicts them; change either"
        )


def _check_noise(config: Config, mesh: AnyMesh) -> None:
    ways, accumulation = mesh.shape["data"], config.run.accumulation
    if not config.log.gradient_noise or ways * accumulation > 1:
        return
    rows = config.batches.of(0) // batch_ways(mesh)
    count = next((n for n in range(2, rows + 1) if rows % n == 0), None)
    key = "data.batch_warmup.first" if config.data.batch_warmup.first else "data.batch_size"
    message = f"run.accumulation={count}" if count else f"{key}={2 * batch_ways(mesh)}"
    raise UserError(
        "log.gradient_noise=True compares gradients of parts of a batch, and run.accumulation=1 on "
        f"mesh.data=1 is one part; set {message}, or log.gradient_noise=False"
    )


def _check_hypergradient(config: Config) -> None:
    if config.optimizer.hypergradient and not config.schedule.has_stable_phase:
        raise UserError(
            f"optimizer.hypergradient={config.optimizer.hypergradient} adapts the rate between "
            f"warmup and decay, and schedule {SCHEDULES.name_of(type(config.schedule))!r} has "
            "nothing there; set optimizer.hypergradient=0.0, or another schedule"
        )


def _check_batch(config: Config, mesh: AnyMesh) -> None:
    placement.check_time(config.data.context_length, config.mesh, mesh)
    ways = batch_ways(mesh)
    count, first = config.run.accumulation, config.data.batch_warmup.first
    rows = config.batches.of(0) // count
    if first and first % (ways * count):
        raise UserError(
            f"data.batch_warmup.first={first} does not divide over {ways} devices of data*fsdp and "
            f"run.accumulation={count}; set data.batch_warmup.first={ways * count} if "
            f"data.batch_size={config.data.batch_size} is a doubling of it, or change the mesh"
        )
    if rows % ways:
        raise UserError(
            f"data.batch_size / run.accumulation = {rows} rows do not divide over data*fsdp = "
            f"{ways} devices; set data.batch_size="
            f"{math.ceil(rows / ways) * ways * count}, or change the mesh"
        )


def batch_ways(mesh: AnyMesh) -> int:
    """The number of parts into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)


def _state_shardings(abstract: TrainState, infos: Any, mesh: Mesh, config: Config) -> TrainState:
    params = sharding.params(infos, mesh, config.mesh)
    moments = sharding.moments(infos, mesh, config.mesh)
    if config.optimizer.memory == "host":
        moments = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), moments)
    opt_state = sharding.like_params(abstract.opt_state, infos, moments, mesh)
    whole: Any = sharding.replicated(mesh)
    return TrainState(whole, params, opt_state, tokens=whole, rows=whole)


def _with_sharding(leaf: jax.ShapeDtypeStruct, placed: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
