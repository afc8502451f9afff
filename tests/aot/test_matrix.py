"""The train step and a decode step of every op's family, compiled for two TPU slices and eight H100
that are not there: what a device holds is what it held before, to 2 %.

After a change that is meant to move them: `python -m tests.aot.matrix --write`.
"""

from __future__ import annotations

import json

import pytest

from lm import targets
from lm.config import UserError
from tests.aot import matrix

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("program", matrix.PROGRAMS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("target", list(matrix.MESHES))
def test_bytes_of_a_device(target: str, family: str, program: str) -> None:
    try:
        targets.devices(targets.parse(target))
    except UserError as missing:
        pytest.skip(str(missing))
    golden = json.loads(matrix.GOLDEN.read_text()).get(f"{target}/{family}/{program}")
    if golden is None:
        pytest.skip(f"no golden bytes of {target}/{family}/{program}: none were measured")
    found = matrix.measured(target, family, program)
    for field, size in golden.items():
        assert found[field] == pytest.approx(size, rel=0.02), field
