"""report.html: one file, readable offline, about one run or several side by side. Each of its
figures is also written as a file, report_figures/NAME.svg.

Order of steps: read the run folders (folder.py), draw the curves (figures.py), lay out the page
(page.py, style.py), replace the old page in one step, write the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import files
from lm.config import UserError
from lm.report import figures, folder, page


def summary(workdirs: Sequence[Path]) -> list[dict[str, Any]]:
    """The state of each run, for programs: its folder and commit, steps and tokens, the last loss,
    bits per byte of its validation sets at their last evaluation, parameters, skipped steps, and
    seconds spent in training steps. What is not known yet is None.

    Raises:
      UserError: as `write`.
    """
    return [
        {
            "workdir": str(run.path),
            "commit": run.facts.get("commit"),
            "config": run.config,
            "step": run.last("step"),
            "tokens": run.last("tokens"),
            "loss": run.last("train/loss"),
            "validation_bits_per_byte": run.validation(),
            "parameters": run.facts.get("parameters", {}).get("total"),
            "skipped_steps": run.last("optim/skipped_total"),
            "training_seconds": run.training_seconds(),
        }
        for run in folder.load(workdirs)
    ]


def write(workdirs: Sequence[Path], out: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Writes the report of the runs in `workdirs` to `out` and its figures into a folder beside it.
    Returns the absolute path of `out`.

    Args:
      defaults: a configuration (as lm.config.to_mapping gives it) to compare a single run with;
        without it, the keys that the command line set are shown first.

    Raises:
      UserError: a folder is missing, holds no run, or holds a damaged file.
    """
    runs = folder.load(workdirs)
    pictures = figures.draw(runs)
    text = page.render(runs, defaults, pictures)
    try:
        files.replace(out, text)
        figures.save(out, {picture.name: picture.file for picture in pictures})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file") from None
    return out.resolve()
