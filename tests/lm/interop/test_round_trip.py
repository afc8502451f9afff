"""A run that goes to a Hugging Face folder and back is the same model, in every dtype and
layout.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

import lm
from launch.cli import load_config
from lm.config import UserError, from_mapping, to_mapping
from lm.data import tokenizers
from lm.interop import exporting, folder, verify
from lm.run.checkpoint import Loaded
from tests.lm import tiny
from tests.lm.interop import runs
from tests.lm.mixers.layer import relative_error

ROWS = [[5, 200, 31, 7, 7, 256, 90, 3, 44]]
STRETCHED = {"softmax": {"mixer": "softmax", "rope_scaling": (8.0, 1.0, 4.0, 16.0)}}

# Changes to the tiny run, the architecture it is exported as, and keys of its config.json.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama, tied": (
        runs.STANDARD,
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "rope_theta": 1e4, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "llama, untied, other theta": (
        runs.STANDARD
        | {
            "model.tied_embeddings": False,
            "model.layers": {"softmax": {"rope_theta": 5e5}},
            "model.head_dim": 16,
            "model.num_kv_heads": 4,
        },
        "LlamaForCausalLM",
        {"tie_word_embeddings": False, "rope_theta": 5e5, "head_dim": 16},
    ),
    "llama, stretched rope": (
        runs.STANDARD | {"model.layers": STRETCHED},
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "granite with muP": (
        {"mup.base_width": 8},
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "initializer_range": 0.05,
        },
    ),
    "granite, any numbers": (
        {
            "mup.base_width": 32 / 6.7,
            "mup.embedding_multiplier": 3.3,
            "mup.residual_multiplier": 0.9,
            "model.layers": {"softmax": {"scale": 0.31}},
            "model.tied_embeddings": False,
        },
        "GraniteForCausalLM",
        {"embedding_multiplier": 3.3, "attention_multiplier": 0.31, "logits_scaling": 6.7},
    ),
    "granite with a scale alone": (
        runs.STANDARD | {"model.layers": {"softmax": {"scale": 0.5}}},
        "GraniteForCausalLM",
        {"attention_multiplier": 0.5, "logits_scaling": 1.0},
    ),
    "groups of layers": (
        runs.STANDARD | {"model.pattern": ((1, "softmax,softmax"), (1, "softmax"))},
        "LlamaForCausalLM",
        {"num_hidden_layers": 3},
    ),
}


COMPUTED = ("llama, stretched rope", "granite, any numbers", "groups of layers")


def function(loaded: Loaded) -> tuple[Any, ...]:
    """What a softmax model computes from its parameters, as plain values."""
    mixer, found = loaded.model.groups[0].blocks[0].mixer, loaded.model.context
    factors = (found.multipliers.width, found.multipliers.embedding, found.multipliers.residual)
    options = {**mixer.op_options(), "theta": mixer.rope_theta, "scaling": mixer.rope_scaling}
    return options, mixer.dims(), [f"{factor:.12g}" for factor in factors], found.norm_eps


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_comes_back(tmp_path: Path, name: str) -> None:
    changes, architecture, keys = CASES[name]
    runs.create(tmp_path / "run", changes)
    assert runs.exported(tmp_path / "run", tmp_path / "out")[:2] == (architecture, None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in keys} == keys
    assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
    runs.imported(tmp_path / "out", tmp_path / "back")
    before, after = lm.load(tmp_path / "run"), lm.load(tmp_path / "back")
    assert (after.config.model.num_layers, after.step) == (3, 0)
    if name in COMPUTED:
        (a,), (b,) = verify.logits(before, ROWS), verify.logits(after, ROWS)
        assert a.shape == (9, 257)
        assert relative_error(b, a) < 1e-5
    if name != "groups of layers":
        runs.assert_equal(before.params, after.params)
        assert function(after) == function(before)
    assert after.tokenizer.encode("naïve") == before.tokenizer.encode("naïve")


def test_shards_in_bfloat16_come_back_rounded_once(tmp_path: Path) -> None:
    """The export rounds once; the import then equals it bit for bit and records bfloat16."""
    runs.create(tmp_path / "run", runs.STANDARD)
    runs.exported(tmp_path / "run", tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / folder.INDEX).read_text())
    parts = {file: load_file(tmp_path / "out" / file) for file in files}
    assert {n: f for f, part in parts.items() for n in part} == index["weight_map"]
    sizes = [sum(a.nbytes for a in part.values()) for part in parts.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(
        size <= 20_000 or len(part) == 1 for size, part in zip(sizes, parts.values(), strict=True)
    )
    assert {a.dtype for part in parts.values() for a in part.values()} == {np.dtype(bfloat16)}
    found = runs.imported(tmp_path / "out", tmp_path / "back")
    assert found.source["stored_as"] == "bfloat16"
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(bfloat16).astype(np.float32),
        lm.load(tmp_path / "run").params,
    )
    runs.assert_equal(lm.load(tmp_path / "back").params, rounded)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float16_and_mixed_types_are_imported(tmp_path: Path, dtype: Any) -> None:
    runs.create(tmp_path / "run", runs.STANDARD)
    runs.exported(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out" / folder.SINGLE)
    low = {name: value.astype(np.float16) for name, value in weights.items()}
    low["model.norm.weight"] = weights["model.norm.weight"].astype(dtype)
    folder.save_file(low, tmp_path / "out" / folder.SINGLE)
    found = runs.imported(tmp_path / "out", tmp_path / "back")
    assert found.source["stored_as"] == np.dtype(dtype).name
    got = lm.load(tmp_path / "back").params
    np.testing.assert_array_equal(got["final_norm"]["scale"], low["model.norm.weight"])
    gate = np.asarray(got["groups_0"]["blocks_0"]["mlp"]["gate"]["kernel"][2])
    np.testing.assert_array_equal(gate, low["model.layers.2.mlp.gate_proj.weight"].T)
    assert got["final_norm"]["scale"].dtype == np.float32


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "another mixer": ({"model.pattern": "softmax,gated_deltanet"}, "GatedDeltanet has no class"),
    "an option": ({"model.layers": {"softmax": {"window": 4}}}, "Softmax with window=4"),
    "a norm": ({"model.layers": {"softmax": {"qk_norm": True}}}, "Softmax with qk_norm=True"),
    "no feed-forward": ({"model.layers": {"softmax": {"mlp": "none"}}}, "without a feed-forward"),
    "unequal layers": (
        {
            "model.layers": {"a": {"mixer": "softmax", "rope_theta": 10.0}},
            "model.pattern": "a,softmax",
        },
        "layers differ in rope_theta",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_that_transformers_lacks_is_exported_in_our_format(
    tmp_path: Path, name: str
) -> None:
    changes, reason = OWN[name]
    built = runs.create(tmp_path / "run", changes)
    done = runs.exported(tmp_path / "run", tmp_path / "out", max_shard_size="30KB")
    assert done.architecture == "EspalierForCausalLM"
    assert reason in str(done.obstacle)
    found = runs.imported(tmp_path / "out", tmp_path / "back")
    assert found.build.config.model == built.config.model
    assert found.build.config.mup == built.config.mup
    before, after = lm.load(tmp_path / "run"), lm.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.tokenizer.sha256 == before.tokenizer.sha256


def test_an_import_writes_an_experiment_that_goes_on(tmp_path: Path) -> None:
    """experiment.py is the configuration of the import with init_from; the tokenizer is
    beside it.
    """
    runs.create(tmp_path / "run", runs.STANDARD)
    runs.exported(tmp_path / "run", tmp_path / "out")
    found = runs.imported(tmp_path / "out", tmp_path / "back")
    path = tmp_path / "back" / "experiment.py"
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value = module.get_config()
    assert isinstance(value, ConfigDict)
    config = load_config(value)
    assert config.init_from == str(tmp_path / "back")
    assert config.model == found.build.config.model
    tokenizer = Path(config.data.tokenizer.path)
    assert tokenizer == tmp_path / "back" / "hf" / "tokenizer.json"
    assert tokenizers.create(config.data.tokenizer).sha256 == found.tokenizer.sha256


def test_an_imported_model_is_exported_as_it_came(tmp_path: Path) -> None:
    """Longest position, token ids and tokenizer files are kept, though our configuration lacks
    them.
    """
    runs.create(tmp_path / "run", runs.STANDARD)
    runs.exported(tmp_path / "run", tmp_path / "out", longest=4096)
    source = tmp_path / "out" / "config.json"
    config = json.loads(source.read_text()) | {"bos_token_id": 7}
    source.write_text(json.dumps(config))
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"bos_token": "x"}')
    runs.imported(tmp_path / "out", tmp_path / "back")
    runs.exported(tmp_path / "back", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_mixer_stretches_rope_and_scales_logits() -> None:
    """Llama 3.1 keeps fast frequencies, divides slow ones and has a ramp between, as in
    its paper.
    """
    mixer = tiny.create({"model.pattern": "softmax", "model.layers": STRETCHED}).model.groups[0]
    options = mixer.blocks[0].mixer.op_options()
    assert options["scale"] == 0.125
    changes = {"model.layers": {"softmax": {"scale": 0.7}}, "model.pattern": "softmax"}
    assert tiny.create(changes).model.groups[0].blocks[0].mixer.op_options()["scale"] == 0.7


@pytest.mark.parametrize("number", [1, 2])
def test_sections_of_the_first_format_are_read(number: int) -> None:
    """They lack the keys that did not exist then."""
    built = tiny.create()
    hf = exporting.to_own(built, 64)
    hf["espalier"]["format"] = number
    if number == 1:
        for key in ("mlp", "residual", "matrix"):
            del hf["espalier"]["model"][key]
    values = exporting.from_own(hf, to_mapping(tiny.config()), Path("config.json"))
    assert from_mapping(values).model == built.config.model


def test_sections_of_a_later_format_are_refused() -> None:
    hf = exporting.to_own(tiny.create(), 64)
    hf["espalier"]["format"] = 3
    with pytest.raises(UserError, match=r"config.json: format 3, this reads up to 2"):
        exporting.from_own(hf, to_mapping(tiny.config()), Path("config.json"))
