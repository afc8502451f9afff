"""A laboratory of tiny runs that all tests of a session share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lm.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    # This file is imported before tests/conftest.py sets the number of JAX's devices.
    from tests.lm.lab import Lab

    return Lab(tmp_path_factory.mktemp("lab"))
