"""What to change in a run that does not fit, and what each change saves by the memory formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm import build as build_lib
from lm.build import Build
from lm.config import Config, UserError
from lm.parallel import mesh as mesh_lib
from lm.plan import memory as memory_lib
from lm.plan.memory import Memory

Values = Mapping[str, Any]


class Change(NamedTuple):
    """Keys with their new values, the bytes that they save on a device, and the memory then."""

    values: Values
    saved: int
    memory: Memory

    @property
    def flags(self) -> str:
        """The change as written on a command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.values.items())


def proposed(config: Config, devices: Sequence[Any], limit: int = 3) -> list[Change]:
    """The `limit` changes that save most, each applied alone; the largest saving first."""
    built, needs = estimate(config, devices)
    before, found = needs.total, []
    for values in _candidates(built):
        try:
            _, after = estimate(apply(config, values), devices)
        except UserError:  # sizes are not divisible: not a change to advise
            continue
        if after.total < before:
            found.append(Change(values, before - after.total, after))
    return sorted(found, key=lambda change: -change.saved)[:limit]


def remedy(config: Config, devices: Sequence[Any], excess: float) -> tuple[Values, bool]:
    """Changes that together save `excess` bytes by the formula, and whether they do. Changes that
    cost least time come first. A change that saves less than a fiftieth is not made.
    """
    values: dict[str, Any] = {}
    built, first = estimate(config, devices)
    now = first.total
    while first.total - now < excess:
        for candidate in _candidates(built):
            try:
                changed, after = estimate(apply(built.config, candidate), devices)
            except UserError:  # sizes are not divisible
                continue
            if after.total < 0.98 * now:
                values, built, now = values | dict(candidate), changed, after.total
                break
        else:
            return values, False
    if values.get("mesh.data") == 1:
        values.pop("mesh.zero1", None)  # it no longer has an effect
    return values, True


def estimate(config: Config, devices: Sequence[Any]) -> tuple[Build, Memory]:
    built = build_lib.build(config, devices)
    return built, memory_lib.estimate(built, memory_lib.measure(config, devices))


def apply(config: Config, values: Values) -> Config:
    """`config` with dotted keys replaced."""
    for key, value in values.items():
        config = _replaced(config, key, value)
    return config


def _replaced(node: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    value = _replaced(getattr(node, name), rest, value) if rest else value
    return dataclasses.replace(node, **{name: value})


def _candidates(built: Build) -> Iterator[Values]:
    """Changes in the order of their cost to the run: first those that send nothing more over the
    network, then those that do, then those that change the computation.
    """
    config, sizes = built.config, built.mesh.shape
    data, fsdp, tensor, ranks = (sizes[axis] for axis in mesh_lib.AXES)
    if data > 1 and not config.mesh.zero1:
        yield {"mesh.zero1": True}
    rows = config.batches.of(0) // (data * fsdp)
    if rows > config.run.accumulation:
        yield {"run.accumulation": _next_divisor(rows, config.run.accumulation)}
    if tensor > 1 and not config.mesh.stream_over_tensor:
        yield {"mesh.stream_over_tensor": True}
    if config.model.remat != "full":
        yield {"model.remat": "full"} | ({"model.kept": {}} if config.model.kept else {})
    if data > 1:
        yield _mesh(config, 1, fsdp * data, tensor, ranks)
    if data * fsdp % 2 == 0:  # half the devices get twice the rows, in twice as many microbatches
        half = (data // 2, fsdp) if data % 2 == 0 else (data, fsdp // 2)
        more = {"run.accumulation": 2 * config.run.accumulation}
        streamed = {"mesh.stream_over_tensor": True}
        yield {**_mesh(config, *half, tensor * 2, ranks), **streamed, **more}
        yield {**_mesh(config, *half, tensor, ranks * 2), **more}
    if config.loss.chunk_size > 256:
        yield {"loss.chunk_size": config.loss.chunk_size // 2}
    if config.optimizer.memory == memory_lib.DEVICE:
        yield {"optimizer.memory": memory_lib.HOST}
    if config.data.batch_size > data * fsdp and not config.data.batch_warmup.first:
        yield {"data.batch_size": config.data.batch_size // 2}


def _mesh(config: Config, *sizes: int) -> Values:
    """The sizes of mesh axes that differ from the configuration's."""
    named = zip(mesh_lib.AXES, sizes, strict=True)
    return {f"mesh.{a}": n for a, n in named if getattr(config.mesh, a) != n}


def _next_divisor(number: int, above: int) -> int:
    return next(n for n in range(above + 1, number + 1) if number % n == 0)
