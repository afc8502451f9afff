"""Mixers against layers of `transformers` with the same weights, in float32 on the CPU.

torch_layers.py makes and runs those layers, in an interpreter with torch and transformers: the one
that ESPALIER_INTEROP_PYTHON names, or this one.

A Linear of torch holds [out, in]. Ours hold [in, out] with the out side cut into heads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, relative_error

VARIABLE = "ESPALIER_INTEROP_PYTHON"
SCRIPT = Path(__file__).with_name("torch_layers.py")
type Weights = Mapping[str, np.ndarray]

WIDTH = 32
MAMBA2 = {"hidden_size": WIDTH, "expand": 2, "head_dim": 8, "num_heads": 8, "state_size": 6}
REQUESTS: dict[str, dict[str, Any]] = {
    "llama": {
        "layer": "llama",
        "config": {
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "mamba2_1": {"layer": "mamba2", "config": MAMBA2 | {"n_groups": 1, "chunk_size": 16}},
    "mamba2_2": {"layer": "mamba2", "config": MAMBA2 | {"n_groups": 2, "chunk_size": 16}},
    # With more value heads than key heads that layer repeats keys, and ours does not.
    "gated_deltanet": {
        "layer": "gated_delta_net",
        "config": {
            "hidden_size": WIDTH,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 12,
            "rms_norm_eps": 1e-5,
        },
    },
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Weights, input and output of every request, from one run of the script."""
    python = os.environ.get(VARIABLE)
    if python is None:
        if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            pytest.skip(f"needs torch and transformers; {VARIABLE} names an interpreter with both")
        python = sys.executable
    folder = tmp_path_factory.mktemp("interop")
    common = {"seed": 0, "input": [2, 70, WIDTH]}
    requests = {name: common | request for name, request in REQUESTS.items()}
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [python, str(SCRIPT), str(folder / "requests.json"), str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(folder / f"{name}.npz")) for name in REQUESTS}


def into(weight: np.ndarray, *heads: int) -> dict[str, np.ndarray]:
    """[out, D] -> kernel [D, *heads]"""
    return {"kernel": weight.T.reshape(weight.shape[1], *heads)}


def back(weight: np.ndarray, *heads: int) -> dict[str, np.ndarray]:
    """[D, in] -> kernel [*heads, D]"""
    return {"kernel": weight.T.reshape(*heads, weight.shape[0])}


def softmax(w: Weights) -> tuple[Layer, Any]:
    """q, k, v and o map one to one. The standard parametrization scales by K^-1/2, where muP has 1
    / K.
    """
    standard = {
        "mup.parametrization": "standard",
        "mup.embedding_multiplier": 1.0,
        "mup.residual_multiplier": 1.0,
        "model.num_kv_heads": 2,
    }
    params = {
        "query": into(w["q_proj.weight"], 4, 8),
        "key": into(w["k_proj.weight"], 2, 8),
        "value": into(w["v_proj.weight"], 2, 8),
        "out": back(w["o_proj.weight"], 4, 8),
    }
    return Layer("softmax", standard, rope_theta=1e4), params


def mamba2(w: Weights, num_groups: int) -> tuple[Layer, Any]:
    """in_proj holds z, x, B, C, dt one after another, and conv1d x, B, C. The norm's weight covers
    all heads.
    """
    inner, shared = 64, 2 * num_groups
    z, x, bc, dt = np.split(w["in_proj.weight"], np.cumsum([inner, inner, shared * 6]))
    weights, biases = w["conv1d.weight"][:, 0], w["conv1d.bias"]
    params = {
        "gate": into(z, 8, 8),
        "value": into(x, 8, 8),
        "shared": into(bc, shared, 6),
        "dt": into(dt, 8),
        "conv": {"weight": weights[:inner].reshape(8, 8, 4), "bias": biases[:inner].reshape(8, 8)},
        "group_conv": {
            "weight": weights[inner:].reshape(shared, 6, 4),
            "bias": biases[inner:].reshape(shared, 6),
        },
        "norm": {"scale": w["norm.weight"].reshape(8, 8)},
        "out": back(w["out_proj.weight"], 8, 8),
    }
    rates = {name: w[name] for name in ("A_log", "dt_bias", "D")}
    return Layer("mamba2", state_dim=6, num_groups=num_groups), params | rates


def gated_deltanet(w: Weights) -> tuple[Layer, Any]:
    """in_proj_qkvz holds q, k, v, z of head 0, then of head 1, and so on; in_proj_ba likewise beta
    and decay. conv1d holds q of all heads, then k, then v. The norm multiplies by its scale, not by
    one plus it.
    """
    per_head = w["in_proj_qkvz.weight"].reshape(4, 6 + 6 + 12 + 12, WIDTH)
    q, k, v, z = np.split(per_head, [6, 12, 24], axis=1)
    beta, decay = np.split(w["in_proj_ba.weight"].reshape(4, 2, WIDTH), 2, axis=1)
    taps = np.split(w["conv1d.weight"][:, 0], [4 * 6, 4 * 12])
    heads = {"query": q, "key": k, "value": v, "gate": z}
    params = {name: into(rows.reshape(-1, WIDTH), *rows.shape[:2]) for name, rows in heads.items()}
    params |= {
        "beta": into(beta[:, 0], 4),
        "decay": into(decay[:, 0], 4),
        "conv": {"weight": np.concatenate([part.reshape(4, -1, 4) for part in taps], axis=1)},
        "norm": {"scale": w["norm.weight"]},
        "out": back(w["out_proj.weight"], 4, 12),
    }
    return Layer("gated_deltanet"), params | {name: w[name] for name in ("A_log", "dt_bias")}


MAPPINGS: dict[str, Any] = {
    "llama": softmax,
    "mamba2_1": lambda w: mamba2(w, 1),
    "mamba2_2": lambda w: mamba2(w, 2),
    "gated_deltanet": gated_deltanet,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_equals_the_layer_of_transformers(theirs: dict[str, Weights], name: str) -> None:
    """Both sides are float32 sums in different orders, so the limit is 1e-5, as between forms of an
    op.
    """
    found = theirs[name]
    layer, params = MAPPINGS[name](found)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dict(layer.params))
    got = tiny.jit(layer)(params, found["input"])
    assert relative_error(got, found["output"]) < 1e-5
