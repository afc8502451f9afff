"""Writes folders of `transformers` models with random weights.

    python torch_folders.py REQUESTS.json FOLDER

This script runs in an interpreter that has torch and transformers. It does not import this project.
REQUESTS.json maps names to requests: {"architecture": class name, "seed": .., "dtype": ..,
"max_shard_size": "..", "config": {..}}. save_pretrained writes each model to FOLDER/<name>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def main(requests: Path, folder: Path) -> None:
    for name, request in json.loads(requests.read_text()).items():
        torch.manual_seed(request["seed"])
        cls = getattr(transformers, request["architecture"])
        model = cls(cls.config_class(**request["config"]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # with the initial ones an error would not show
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model = model.to(getattr(torch, request["dtype"]))
        model.save_pretrained(folder / name, max_shard_size=request["max_shard_size"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
