"""Command lines: absl mains of at most 80 lines, and the shell scripts that start them.

`launch` works with the packages `lm` and `kernels` that lie beside it. If Python would import other
packages with these names (a user's folder, another distribution), it says so in one line and exits.
"""

import importlib.util
import sys
from pathlib import Path

BESIDE = Path(__file__).resolve().parent.parent


def _shadow() -> str | None:
    """A line about what Python would import instead of our `lm` or `kernels`; None if ours."""
    for name in ("lm", "kernels"):
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or (spec.origin,)) if spec else ["nothing"]
        if Path(str(places[0])).resolve() != BESIDE / name:
            return (
                f"`import {name}` finds {places[0]}, not Espalier's {BESIDE / name}; rename the "
                "other one, or start from another folder without PYTHONPATH"
            )
    return None


_shadowed = _shadow()
if _shadowed is not None and sys.argv[:1] != ["-m"]:
    raise ImportError(_shadowed)
if sys.argv[:1] == ["-m"]:  # Python is looking for a launcher, whose imports take a second
    if _shadowed is not None:
        print(f"error: {_shadowed}", file=sys.stderr)
        raise SystemExit(2)
    from launch import ends

    ends.at_once()
