"""Times steps and generation of transformers' Llama in torch. peers_cpu.py runs it as a program:

    python peer_model.py LAYERS WIDTH HEADS FFN_DIM VOCAB

It prints "ready" and the installed versions. For every line "PASS RUNS" that it then reads, it runs
that pass so many times and prints the seconds of all runs. A compiled pass is compiled in its first
run. Passes:

    eager:B,T       forward, backward, clipping and AdamW on B rows of T random tokens
    compiled:B,T    the same with torch.compile around the model and its loss
    generate:B,P,N  N greedy tokens after prompts of P, with the model's own cache
    products:B,T    only the matmuls of a step, forward and backward

It needs torch and transformers, and imports nothing of this project.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

SOURCES = {"torch": "pip install torch", "transformers": "pip install transformers"}
PACKAGES = ("torch", "transformers")


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]]
    # Libraries print too: their output goes to stderr, and only answers to stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        model = create(*sizes)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise SystemExit(f"no module {error.name}; {SOURCES.get(package, 'install it')}") from None
    print("ready", *(f"{name} {metadata.version(name)}" for name in PACKAGES), file=answers)
    passes: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        which, runs = line.split()
        if which not in passes:
            kind, _, numbers = which.partition(":")
            passes[which] = KINDS[kind](model, *map(int, numbers.split(",")))
        start = time.perf_counter()
        for _ in range(int(runs)):
            passes[which]()
        print(time.perf_counter() - start, file=answers)


def create(layers: int, width: int, heads: int, ffn_dim: int, vocab: int) -> Any:
    """The model, float32, with tied embeddings and rotary positions."""
    import torch  # pyright: ignore[reportMissingImports] (of the peer's environment, not ours)
    from transformers import (  # pyright: ignore[reportMissingImports]
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1 << 15,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def training(model: Any, rows: int, length: int, *, is_compiled: bool) -> Callable[[], object]:
    """One step on random tokens, always the same ones."""
    import torch  # pyright: ignore[reportMissingImports]

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length))

    def loss(tokens: Any) -> Any:
        return model(tokens, labels=tokens, use_cache=False).loss

    function = torch.compile(loss) if is_compiled else loss

    def step() -> None:
        function(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def eager(model: Any, rows: int, length: int) -> Callable[[], object]:
    return training(model, rows, length, is_compiled=False)


def compiled(model: Any, rows: int, length: int) -> Callable[[], object]:
    return training(model, rows, length, is_compiled=True)


def generate(model: Any, rows: int, prompt: int, new: int) -> Callable[[], object]:
    import torch  # pyright: ignore[reportMissingImports]

    tokens = torch.randint(0, model.config.vocab_size, (rows, prompt))

    def run() -> Any:
        model.eval()
        with torch.no_grad():
            out = model.generate(tokens, max_new_tokens=new, do_sample=False)
        assert out.shape == (rows, prompt + new), out.shape
        return out

    return run


def products(model: Any, rows: int, length: int) -> Callable[[], object]:
    """(tokens, inner) x (inner, outer) of every weight, and the two products of its backward."""
    import torch  # pyright: ignore[reportMissingImports]

    weights = [p for p in model.parameters() if p.ndim == 2]  # [outer, inner], as torch has them
    inputs = {w.shape[1]: torch.randn(rows * length, w.shape[1]) for w in weights}
    cotangents = {w.shape[0]: torch.randn(rows * length, w.shape[0]) for w in weights}

    def run() -> None:
        with torch.no_grad():
            for w in weights:
                x, c = inputs[w.shape[1]], cotangents[w.shape[0]]
                _ = x @ w.T, c @ w, c.T @ x

    return run


KINDS: dict[str, Callable[..., Callable[[], object]]] = {
    "eager": eager,
    "compiled": compiled,
    "generate": generate,
    "products": products,
}

if __name__ == "__main__":
    main()
