"""Memory of the train step and of a decode step for every op, compiled for absent devices.

The devices are two TPU slices and eight H100. The train step is also compiled with the tokens of
rows shared. Bytes of a device must be those of golden.json, to 2 %.

After a change that is meant to move them, run `python -m tests.aot.matrix --write`.
"""

from __future__ import annotations

import json

import pytest

from lm import targets
from lm.config import UserError
from tests.aot import matrix

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("case", matrix.CASES, ids="/".join)
def test_bytes_of_a_device(case: tuple[str, str, str]) -> None:
    try:
        targets.devices(targets.parse(matrix.MESHES[case[0]].target))
    except UserError as missing:
        pytest.skip(str(missing))
    name = "/".join(case)
    golden = json.loads(matrix.GOLDEN.read_text()).get(name)
    if golden is None:
        pytest.skip(f"no golden bytes of {name}: none were measured")
    found = matrix.measured(*case)
    for field, size in golden.items():
        assert found[field] == pytest.approx(size, rel=0.02), field
