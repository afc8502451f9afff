"""How much does a mixer recall for the bytes of its state? Multi-query associative recall.

Command: espalier recall --config=recall:PRESET --workdir=DIR
         presets smoke, cpu (the default), figure2, based
Cost:    smoke seconds, cpu about half an hour on one core; figure2 and based are made for a GPU
         and not measured. The same command resumes, and several processes share the trainings.
Expected: README.md beside this file holds the table and the figure of a measured run.

figure2 is the grid of Zoology's figure 2 (arXiv 2312.04927). based is the mixture of BASED (arXiv
2402.18668, fig. 2), tested at lengths beyond those of training. Both follow the published code, but
with our mixers, RoPE instead of learned positions, no dropout, one cosine over steps, and our AdamW
(beta2 0.95, clipping at 1).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base

# The first of two layers is a short convolution, as in BASED: it brings each key to its value.
LAYERS = {
    "conv": {"mixer": "base_conv"},
    "softmax": {"mixer": "softmax"},
    "stickbreaking": {"mixer": "stickbreaking"},
    "linear": {"mixer": "linear"},
    "based": {"mixer": "based"},
    "gla": {"mixer": "gla"},
    "deltanet": {"mixer": "deltanet"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "mamba2": {"mixer": "mamba2", "state_dim": 16},
}
PATTERNS = (
    "conv,softmax",
    "conv,stickbreaking",
    "conv,linear",
    "conv,based",
    "conv,gla",
    "conv,deltanet",
    "conv,gated_deltanet",
    "conv,mamba2",
)


def rows(length: int, pairs: int, examples: int, filler: str = "blank") -> dict[str, Any]:
    setting = {"length": length, "pairs": pairs, "repeats": 0, "filler": filler, "power": 0.01}
    return {"setting": setting, "examples": examples}


def steps(problem: dict[str, Any], epochs: int) -> int:
    sets = problem["train"]
    return epochs * sum(one["examples"] // problem["batch_size"] for one in sets)


def figure2() -> dict[str, Any]:
    problems = {}
    for length, pairs, batch_size in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)):
        problem = {
            "train": (rows(length, pairs, 100_000),),
            "test": (rows(length, pairs, 3000),),
            "batch_size": batch_size,
            "evaluate_every": 100_000 // batch_size,
        }
        problems[f"{length}x{pairs}"] = problem | {"steps": steps(problem, 64)}
    rates = (1e-4, 4.6416e-4, 2.1544e-3, 1e-2)
    return {"problems": problems, "widths": (64, 128, 256, 512), "learning_rates": rates}


def based() -> dict[str, Any]:
    train = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000))
    train += ((256, 64, 20_000),)
    test = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    problem = {
        "train": tuple(rows(*one, filler="random") for one in train),
        "test": tuple(rows(*one, 1000, filler="random") for one in test),
        "batch_size": 256,
        "evaluate_every": 702,
    }
    problem["steps"] = steps(problem, 32)
    rates = (1e-3, 3.1623e-3, 1e-2, 3.1623e-2)
    return {"problems": {"mixture": problem}, "widths": (64, 128), "learning_rates": rates}


def cpu() -> dict[str, Any]:
    pairs = (2, 4, 8)
    problem = {
        "train": tuple(rows(32, n, 20_000) for n in pairs),
        "test": tuple(rows(32, n, 300) for n in pairs),
        "batch_size": 32,
        "steps": 1600,
        "evaluate_every": 200,
    }
    grid = {"problems": {"32": problem}, "widths": (16, 32, 64), "learning_rates": (5e-3, 1e-2)}
    return grid | {"patterns": tuple(p for p in PATTERNS if p != "conv,based")}


def smoke() -> dict[str, Any]:
    problem = {
        "train": (rows(16, 2, 64),),
        "test": (rows(16, 2, 32), rows(16, 4, 32)),
        "batch_size": 8,
        "steps": 4,
        "evaluate_every": 2,
    }
    grid = {"problems": {"16": problem}, "widths": (8,), "learning_rates": (1e-2, 1e-3)}
    return grid | {"patterns": ("softmax", "conv,linear")}


PRESETS = {"smoke": smoke, "cpu": cpu, "figure2": figure2, "based": based}


def get_config(arg: str = "cpu") -> ConfigDict:
    """`arg`: a preset."""
    if arg not in PRESETS:
        raise ValueError(f"there is no preset {arg!r}; presets: {', '.join(PRESETS)}")
    grid, is_small = PRESETS[arg](), arg in ("smoke", "cpu")
    run = base.get_config()
    run.model.update({"num_layers": 2, "num_heads": 1, "num_kv_heads": 1})
    run.model.layers = {label: layer | {"mlp": "none"} for label, layer in LAYERS.items()}
    # Learning rates are tuned for each width, so muP would gain nothing.
    run.mup.update(
        {
            "parametrization": "standard",
            "init_std": 0.1 if is_small else 0.02,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
        }
    )
    run.data.sources = {}  # rows are generated
    run.data.tokenizer.update({"kind": "bytes", "vocab_size": 258 if is_small else 8192})
    run.schedule = {"family": "cosine", "peak_learning_rate": 0.02, "warmup": "0 steps"}
    run.log.samples = ()
    study = {"run": run, "patterns": PATTERNS, "seeds": (0,), "solved": 0.99}
    return ConfigDict(study | grid)
