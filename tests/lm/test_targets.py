"""Names of machines: sizes, hosts, and a one-line error if a name is unknown or a compiler is
missing.
"""

from __future__ import annotations

import jax
import pytest

from lm import targets
from lm.config import UserError
from lm.targets import chips

# name: chips, JAX devices, hosts, topology; from the vendors' pages
SIZES = [
    ("v5e-1", 1, 1, 1, "1x1"),
    ("v5e-16", 16, 16, 4, "4x4"),
    ("v5litepod-16", 16, 16, 4, "4x4"),
    ("v5e-256", 256, 256, 64, "16x16"),
    ("v6e-8", 8, 8, 1, "2x4"),
    ("v4-8", 4, 4, 1, "2x2x1"),
    ("v5p-256", 128, 128, 32, "4x4x8"),
    ("tpu7x-8", 4, 8, 1, "2x2x1"),
    ("h100-4", 4, 4, 1, "1x4"),
    ("h100-64", 64, 64, 8, "8x8"),
    ("cpu-5", 5, 5, 1, "5"),
]


@pytest.mark.parametrize(("name", "chips", "devices", "hosts", "topology"), SIZES)
def test_a_name_gives_its_size(
    name: str, chips: int, devices: int, hosts: int, topology: str
) -> None:
    target = targets.parse(name)
    found = target.chips, target.devices, target.hosts, target.topology
    assert found == (chips, devices, hosts, topology)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-255", "--target=v5p-255: no such machine; did you mean 'v5p-256'?"),
        ("v5p-2", "did you mean 'v5p-8'?"),
        ("v5e-7", "did you mean 'v5e-8'?"),
        ("h100-12", "did you mean 'h100-8'?"),
        ("h100-3", "h100-N: 1, 2, 4 or a multiple of 8"),
        ("v5pp-16", "did you mean 'v5p-N'?"),
        ("pod", "known: cpu-N, h100-N, tpu7x-N, v4-N, v5e-N, v5p-N, v6e-N"),
        ("v5e", "no such machine"),
        ("v5e-016", "no such machine"),
        ("cpu-0", "no such machine"),
        ("", "no such machine"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        targets.parse(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_listed_name_is_a_target_with_known_rates() -> None:
    for name in targets.names():
        target = targets.parse(name)
        assert target.name == name
        if target.chip.platform != "cpu":
            assert target.chip.peak_flops("bfloat16")
            assert 0 < (target.chip.usable_bytes or 0) < (target.chip.hbm_bytes or 0)


def test_cpu_devices() -> None:
    assert targets.devices(targets.parse("cpu-3")) == jax.devices()[:3]
    with pytest.raises(UserError, match="needs 9 CPU devices, JAX has started with 8"):
        targets.devices(targets.parse("cpu-9"))


@pytest.mark.parametrize("name", ["v5e-4", "h100-8"])
def test_a_compiler_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"is not installed; .* -m pip install -c .*\[aot\]"):
        targets.devices(targets.parse(name))


def test_links() -> None:
    """A kind that is not listed gets the link of a listed one of its platform. A CPU gets a GPU's,
    since it rehearses for one.
    """
    h100 = chips.link("NVIDIA H100 80GB HBM3", "gpu")
    assert h100 == chips.link("another", "gpu") == chips.link("cpu", "cpu")
    assert h100.latency > 0
    assert chips.link("TPU v5", "tpu").bandwidth > chips.link("TPU v5 lite", "tpu").bandwidth
