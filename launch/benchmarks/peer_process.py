"""Runs a kernel of another project for launch/benchmarks/peers.py, in a process of its own: one of
flash-linear-attention, or stick-breaking attention by its authors.

    python peer_process.py PEER B T H K V DTYPE KEYS

prints "ready" and the installed versions. For every line "forward N" or "both N" that it then
reads, it queues N runs of that pass and prints the seconds they took together. The first run of a
pass compiles it. It needs torch and the peer's package, and imports nothing of this project.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple


class Peer(NamedTuple):
    """A function of a module, with the gates that it takes after q, k, v, and its other keyword
    arguments. `heads_first`: its arrays are [B, H, T, ...].
    """

    module: str
    function: str
    gates: tuple[str, ...]
    options: dict[str, Any]
    heads_first: bool = False


PEERS = {
    "linear": Peer("fla.ops.linear_attn", "chunk_linear_attn", (), {"normalize": False}),
    "scalar": Peer("fla.ops.simple_gla", "chunk_simple_gla", ("g",), {}),
    "vector": Peer("fla.ops.gla", "chunk_gla", ("gk",), {}),
    "delta": Peer("fla.ops.delta_rule", "chunk_delta_rule", ("beta",), {}),
    "gated_delta": Peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("g", "beta"), {}),
    "stickbreaking": Peer("stickbreaking_attention.sb_attn", "sb_attn", (), {}, heads_first=True),
}
SOURCES = {
    "torch": "pip install torch",
    "fla": "pip install flash-linear-attention",
    "stickbreaking_attention": "it is not on PyPI: put a checkout of "
    "github.com/shawntan/stickbreaking-attention on PYTHONPATH",
}


def main() -> None:
    name, *sizes, dtype, keys = sys.argv[1:]
    # Libraries print too: their output goes to stderr, and only answers to stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        passes = create(PEERS[name], sizes, dtype, keys)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise SystemExit(f"no module {error.name}; {SOURCES.get(package, 'install it')}") from None
    print("ready", *versions(), file=answers)
    import torch  # pyright: ignore[reportMissingImports] (of the peer's environment, not ours)

    for line in sys.stdin:
        which, runs = line.split()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(int(runs)):
            passes[which]()
        torch.cuda.synchronize()
        print(time.perf_counter() - start, file=answers)


def create(peer: Peer, sizes: list[str], dtype: str, keys: str) -> dict[str, Callable[[], Any]]:
    """The passes by name, on inputs distributed as ours (contract.sample, forms.drawn)."""
    import torch  # pyright: ignore[reportMissingImports]

    call = getattr(importlib.import_module(peer.module), peer.function)
    batch, length, heads, key, value = map(int, sizes)
    torch.manual_seed(0)

    def draw(*width: int) -> Any:
        shape = (heads, length) if peer.heads_first else (length, heads)
        return torch.randn(batch, *shape, *width, device="cuda", dtype=getattr(torch, dtype))

    q, k, v, cotangent = draw(key), draw(key), draw(value), draw(value)
    if "beta" in peer.gates:
        k = torch.nn.functional.normalize(k, dim=-1)
    if keys == "shy keys":
        q[..., 0], k[..., 0] = (8 * key**0.5) ** 0.5, -((8 * key**0.5) ** 0.5)
    gates = {gate: draw(*((key,) if gate == "gk" else ())) for gate in peer.gates}
    for gate, x in gates.items():
        gates[gate] = x.sigmoid() if gate == "beta" else torch.nn.functional.logsigmoid(x)
    inputs = [q, k, v, *gates.values()]
    learned = [x.clone().requires_grad_() for x in inputs]

    def forward(given: list[Any]) -> Any:
        named = zip(gates, given[3:], strict=True)
        named = {"g" if gate == "gk" else gate: x for gate, x in named}
        return call(*given[:3], **named, **peer.options)[0]

    return {
        "forward": lambda: forward(inputs),
        "both": lambda: torch.autograd.grad(forward(learned), learned, cotangent),
    }


def versions() -> Iterator[str]:
    """The packages that are installed, each as "torch 2.11.0"."""
    for package in ("torch", "triton", "flash-linear-attention", "stickbreaking-attention"):
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
