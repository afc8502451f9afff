"""Random models that `transformers` wrote are imported, give the same outputs, and are exported
with the same outputs.

torch_folders.py writes them, and lm/interop/transformers_run.py runs them. Both run in the
interpreter that ESPALIER_INTEROP_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.data.tokenizers import Tokenizer
from lm.interop import hf_tokenizer, verify
from tests.lm.interop import runs

SCRIPT = Path(__file__).with_name("torch_folders.py")
PROMPTS = ("def f(x):", "naïve", "\n")
# Large initial weights, so that attention is far from uniform and positions matter.
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


def request(architecture: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    common = {"seed": 0, "dtype": "float32", "max_shard_size": "4GB"}
    return common | {"architecture": architecture, "config": SIZES | config} | options


REQUESTS = {
    "llama_tied": request("LlamaForCausalLM", rope(1e4) | {"tie_word_embeddings": True}),
    "llama_unused_ids": request("LlamaForCausalLM", rope(1e4) | {"vocab_size": 300}),
    "llama_untied_shards": request(
        "LlamaForCausalLM", rope(5e5) | {"head_dim": 16}, max_shard_size="30KB"
    ),
    "llama3": request("LlamaForCausalLM", rope(5e5, **LLAMA3) | {"num_key_value_heads": 4}),
    "llama_linear": request("LlamaForCausalLM", rope(1e4, rope_type="linear", factor=4.0)),
    "granite": request(
        "GraniteForCausalLM",
        rope(1e4)
        | {
            "embedding_multiplier": 3.7,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.45,
            "logits_scaling": 1.3,
            "tie_word_embeddings": True,
        },
    ),
    "granite_bfloat16": request(
        "GraniteForCausalLM",
        rope(1e6) | {"attention_multiplier": 0.125, "logits_scaling": 0.5, "head_dim": 8},
        dtype="bfloat16",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each request, with our byte tokenizer in it."""
    if not (python := os.environ.get(verify.VARIABLE)):
        pytest.skip(f"{verify.VARIABLE} does not name an interpreter with torch and transformers")
    folder = tmp_path_factory.mktemp("folders")
    (folder / "requests.json").write_text(json.dumps(REQUESTS))
    command = [python, str(SCRIPT), str(folder / "requests.json"), str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = hf_tokenizer.to_json(Tokenizer("bytes", ""), "")
    for name in REQUESTS:
        (folder / name / "tokenizer.json").write_text(text)
    return folder


@pytest.mark.parametrize("name", REQUESTS)
def test_there_and_back(
    folders: Path, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    """The limit of 1e-4 is for logits of size 1 to 10, and float32 sums in different orders. Both
    sides compute in float32, in which 16-bit weights are exact.
    """
    runs.imported(folders / name, tmp_path / "run")
    loaded = lm.load(tmp_path / "run")
    architecture = REQUESTS[name]["architecture"]
    assert runs.exported(tmp_path / "run", tmp_path / "out").architecture == architecture
    for folder in (folders / name, tmp_path / "out"):
        found = verify.compare(loaded, folder, prompts=PROMPTS, length=100, max_new_tokens=24)
        record_property(folder.name, str(found))
        print(name, folder.name, found)
        assert found.theirs == architecture
        assert found.scale > 0.3
        assert found.max_difference < 1e-4
        assert found.kl < 1e-8
        assert found.agreement == 1.0
        assert found.same_ids
        assert found.same_tokens == found.new_tokens > 0
        assert all(ours == theirs for _, ours, theirs in found.texts)


def test_a_difference_is_seen(folders: Path, tmp_path: Path) -> None:
    """The comparison can fail: another base of RoPE is noticed."""
    runs.imported(folders / "llama_tied", tmp_path / "run")
    loaded = lm.load(tmp_path / "run", {"softmax": {"rope_theta": 1.2e4}})
    found = verify.compare(loaded, folders / "llama_tied", prompts=PROMPTS, max_new_tokens=24)
    assert found.max_difference > 1e-2
    assert found.agreement < 1.0
