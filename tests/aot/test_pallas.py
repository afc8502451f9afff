"""Every Pallas kernel given to the TPU compiler: v5e and v5p, 8,192 tokens, bfloat16. Forward and
backward together take no more than half as much again as inputs, outputs and what is kept.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import pytest

from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import forms
from lm import targets

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"),
        reason="libtpu is not installed: pip install 'espalier[aot]'",
    ),
]
TARGETS = ("v5e-1", "v5p-8")
PEAK = 1.5  # of inputs, outputs and residuals
# JAX's splash attention writes its row statistics 128 lanes wide; it is taken as it is, and held to
# what it takes now.
LIBRARY = {"softmax": 2.2}
ABLE = [name for name in dispatch.names() if forms.kernel(name, "tpu")]
PROBLEMS = list(forms.problems(ABLE, lengths=(8192,)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "case"),
    list(forms.problems(ABLE, lengths=(8192,))),
    ids=lambda x: getattr(x, "name", x),
)
def test_compiles_within_its_memory(name: str, case: Case, target: str) -> None:
    found = targets.parse(target)
    place: Any = targets.devices(found)[0]
    op, form = dispatch.get(name), forms.kernel(name, "tpu")
    assert form is not None
    assert forms.refusal(name, case, form, "tpu") is None
    costs = forms.modelled(name, case, form, op.default_blocks(form), found.chip, place)
    inputs, cotangent = jax.eval_shape(lambda: forms.arrays(name, case))
    given = sum(x.size * x.dtype.itemsize for x in [*jax.tree.leaves(inputs), cotangent])
    out = cotangent.size * cotangent.dtype.itemsize
    kept = forms.residual_bytes(name, case, form, forms.mesh(place))
    # Gradients are as large as what they are of.
    allowed = 2 * given + max(0, kept)
    limit = LIBRARY.get(name, PEAK)
    assert costs.both.peak <= limit * allowed, f"{costs.both.peak / allowed:.2f}"
    assert costs.forward.peak <= limit * (given + out)
