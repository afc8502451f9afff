"""What a chip can do: memory, and bytes per second to memory and to other devices.

Peak FLOP/s are in lm/metrics.py, which every run divides by.
"""

from __future__ import annotations

import dataclasses

from kernels.strategies import Link
from lm import metrics

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Facts of one JAX device; None where there is no published figure (a CPU).

    `usable_bytes`: what a program may take. `link_bandwidth`: bytes/s that a device sends in a
    collective over one mesh axis inside a slice or host; `network_bandwidth`: between hosts, where
    links do not reach (GPUs). `link_latency`: seconds until a message of no size is there.
    """

    name: str
    device_kind: str
    platform: str
    devices_per_chip: int
    hbm_bytes: int | None
    usable_bytes: int | None
    hbm_bandwidth: float | None
    link_bandwidth: float | None
    link_latency: float | None
    network_bandwidth: float | None

    def peak_flops(self, precision: str) -> float | None:
        return metrics.peak_flops(self.device_kind, precision)


def _tpu(
    name: str, kind: str, hbm: float, usable: float, bandwidth: float, link: float
) -> tuple[str, Chip]:
    chip = Chip(
        name=name,
        device_kind=kind,
        platform="tpu",
        devices_per_chip=2 if name == "tpu7x" else 1,
        hbm_bytes=int(hbm * GIB),
        usable_bytes=int(usable * GIB),
        hbm_bandwidth=bandwidth,
        link_bandwidth=link,
        link_latency=1e-6,
        network_bandwidth=None,
    )
    return name, chip


# TPU: HBM and its bandwidth from the pages v4, v5e, v5p, v6e, TPU7x of the Cloud TPU documentation;
# usable bytes are what the compiler's refusal of a larger program names (libtpu 0.0.48). The pages
# give the bandwidth of all links of a chip, both directions: 600, 400, 1200, 800, 1200 GB/s over
# 6, 4, 6, 4, 6 links. A ring along one axis of the torus sends on two links, half of their sum. A
# hop takes about a microsecond (Austin et al. 2025, How to Scale Your Model, chapter 3).
_V5E_LINK = 2 * 400e9 / 4 / 2
_V6E_LINK = 2 * 800e9 / 4 / 2
_V4_LINK = 2 * 600e9 / 6 / 2
_V5P_LINK = 2 * 1200e9 / 6 / 2

CHIPS: dict[str, Chip] = dict(
    (
        _tpu("v4", "TPU v4", 32, 30.75, 1228e9, _V4_LINK),
        _tpu("v5e", "TPU v5 lite", 16, 15.75, 819e9, _V5E_LINK),
        _tpu("v5p", "TPU v5", 96, 95.73, 2765e9, _V5P_LINK),
        _tpu("v6e", "TPU v6 lite", 32, 31.24, 1638e9, _V6E_LINK),
        # A device is half a chip, and the two halves share its links.
        _tpu("tpu7x", "TPU7x", 96, 94.74, 7380e9 / 2, _V5P_LINK / 2),
    )
)

# NVIDIA H100 SXM5: 80 GB of which 84,929,347,584 bytes are the device's (h100.txtpb), 3.35 TB/s,
# NVLink 900 GB/s in both directions (H100 datasheet); one 400 Gb/s adapter per GPU (DGX H100
# datasheet); a ring's hop over NVLink as NCCL models it (hwLat of its tuning.cc, protocol Simple).
# Usable: what JAX takes at XLA_PYTHON_CLIENT_MEM_FRACTION=.92, which the launch line
# sets.
MEM_FRACTION = 0.92
CHIPS["h100"] = Chip(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    platform="gpu",
    devices_per_chip=1,
    hbm_bytes=84_929_347_584,
    usable_bytes=int(MEM_FRACTION * 84_929_347_584),
    hbm_bandwidth=3350e9,
    link_bandwidth=450e9,
    link_latency=3.4e-6,
    network_bandwidth=50e9,
)
CHIPS["cpu"] = Chip(
    name="cpu",
    device_kind="cpu",
    platform="cpu",
    devices_per_chip=1,
    hbm_bytes=None,
    usable_bytes=None,
    hbm_bandwidth=None,
    link_bandwidth=None,
    link_latency=None,
    network_bandwidth=None,
)


def link(device_kind: str, platform: str) -> Link:
    """The link between neighboring devices of one slice or host. A kind that is not listed gets the
    link of another one of its platform; a CPU gets an H100's, since it rehearses for one.
    """
    platform = "gpu" if platform == "cpu" else platform
    same = [chip for chip in CHIPS.values() if chip.platform == platform]
    chip = next((chip for chip in same if chip.device_kind == device_kind), same[0])
    assert chip.link_latency is not None
    assert chip.link_bandwidth is not None
    return Link(chip.link_latency, chip.link_bandwidth)
