"""Which key of a config.json is read where several say the same; transformers 5.24 decides.

The numbers expected are those of its LlamaConfig after `standardize_rope_params`;
tests/interop/test_keys.py asks the library itself, for more of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.base import get_config
from lm.config import UserError
from lm.interop import hf_config

WHERE = Path("config.json")
HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 640,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
}
CUTS = {"factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0}
LLAMA3 = {"rope_type": "llama3", **CUTS}
LINEAR = {"type": "linear", "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 77.0}
LONGEST, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"

# Keys (...: absent), the base and scaling of RoPE, and the keys that are named as ignored.
READ: list[tuple[dict[str, Any], float, tuple[float, ...], list[str]]] = [
    ({}, 1e4, (), []),
    ({"rope_theta": 55.0}, 55.0, (), []),
    ({"rope_parameters": PLAIN, "rope_theta": 77.0}, 77.0, (), []),
    (
        {"rope_parameters": PLAIN, "rope_theta": 55.0},
        77.0,
        (),
        ["rope_theta (rope_parameters.rope_theta is read)"],
    ),
    (
        {"rope_parameters": PLAIN, "rope_scaling": LINEAR},
        1e4,
        (3.0,),
        ["rope_parameters (rope_scaling is read)"],
    ),
    (
        {"rope_parameters": LINEAR, "rope_scaling": PLAIN},
        77.0,
        (),
        ["rope_parameters (rope_scaling is read)"],
    ),
    ({"rope_parameters": LINEAR | {"rope_theta": 1e4}, "rope_scaling": LINEAR}, 1e4, (3.0,), []),
    ({"rope_parameters": PLAIN, "rope_scaling": {}}, 77.0, (), []),
    ({"rope_parameters": PLAIN, "rope_scaling": None}, 77.0, (), []),
    (
        {"rope_parameters": {"rope_type": "linear", "type": "default", "factor": 2.0}},
        1e4,
        (2.0,),
        ["rope_parameters.type (rope_parameters.rope_type is read)"],
    ),
    ({"rope_parameters": PLAIN | {"factor": 8.0}}, 77.0, (), ["rope_parameters.factor"]),
    ({"rope_scaling": LLAMA3}, 1e4, (4.0, 1.5, 6.0, 640.0), []),
    ({"rope_scaling": LLAMA3, LONGEST: ...}, 1e4, (4.0, 1.5, 6.0, 2048.0), []),
    ({"rope_scaling": LLAMA3 | {ORIGINAL: 99}}, 1e4, (4.0, 1.5, 6.0, 99.0), []),
    ({"rope_scaling": LLAMA3, ORIGINAL: 88}, 1e4, (4.0, 1.5, 6.0, 88.0), []),
    (
        {"rope_scaling": LLAMA3 | {ORIGINAL: 99}, ORIGINAL: 88},
        1e4,
        (4.0, 1.5, 6.0, 88.0),
        [f"rope_scaling.{ORIGINAL} ({ORIGINAL} is read)"],
    ),
    ({"rope_scaling": LINEAR, ORIGINAL: 88}, 1e4, (3.0,), [ORIGINAL]),
    (
        {"attention_dropout": 0.1, "clip_qkv": None, "mup": False},
        1e4,
        (),
        ["attention_dropout", "mup"],
    ),
    (
        {"embedding_multiplier": 3.0, "logits_scaling": 2},
        1e4,
        (),
        ["embedding_multiplier", "logits_scaling"],
    ),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": PLAIN}, "type 'yarn'"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type ['linear'] cannot be read"),
    ({"architectures": [{}]}, "architecture {} cannot be read"),
    ({"rope_scaling": {"type": "linear"}}, "config.json lacks factor"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
    ({"rope_parameters": {"full_attention": PLAIN}}, "one for each kind of layer"),
    ({"rope_theta": None}, "config.json lacks rope_theta"),
    ({"rope_parameters": {"rope_theta": None}}, "config.json lacks rope_theta"),
    ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is not 1"),
    ({"model_type": "mistral"}, "model_type='mistral' and architectures=['LlamaForCausalLM']"),
    ({"num_attention_heads": 5, "head_dim": 8}, "hidden_size=48 is not a multiple of"),
    ({"sliding_window": 128}, "sliding_window=128; every layer here reads all tokens"),
    ({"layer_types": ["sliding_attention"]}, "layer_types is set; every layer here"),
    ({"attention_chunk_size": 64}, "attention_chunk_size=64; every layer"),
    ({"is_causal": False}, "is_causal=false; tokens here never see later ones"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=true; there is no encoder"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is set; layers that differ"),
    ({"text_config": {"tie_word_embeddings": True}}, "text_config is set; the model is a part"),
    ({"compression_config": {"bits": 4}}, "compression_config is set; give the folder of plain"),
    ({"transformers_weights": "x.safetensors"}, 'transformers_weights="x.safetensors"; model.s'),
    ({"hidden_act": None}, "hidden_act=null; our feed-forward"),
    ({"hidden_act": "gelu_new"}, 'hidden_act="gelu_new"; our feed-forward'),
]


@pytest.mark.parametrize(("keys", "theta", "scaling", "ignored"), READ, ids=str)
def test_each_value_is_read_from_the_key_that_counts(
    keys: dict[str, Any], theta: float, scaling: tuple[float, ...], ignored: list[str]
) -> None:
    hf = {key: value for key, value in (HF | keys).items() if value is not ...}
    values = hf_config.from_transformers(hf, get_config().to_dict(), WHERE)
    (layer,) = values["model"]["layers"].values()
    assert (layer["rope_theta"], layer.get("rope_scaling", ())) == (theta, scaling)
    assert hf_config.ignored(hf, WHERE) == ignored


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=str)
def test_keys_we_cannot_follow_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        hf_config.from_transformers(HF | keys, get_config().to_dict(), WHERE)
    assert str(caught.value).startswith("config.json")
    assert message in str(caught.value)


def test_granite_reads_its_multipliers() -> None:
    four = dict.fromkeys(hf_config.GRANITES, 0.5)
    hf = HF | four | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    assert hf_config.ignored(hf, WHERE) == []
