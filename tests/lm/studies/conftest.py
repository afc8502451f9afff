"""What tests of studies that train share: one device, and compiled functions."""

from __future__ import annotations

import jax
import pytest

from lm.build import Build
from lm.config import Config
from lm.parallel import mesh
from lm.studies.trainer import Trainer

BUILDS: list[Build] = []


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs see one device. Runs of one shape are compiled once for all tests of a process."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *names: devices)
    monkeypatch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))
    own = Trainer.like

    def like(self: Trainer, config: Config) -> Build:
        self.builds = BUILDS
        return own(self, config)

    monkeypatch.setattr(Trainer, "like", like)
