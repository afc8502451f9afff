"""RoPE of a config.json is read as transformers reads it.

Its own class is asked, for all combinations of values in the two places that hold them. Needs
transformers, but not torch.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from experiments.base import get_config
from lm.config import UserError
from lm.interop import hf_config, verify
from tests.lm.interop.test_hf_config import HF, LINEAR, LLAMA3, ORIGINAL, PLAIN

# transformers' rotary classes do the same: they standardise the parameters a second time.
SCRIPT = """
import json, sys
from transformers import LlamaConfig
found = []
for values in json.load(sys.stdin):
    try:
        config = LlamaConfig.from_dict(values)
        config.standardize_rope_params()
        found.append(config.rope_parameters)
    except Exception as error:
        found.append(str(error))
json.dump(found, sys.stdout)
"""
INSIDE: list[Any] = [
    None,
    {},
    PLAIN,
    LINEAR,
    LINEAR | {"rope_theta": 33.0, "rope_type": "default"},
    LLAMA3,
    LLAMA3 | {ORIGINAL: 99, "rope_theta": 44.0},
    {"rope_type": "yarn", "factor": 2.0},
]
BESIDE: list[dict[str, Any]] = [{}, {"rope_theta": 55.0}, {ORIGINAL: 88}]


def test_rope_is_what_the_library_reads() -> None:
    if not (python := os.environ.get(verify.VARIABLE)):
        pytest.skip(f"{verify.VARIABLE} does not name an interpreter with transformers")
    cases = [
        HF | {"rope_scaling": a, "rope_parameters": b} | beside
        for a, b, beside in itertools.product(INSIDE, INSIDE, BESIDE)
    ]
    random.Random(0).shuffle(cases)
    done = subprocess.run(
        [python, "-c", SCRIPT],
        input=json.dumps(cases),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    read = 0
    for hf, theirs in zip(cases, json.loads(done.stdout), strict=True):
        if isinstance(theirs, str) or theirs["rope_type"] == "yarn":
            with pytest.raises(UserError):
                hf_config.from_transformers(hf, get_config().to_dict(), Path("config.json"))
            continue
        values = hf_config.from_transformers(hf, get_config().to_dict(), Path("config.json"))
        (layer,) = values["model"]["layers"].values()
        names = ("factor", *hf_config.ROPE_CUTS.get(theirs["rope_type"], ()))
        scaling = [theirs[name] for name in names] if theirs["rope_type"] != "default" else []
        assert (layer["rope_theta"], [*layer.get("rope_scaling", ())]) == (
            theirs["rope_theta"],
            scaling,
        ), hf
        read += 1
    assert read > 100
