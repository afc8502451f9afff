"""Random configurations and command lines: each is refused in one line before a device is
initialized, or is not refused at all.

    python -m tests.launch.fuzz --seed=0 --configs=300 --lines=100 --damages=60

A configuration is a tiny one with one to three changes to keys of lm/config.py, members of families
and their options. New values are extreme, of another type, or misspelled names. The configuration
goes through `lm.train.run`, which stops at the first look for a device. A configuration that gets
there is then built on a device, where it may only be refused for the kind or number of devices.

A command line is one of a command of launch/ with one broken flag; it is run in this process in the
same way. A damage replaces a file of a run that a command reads; only tracebacks are faults there.

Each fault is printed with the seed and number that reproduce it. Run this module by itself: JAX
must not have looked for devices before.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lm import build as build_lib
from lm import families, train
from lm.config import flatten, from_mapping, to_mapping
from tests.launch import fuzz_lines
from tests.launch.fuzz_cases import Found, TouchedError, near, run, without_devices
from tests.lm import tiny

BIG = (1 << 31, 1 << 63, 10**12, 10**400)
NUMBERS = (0, -1, 1, 2, 3, 7, (1 << 31) - 1, *BIG, -(1 << 63))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-8, 1e-45, 1e-308, 1e38, 1e308, -1e308)
FLOATS += (float("nan"), float("inf"), -float("inf"))
WORDS = ("", " ", "none", "auto", "x", "a,b", "\udc80", "a\0b", "é" * 300, "../x", "0", "nan")
SPANS = ("0 steps", "1 steps", "1e-9 steps", "7 tokens", "100 percent", "1e308 percent", "3 epochs")
SPANS += ("1e12 steps", "1e18 tokens", "-1 steps", "nan tokens", "inf steps", "9" * 400 + " steps")
OTHERS = (None, True, False, [], {}, (), [1], ["x"], {"x": 1}, {1: 2}, b"x", 1j, object)
VALUES = (*NUMBERS, *FLOATS, *WORDS, *SPANS, *OTHERS)
PATTERNS = ("softmax", "softmax,gla", "softmax,absent", ("softmax", 3), ((1, "softmax"), (2, "x")))


def set_at(values: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, leaf = dotted.split(".")
    node: Any = values
    for group in groups:
        node = node[group]
        if not isinstance(node, dict):
            return
    node[leaf] = value


def mutated(rng: random.Random, base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A changed configuration as plain values, and its changes in words."""
    values = _copy(base)
    made = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changes = (*3 * (_key, _option, _layer), _task, _name, _mesh, _pattern)
        change = rng.choice(changes)
        made.append(change(rng, values))
    return values, made


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def drawn(rng: random.Random, now: Any) -> Any:
    """A random value, more often one of the type of `now`, which is a value or a default
    in words.
    """
    now = now.split(",")[0] if isinstance(now, str) else now
    alike = {bool: (True, False), int: NUMBERS, float: FLOATS, str: (*WORDS, *SPANS)}
    pool = alike.get(type(now), VALUES)
    with contextlib.suppress(ArithmeticError, TypeError, ValueError):
        number = float(str(now).split(" ")[0])
        pool = (*FLOATS, 0.1, 10.0, 2 * number) if "." in str(now) else (*NUMBERS, 2 * int(number))
    return rng.choice(pool if rng.random() < 0.7 else VALUES)


def _key(rng: random.Random, values: dict[str, Any]) -> str:
    key = rng.choice(sorted(flatten(values)))
    value = drawn(rng, flatten(values)[key])
    set_at(values, key, value)
    return f"{key}={value!a:.60}"


def _option(rng: random.Random, values: dict[str, Any]) -> str:
    """Changes an option of a member of a family and names that member in the configuration."""
    places = {"schedule": families.SCHEDULES, "optimizer": families.OPTIMIZERS}
    places |= {"objective": families.OBJECTIVES, "model.mlp": families.FEED_FORWARDS}
    places |= {"model.residual": families.BLOCKS, "model.matrix": families.MATRICES}
    key = rng.choice(sorted(places))
    name = rng.choice(places[key].names())
    options = places[key].describe(name, key) or {"family": name}
    option = rng.choice(sorted(options))
    value = drawn(rng, options[option])
    set_at(values, key, {"family": name, option: value})
    return f"{key}={name}.{option}={value!a:.60}"


def _layer(rng: random.Random, values: dict[str, Any]) -> str:
    name = rng.choice(families.MIXERS.names())
    options = families.MIXERS.describe(name, "")
    option = rng.choice(sorted(options))
    value = drawn(rng, options[option])
    set_at(values, "model.layers", {"a": {"mixer": name, option: value}})
    set_at(values, "model.pattern", "a")
    return f"layer {name}.{option}={value!a:.60}"


def _task(rng: random.Random, values: dict[str, Any]) -> str:
    name = rng.choice(families.TASKS.names())
    options = families.TASKS.describe(name, "") or {"task": name}
    option = rng.choice(sorted(options))
    value = drawn(rng, options[option])
    set_at(values, "evaluate.tasks", {"a": {"task": name, option: value}})
    return f"task {name}.{option}={value!a:.60}"


def _name(rng: random.Random, values: dict[str, Any]) -> str:
    """Misspells a key or removes it."""
    key = rng.choice(sorted(flatten(values)))
    *groups, leaf = key.split(".")
    node: Any = values
    for group in groups:
        node = node[group]
    if not isinstance(node, dict) or leaf not in node:
        return ""
    value, other = node.pop(leaf), near(rng, leaf)
    if rng.random() < 0.7:
        node[other] = value
    return f"{key} as {other}"


def _mesh(rng: random.Random, values: dict[str, Any]) -> str:
    axis, value = rng.choice(("data", "fsdp", "tensor", "sequence")), rng.choice((2, 3, 8, 10**9))
    set_at(values, f"mesh.{axis}", value)
    switch = rng.choice(("zero1", "stream_over_tensor"))
    set_at(values, f"mesh.{switch}", True)
    set_at(
        values, "mesh.replicate", rng.choice(((), ("H",), ("G",), ("H", "G"), ("x",), ("D", "F")))
    )
    return f"mesh.{axis}={value} {switch}"


def _pattern(rng: random.Random, values: dict[str, Any]) -> str:
    pattern = rng.choice((*PATTERNS, near(rng, "softmax"), *OTHERS))
    set_at(values, "model.pattern", pattern)
    return f"pattern={pattern!a}"


def configs(seed: int, count: int, folder: Path, late: int) -> Found:
    """Runs `count` configurations; `late` of those that get to a device are built on it."""
    (folder / "text.txt").write_text("The quick brown fox. " * 200)
    source = {
        "path": str(folder / "text.txt"),
        "text_key": "",
        "weight": 1.0,
        "valid_fraction": 0.0,
    }
    base = to_mapping(tiny.config({"data.sources": {"text": source}}))
    found, came = Found(), []
    with without_devices():
        for n in range(count):
            rng = random.Random(f"{seed} {n}")
            values, made = mutated(rng, base)
            where = f"seed {seed}, configuration {n}: {'; '.join(made)}"

            def work(values: Any = values, where: str = where, n: int = n) -> None:
                try:
                    config = from_mapping(values)
                    train.run(config, train.Options(workdir=folder / f"run{n}", data_dir=folder))
                except TouchedError:
                    came.append((where, config))
                    raise

            run(found, where, work)
    for where, config in came[:late]:
        run(found, f"{where} (on a device)", lambda c=config: _built(c), is_late=True)
    return found


def _built(config: Any) -> None:
    built = build_lib.build(config, jax.devices())
    jax.eval_shape(built.init, 0)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, default in (
        ("seed", 0),
        ("configs", 300),
        ("lines", 100),
        ("damages", 60),
        ("late", 300),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder, seed = Path(root), asked.seed
        kept = fuzz_lines.unpacked(folder)
        found = {
            "lines": fuzz_lines.lines(seed, asked.lines, folder, kept),
            "configurations": configs(seed, asked.configs, folder, asked.late),
            "damages": fuzz_lines.damages(seed, asked.damages, folder, kept),
        }
    for name, one in found.items():
        for fault in one.faults:
            print(fault)
        ended = f"{dict(one.kinds)}; slowest {one.slowest:.1f} s; {len(one.faults)} faults"
        print(f"seed {asked.seed}, {name}: {ended}")
    return any(one.faults for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
