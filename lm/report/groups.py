"""What the caption of the learning rates says: the parameter groups, and the largest rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.report.folder import Run

# The roles of lm/params.py, as lm/mup.py uses them.
GROUPS = {
    "hidden": "matrices between activations",
    "input": "embeddings",
    "output": "the untied output matrix",
    "vector": "norms and biases",
}


def caption(runs: Sequence[Run]) -> str:
    """Explains the groups that the runs have. For one run it names the largest rate so far, and
    `schedule.peak_learning_rate` if that was not reached: a law such as Power may lie below it.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.keys("lr/*")))
    names = [key.removeprefix("lr/") for key in keys]
    words = [f"{name}: {GROUPS[name]}" for name in names if name in GROUPS]
    if len(runs) == 1 and (most := _largest(runs[0], keys)) is not None:
        words.append(f"largest rate so far: {most:.3g}")
        peak = runs[0].config.get("schedule", {}).get("peak_learning_rate")
        if isinstance(peak, float) and most < peak * (1 - 1e-5):  # rates are float32
            words[-1] += f", below schedule.peak_learning_rate={peak:g}"
    return "; ".join(["per parameter group", *words])


def _largest(run: Run, keys: Sequence[str]) -> float | None:
    values = np.concatenate([np.zeros(0), *(run.series(key)[1] for key in keys)])
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else None
