"""Runs flash-linear-attention's kernels for launch/benchmarks/peers.py, in a process of its own.

    python peer_process.py PEER B T H K V DTYPE      prints "ready", then for every line read from
                                                     standard input runs once and prints seconds

It needs torch and flash-linear-attention; nothing of this project is imported.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

# Peer: module of fla.ops, function, the gates it takes after q, k, v, other keywords.
PEERS = {
    "linear": ("linear_attn", "chunk_linear_attn", (), {"normalize": False}),
    "scalar": ("simple_gla", "chunk_simple_gla", ("g",), {}),
    "vector": ("gla", "chunk_gla", ("gk",), {}),
    "delta": ("delta_rule", "chunk_delta_rule", ("beta",), {}),
    "gated_delta": ("gated_delta_rule", "chunk_gated_delta_rule", ("g", "beta"), {}),
}


def main() -> None:
    name, *sizes, dtype = sys.argv[1:]
    import torch  # pyright: ignore[reportMissingImports] (of the peer's environment, not ours)

    batch, length, heads, key, value = map(int, sizes)
    module, function, gates, options = PEERS[name]
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    torch.manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=getattr(torch, dtype))

    q, k = (draw(batch, length, heads, key) for _ in range(2))
    k = torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
    v = draw(batch, length, heads, value)
    widths = {"g": (), "gk": (key,), "beta": ()}
    extra = {g: draw(batch, length, heads, *widths[g]).float() for g in gates}
    extra = {g: x.sigmoid() if g == "beta" else -x.sigmoid() for g, x in extra.items()}
    inputs = [x.requires_grad_() for x in (q, k, v, *extra.values())]
    named = {"g" if g == "gk" else g: x for g, x in zip(extra, inputs[3:], strict=True)}
    cotangent = draw(batch, length, heads, value)

    def run() -> None:
        out = call(*inputs[:3], **named, **options)[0]
        torch.autograd.grad(out, inputs, cotangent)
        torch.cuda.synchronize()

    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
