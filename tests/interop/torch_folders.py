"""Folders of `transformers` models with random weights; a script for an interpreter that has torch
and transformers, which shares no code with this project.

    python torch_folders.py REQUESTS.json FOLDER

A request is {"architecture": class name, "seed": .., "dtype": .., "max_shard_size": "..",
"config": {..}} under a name; FOLDER/<name> gets what save_pretrained writes.
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
                if parameter.ndim == 1:  # with the ones of an initialization none would be seen
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model = model.to(getattr(torch, request["dtype"]))
        model.save_pretrained(folder / name, max_shard_size=request["max_shard_size"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
