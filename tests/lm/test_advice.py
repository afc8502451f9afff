"""Following the advice of an error message removes the error.

Each piece of advice is followed alone. Another error may appear then, but it must not be about the
value that was set.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from lm import build as build_lib
from lm.config import Config, UserError, flatten, from_mapping
from lm.parallel import mesh as mesh_lib
from tests.lm import test_config
from tests.lm.test_config import SOURCE, values

# Phrases of error messages that state what a value must be, with a value that satisfies each.
EXAMPLES = {
    "must be positive": 1,
    "must be >= 0": 0,
    "must lie in [0, 1)": 0,
    "must lie in [0, 1]": 0,
    "must lie in [0, 2^31)": 0,
    "must be below 2^31": 1024,
    "must be at most 2^20": 64,
    "must be >= 257": 257,
    "must be finite": 1.0,
    "must be a finite duration": "1 steps",
    "must be 0, or from 1.2e-38": 1.0,
    "must be a positive number of tokens or steps": "9 steps",
    "is not a duration; write a number and one of steps": "1 steps",
    "is not a number": "1 steps",
    "is too long; set at most 9.0e+15": "9.0e+15 percent",
    "; set a int": 1,
    "; set a float": 1.0,
    "; set a str": "1 steps",
    "; set a bool": True,
    "; set a list": ["G"],
    "; set a dict": {},
    "is not UTF-8": "text",
    "holds a NUL; leave it out": "text",
}
# Advice given in words, and the changes that follow it, each tried alone.
WAYS: dict[str, list[dict[str, Any]]] = {
    "shorten them": [{"schedule.warmup": "1 steps", "schedule.decay": "10 percent"}],
    "or lengthen the run": [{"run.length": "1e12 tokens"}],
    "; shorten it": [{"run.length": "10 steps"}],
    "set one of them to ''": [{"init_from": ""}, {"decay_from": ""}],
    "a first token; remove it": [{"log.samples": ["a"]}],
    "name both, or 'G' alone": [{"mesh.replicate": ["G", "H"]}, {"mesh.replicate": ["G"]}],
    "set a decay > 0 (percent < 100)": [{"schedule.decay": "10 percent"}],
    "needs a > 0 and b < 0": [{"schedule.a": 4.0, "schedule.b": -0.51}],
    "needs data.tokenizer.path; set it": [{"data.tokenizer.path": "x.json"}],
    "reads no file; set path to ''": [{"data.tokenizer.path": ""}],
    "needs model.remat='named'": [{"model.remat": "named"}, {"model.kept": {}}],
    "batch size or the mesh": [{"mesh.data": 1}],
    "or change the mesh": [{"mesh.data": 1, "mesh.fsdp": 1}],
    "change the number or the mesh": [
        {"mesh.tensor": 1},
        {"model.num_heads": 16, "model.num_kv_heads": 16},
    ],
    "change the size or the mesh": [{"mesh.tensor": 1, "mesh.fsdp": 1}],
    "name a schedule, {'family'": [{"schedule": {"family": "wsd"}}],
    "set expand_k=1.0": [{"model.layers.a.expand_k": 1.0}],
    "set normalize=False": [{"model.layers.a.normalize": False}],
}


def fill(count: int) -> dict[str, Any]:
    return {"mesh.data": count, "mesh.fsdp": 1, "mesh.tensor": 1}


MESHES: list[tuple[dict[str, Any], int]] = [
    (
        {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "data.context_length": 30},
        count,
    )
    for data in (-1, 1, 3, 8)
    for fsdp in (1, 2, -1)
    for tensor in (1, 4, 8)
    for count in (1, 6, 8, 16)
    if (data, fsdp) != (-1, -1)
]
MORE: list[dict[str, Any]] = [
    {"model.num_heads": 12, "model.num_kv_heads": 8},
    {"data.batch_size": 10, "run.accumulation": 4},
    {"schedule.warmup": "90 percent", "schedule.decay": "20 percent"},
    {"schedule.warmup": "1e7 tokens"},
    {"schedule.warmup": "300 steps", "schedule.decay": "10 percent"},
    {"model.kept": {"mixer": "device"}},
    {"model.remat": "named", "model.kept": {"mixr": "device"}},
    {"model.pattern": "softmx"},
    {"model.pattern": "a", "model.layers": {"a": {"mixer": "based", "expand_k": 2.0}}},
    {"model.pattern": "a", "model.layers": {"a": {"mixer": "linear", "feature_map": "identity"}}},
    {"model.pattern": "a", "model.layers": {"a": {"mixer": "softmax", "form": "chunkd"}}},
    {"model.pattern": "a", "model.layers": {"a": {"mixer": "softmax", "windw": 3}}},
    {"mesh.replicate": ["h"]},
    {"mesh.sequence": 2, "mesh.sequence_strategy": "states", "model.pattern": "softmax,gla"},
    {"mesh.sequence": 2, "mesh.sequence_strategy": "gla=ring", "model.pattern": "softmax,gla"},
    {"mesh.sequence": 3, "mesh.sequence_strategy": "all_to_all", "data.context_length": 48},
    {"mesh.sequence": 8, "mesh.sequence_layout": "zigzag", "model.pattern": "softmax,gla"},
    {"mesh.sequence_strategy": "gathers"},
    {"mesh.sequence_strategy": "{'softmax': 'ring'}", "model.pattern": "softmax"},
    {"mesh.sequence_strategy": "softmax=ring,softmax=gather", "model.pattern": "softmax"},
    {"mesh.sequence_strategy": "softmx=ring", "model.pattern": "softmax"},
    {"objective.family": "next_tken"},
    {"log.gradient_noise": True, "mesh.data": 1},
    {"schedule": {"family": "cosine"}, "optimizer.hypergradient": 0.1},
    {"data.tokenizer.vocab_size": 10**12},
    {"data.sources.more": SOURCE | {"valid_fraction": 1.0}},
]
CASES = [(changes, None) for changes, _ in test_config.MISTAKES] + [(x, None) for x in MORE]


def load(mapping: dict[str, Any], count: int | None, patch: pytest.MonkeyPatch) -> Config:
    foreseen = (count, ("cpu",) if count else ("cpu", "gpu", "tpu"))
    patch.setattr(mesh_lib, "foreseen", lambda: foreseen)
    config = from_mapping(mapping)
    build_lib.check(config)
    return config


def refusal(mapping: dict[str, Any], count: int | None, patch: pytest.MonkeyPatch) -> str | None:
    try:
        load(mapping, count, patch)
    except UserError as error:
        return str(error)
    return None


def kind(message: str) -> str:
    """A message with its values masked, so that two errors of the same kind compare equal."""
    return re.sub(r"[\d.]+|'[^']*'", "#", message.partition(";")[0])


def node_of(mapping: dict[str, Any], dotted: str) -> tuple[Any, str]:
    *groups, leaf = dotted.removeprefix("config.").split(".")
    node: Any = mapping
    for group in groups:
        node = node[group]
    return node, leaf


def obeyed(mapping: dict[str, Any], message: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each piece of advice in a message, with a configuration that follows it."""
    again = lambda: _copied(mapping)
    for key, value in re.findall(r"\b([a-z]\w*(?:\.\w+)+)=('[^']*'|[\w.+-]*\w)", _advice(message)):
        changed = again()
        node, leaf = node_of(changed, key)
        node[leaf] = _value(value)
        yield f"{key}={value}", changed
    where = re.search(r"config\.([\w.]+?)(?:\[\d+\])?(?:=| is )", message)
    if where and (choices := re.search(r" is not one of (.*)$", message)):
        for choice in choices[1].split(", "):
            yield from _with(again(), where[1], choice)
    for words, example in EXAMPLES.items():
        place = where or re.match(r"([\w.]+)=", message)
        if words in message and place and " with " not in message:
            yield from _with(again(), place[1], example)
    for words, ways in WAYS.items():
        for way in ways if words in message else ():
            yield f"as {way}", _changed(mapping, way)
    if size := re.search(r"set sizes that multiply to (\d+)", message):
        yield size[0], _changed(mapping, fill(int(size[1])))
    if re.search(r"; lower (either|one of them)", message):
        for key in re.findall(r"((?:\w+\.)+\w+)=\d{3}", message):
            yield f"a lower {key}", _changed(mapping, {key: 8})
    if missing := re.match(r"missing key config\.(.*); experiments/base.py states", message):
        yield (
            "as base.py",
            _changed(mapping, {missing[1]: flatten(values()).get(missing[1], "text")}),
        )
    if near := re.search(r"unknown form '(\w+)'; did you mean '(\w+)'", message):
        yield f"{near[1]} -> {near[2]}", _renamed(mapping, near[1], near[2])
    for near in re.findall(r"replicate: '(\w+)' is not a size; known: (\w+)", message):
        yield f"{near[0]} -> {near[1]}", _renamed(mapping, *near)
    for near in re.findall(r"unknown \w+ (?:[\w.]+\.)?'?(\w+)'?; known: (.*)", message):
        yield f"{near[0]} -> one", _renamed(mapping, near[0], near[1].split(", ")[0])
    if near := re.search(r"([\w.]+)'?(?: is not a size)?; did you mean '(\w+)'", message):
        yield f"{near[1]} -> {near[2]}", _renamed(mapping, near[1].split(".")[-1], near[2])
    if extra := re.search(r"add ((?:'\w+'(?: and )?)+) to mesh.replicate", message):
        changed = again()
        changed["mesh"]["replicate"] = [
            *changed["mesh"]["replicate"],
            *re.findall(r"\w+(?=')", extra[1]),
        ]
        yield f"replicate {extra[1]}", changed


def _exact(what: str) -> str:
    """ "data=-1" of what a message said in just these words, mesh.data=-1."""
    found = re.fullmatch(r"[\w.]*\.(\w+=\S+)", what)
    return found[1] if found else ""


def _advice(message: str) -> str:
    return message.partition("; ")[2] if "; " in message else ""


def _with(changed: dict[str, Any], key: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    node, leaf = node_of(changed, key)
    was = node.get(leaf) if isinstance(node, dict) else None
    if isinstance(was, (list, tuple)) and not isinstance(value, list):
        value = [str(value)]
    node[leaf] = value
    yield f"{value!r} for {key}", changed


def _changed(mapping: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    changed = _copied(mapping)
    for key, value in way.items():
        node, leaf = node_of(changed, key)
        node[leaf] = value
    return changed


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {new if k == old else k: _renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(v, old, new) for v in value]
    return new if value == old else value


@pytest.mark.parametrize(
    ("changes", "count"), [*CASES, *MESHES], ids=lambda x: re.sub(r" at 0x\w+", "", str(x))[:60]
)
def test_advice_helps(
    changes: dict[str, Any], count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device is looked for"))
    mapping = values(changes)
    message = refusal(mapping, count, monkeypatch)
    if message is None:
        assert count is not None, "only meshes may fit"
        return
    ways = list(obeyed(mapping, message))
    assert ways, f"nothing in it was followed: {message}"
    for what, changed in ways:
        after = refusal(changed, count, monkeypatch)
        assert after is None or kind(after) != kind(message), (message, what, after)
        assert after is None or not _exact(what) or _exact(what) not in after, (
            message,
            what,
            after,
        )
