"""One laboratory of tiny runs for the whole session."""

from __future__ import annotations

import pytest

from tests.lm.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))
