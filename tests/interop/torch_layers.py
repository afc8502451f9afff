"""Runs layers of `transformers` with random weights on the CPU.

    python torch_layers.py REQUESTS.json FOLDER

This script runs in an interpreter that has torch and transformers. It does not import this project.
REQUESTS.json maps names to requests: {"layer": a key of LAYERS, "seed": .., "input": [B, T, D],
"config": {..}}. FOLDER/<name>.npz gets the layer's state dict, and `input` and `output`, which are
[B, T, D] in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers.models.llama import (  # pyright: ignore[reportMissingImports]
    configuration_llama,
    modeling_llama,
)
from transformers.models.mamba2 import (  # pyright: ignore[reportMissingImports]
    configuration_mamba2,
    modeling_mamba2,
)
from transformers.models.qwen3_next import (  # pyright: ignore[reportMissingImports]
    configuration_qwen3_next,
    modeling_qwen3_next,
)


def llama(sizes: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """Attention with rotary positions, and the causal mask that its model would pass to it."""
    config = configuration_llama.LlamaConfig(**sizes, attn_implementation="eager")
    layer = modeling_llama.LlamaAttention(config, layer_idx=0)
    rotary = modeling_llama.LlamaRotaryEmbedding(config)

    def call(x: Any) -> Any:
        time = x.shape[1]
        positions = torch.arange(time)[None]
        mask = torch.full((time, time), torch.finfo(x.dtype).min).triu(1)[None, None]
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=mask)[0]

    return layer, call


def mamba2(sizes: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """Without the mamba_ssm package the layer takes its plain path, in chunks."""
    config = configuration_mamba2.Mamba2Config(**sizes)
    layer = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
    return layer, layer


def gated_delta_net(sizes: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """The layer of Qwen3-Next. Without the fla package it takes its plain path, in chunks of 64."""
    config = configuration_qwen3_next.Qwen3NextConfig(
        **sizes, layer_types=["linear_attention"], num_hidden_layers=1
    )
    layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    return layer, layer


LAYERS = {"llama": llama, "mamba2": mamba2, "gated_delta_net": gated_delta_net}


def shake(layer: Any) -> None:
    """Makes vectors random too. With their initial ones and zeros an error would not show."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "A_log":
                parameter.uniform_(-2.0, 0.0)
            elif name == "dt_bias":
                parameter.uniform_(-3.0, 0.0)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))


def main(requests: Path, folder: Path) -> None:
    for name, request in json.loads(requests.read_text()).items():
        torch.manual_seed(request["seed"])
        layer, call = LAYERS[request["layer"]](request["config"])
        layer.eval()
        shake(layer)
        x = torch.randn(request["input"])
        with torch.no_grad():
            output = call(x)
        arrays = {"input": x, "output": output, **layer.state_dict()}
        np.savez(folder / f"{name}.npz", **{key: a.numpy() for key, a in arrays.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
