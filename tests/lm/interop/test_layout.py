"""The sizes of an 8 B model without its bytes, shards, and the measured memory of a 1 B model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16

from experiments.base import get_config
from lm import build as build_lib
from lm.config import UserError, from_mapping
from lm.interop import folder, hf_config, importing, layout
from lm.run import digest

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
GIB = 2**30


def entries(hf: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], list[layout.Entry]]:
    """Our leaves and the tensors of transformers that fill them."""
    values = hf_config.from_transformers(hf, get_config().to_dict(), Path("config.json"))
    values["data"]["tokenizer"] |= {"path": "tokenizer.json"}
    built = build_lib.local(from_mapping(values))
    return layout.leaves(built), layout.transformers(built)


def test_a_model_of_8b_fits_in_24_gib() -> None:
    """Names and sizes are those of the published Llama 3 8B (8,030,261,248 parameters, 16.06 GB).
    The bounds are what the docstrings of import and export say that they hold at once.
    """
    leaves, found = entries(LLAMA_8B)
    shapes = {entry.name: entry.shape for entry in found}
    assert len(shapes) == 291
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4096, 14336)
    assert shapes["lm_head.weight"] == (128256, 4096)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == 2 * 8_030_261_248
    parts = folder.shards(sizes, folder.parse_size("4GB"))
    assert [name for part in parts for name in part] == list(sizes)
    held = [sum(sizes[name] for name in part) for part in parts]
    assert len(parts) == 5
    assert max(held) <= 4e9
    assert all(a + sizes[part[0]] > 4e9 for a, part in zip(held, parts[1:], strict=False))
    largest = max(map(math.prod, leaves.values()))
    assert sum(sizes.values()) + 2 * largest < 18.5 * GIB  # import: all, and a leaf if it is copied
    assert (4 + 2) * largest + max(held) < 15 * GIB  # export: a leaf, its source, a shard


def test_headers_of_8b_are_checked_before_any_tensor(tmp_path: Path) -> None:
    """Headers are read before any tensor: the files have the right length and hold a
    header alone.
    """
    _, found = entries(LLAMA_8B)
    sizes = {entry.name: 2 * math.prod(entry.shape) for entry in found}
    shapes = {entry.name: entry.shape for entry in found}
    parts = folder.shards(sizes, folder.parse_size("4GB"))
    weight_map = {}
    for i, names in enumerate(parts):
        file, end, header = tmp_path / f"part-{i}.safetensors", 0, {}
        for name in names:
            place = [end, end := end + sizes[name]]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": place}
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + end)
    (tmp_path / folder.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    tensors = folder.Tensors(tmp_path)
    importing.check_tensors(tensors, found, tmp_path)
    assert {header.dtype for header in tensors.headers.values()} == {bfloat16}
    assert not tensors.read("model.norm.weight").any()
    os.truncate(tmp_path / "part-3.safetensors", 10**9)
    with pytest.raises(UserError, match=r"part-3.safetensors is damaged or cut short"):
        folder.Tensors(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_a_digest_in_parts_equals_the_digest(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large arrays on a CPU are summed in parts, and the digest equals the sum by its
    definition.
    """
    array = np.random.default_rng(0).standard_normal((3, 8, 40)).astype(dtype)
    bits = array.astype(np.float32).view(np.uint32).reshape(-1).astype(object)
    wanted = int(sum(bits * (2 * np.arange(bits.size).astype(object) + 1)) % 2**32)
    placed = jax.device_put(array, jax.devices()[0])
    assert digest.digest({"a": placed}) == {"a": wanted}
    monkeypatch.setattr(digest, "LARGE", 1)
    assert digest.digest({"a": placed}) == {"a": wanted}


def test_a_leaf_holds_every_tensor_once() -> None:
    """Exactly one tensor writes each element of each leaf, except for padding."""
    tiny = LLAMA_8B | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    }
    leaves, found = entries(tiny)
    rng = np.random.default_rng(0)
    made = {name: np.full(shape, np.nan, np.float32) for name, shape in leaves.items()}
    for entry in found:
        value = rng.standard_normal(entry.shape, np.float32)
        entry.put(value, made[entry.leaf])
        np.testing.assert_array_equal(entry.take(made[entry.leaf]), value)
    for name, leaf in made.items():
        assert np.isnan(leaf).sum() == (84 * 32 if name.endswith("table") else 0), name


def test_shards_hold_what_fits() -> None:
    sizes = {"a": 3, "b": 4, "c": 20, "d": 1, "e": 9}
    assert folder.shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert folder.shards(sizes, 100) == [["a", "b", "c", "d", "e"]]
    assert folder.parse_size("1.5MB") == 1_500_000
    for text in ("4", "0GB", "4gb", "-1GB", "GB"):
        with pytest.raises(UserError, match="is not a size; write 500MB or 4GB"):
            folder.parse_size(text)


MEASURED = """
import resource, sys
sys.argv[0] = "launch"
from launch import cli, {module}
sys.argv.insert(1, "--config=" + str({module}._BASE)) if hasattr({module}, "_BASE") else None
try:
    cli.run({module}.main)
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measured(module: str, *arguments: str) -> float:
    """The peak memory of a command of launch, in GiB."""
    code = MEASURED.format(module=module)
    command = [sys.executable, "-c", code, *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1].split()[0]) * 1024 / GIB


def write_random(path: Path, hf: dict[str, Any], limit: int) -> int:
    """Writes a folder of random bfloat16 weights; returns the number of parameters."""
    _, found = entries(hf)
    rng = np.random.default_rng(0)
    sizes = {entry.name: 2 * math.prod(entry.shape) for entry in found}

    def tensors() -> Any:
        for entry in found:
            value = rng.standard_normal(entry.shape, np.float32) * 0.02
            yield entry.name, value.astype(bfloat16)

    folder.write_tensors(path, sizes, tensors(), limit)
    (path / "config.json").write_text(json.dumps(hf))
    return sum(sizes.values()) // 2


@pytest.mark.slow
def test_a_1b_model_fits_in_the_memory_it_should_take(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Import holds all weights in 16 bits. Export holds a leaf as stored and as float32, and a
    shard. Each takes 1 GiB more for the process. Every tensor is unchanged after import and export.
    """
    from lm.data import tokenizers
    from lm.interop import hf_tokenizer

    source, back, out = (tmp_path / name for name in ("source", "back", "out"))
    source.mkdir()
    count = write_random(source, LLAMA_1B, 10**9)
    text = hf_tokenizer.to_json(tokenizers.Tokenizer("bytes", ""), "")
    (source / "tokenizer.json").write_text(text)
    leaf = 16 * 2048 * 8192
    reading = measured("import_hf", f"--folder={source}", f"--workdir={back}")
    writing = measured(
        "export_hf", f"--checkpoint={back}", f"--folder={out}", "--dtype=bfloat16",
        "--max_shard_size=500MB",
    )  # fmt: skip
    message = f"{count:,} parameters: import {reading:.2f} GiB, export {writing:.2f} GiB at most"
    request.node.user_properties.append(("memory", message))
    print(message)
    assert reading < 2 * count / GIB + 1
    assert writing < (4 * leaf + 2 * leaf + 5e8) / GIB + 1
    a, b = folder.Tensors(source), folder.Tensors(out)
    assert a.headers.keys() == b.headers.keys()
    for name in a.headers:
        assert np.array_equal(a.read(name).view(np.uint16), b.read(name).view(np.uint16)), name
