"""The contract of an op over all of its cases; test_contract.py runs the fast ones."""

import pytest

from kernels.contract import Case
from tests.kernels.contract_problem import cases, check_case, identify


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "case"), list(cases("slow")), ids=identify)
def test_equals_reference_product(name: str, form: str, case: Case):
    check_case(name, form, case)
