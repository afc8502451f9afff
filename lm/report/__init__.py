"""report.html: one file, readable offline, about one run or several side by side.

Order of steps: read the run folders (folder.py), draw the curves (figures.py), lay out the page
(page.py, style.py), replace the old page in one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import files
from lm.config import UserError
from lm.report import folder, page


def write(workdirs: Sequence[Path], out: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Writes the report of the runs in `workdirs` to `out` and returns its absolute path.

    Args:
      defaults: a configuration (as lm.config.to_mapping gives it) to compare a single run with;
        without it, the keys that the command line set are shown first.

    Raises:
      UserError: a folder is missing, holds no run, or holds a damaged file.
    """
    text = page.render(folder.load(workdirs), defaults)
    try:
        files.replace(out, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file") from None
    return out.resolve()
