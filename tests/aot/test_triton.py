"""The Triton kernels compiled for an H100 that is not here: their products are wgmma, no loop
spills, shared memory and device memory are within what they may be.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.aot import triton_proof
from tests.aot.triton_proof import PEAK, PROBLEMS, SHARED_MEMORY

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not importlib.util.find_spec("triton") or not importlib.util.find_spec("jax_plugins"),
        reason="triton or jax-cuda13-plugin is not installed: pip install 'espalier[aot]'",
    ),
]


@pytest.mark.parametrize("op", PROBLEMS)
def test_kernels_of_an_h100(op: str) -> None:
    found = list(triton_proof.proofs(op))
    assert len(found) == len(PROBLEMS[op])
    for problem, program in zip(PROBLEMS[op], found, strict=True):
        assert program.name == problem.name
        assert program.kernels
        for kernel in program.kernels:
            where = f"{program.name}: {kernel}"
            assert kernel.wgmma, where
            # With documents a pointer is put away before a loop and taken back after it.
            assert kernel.spilled <= (8 if problem.documents else 0), where
            assert kernel.shared <= SHARED_MEMORY, where
        # A packed row is first freed of what is not finite (kernels/quarantine.py): copies.
        if not problem.documents:
            assert program.peak <= PEAK, f"{program.name}: {program.peak}"
