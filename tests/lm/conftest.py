"""One laboratory of tiny runs for the whole session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lm.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    # This file is read before tests/conftest.py says how many devices JAX shall have.
    from tests.lm.lab import Lab

    return Lab(tmp_path_factory.mktemp("lab"))
