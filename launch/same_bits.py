"""Checks that tiny runs of two checkouts agree in every bit.

    git worktree add ../before main
    espalier same_bits ../before

compares the current checkout with ../before. It trains 20 steps of every mixer, and of several
meshes, accumulations and other settings, and compares the numbers of every step and the final
parameters and moments. Exit status 0 if all are equal, else 1, with the differences printed. A
number or array that only this checkout has is a difference, unless --added=PATTERN allows it
(`--added='task/*'`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags

from launch import cli
from lm.config import UserError, nearest

_MIXERS = flags.DEFINE_list("mixers", [], "mixers to compare; default: all in both checkouts")
_CASES = flags.DEFINE_list("cases", [], "mixers, meshes, accumulation, settings; default: all")
_STEPS = flags.DEFINE_integer("steps", 20, "steps of each run", lower_bound=2)
_ADDED = flags.DEFINE_multi_string("added", [], "pattern of names that only this checkout may have")
_FOLDER = flags.DEFINE_string(
    "folder",
    "",
    "where runs are kept, so that those of a commit are not repeated; default: nowhere",
)


def main(argv: list[str]) -> int:
    from lm.studies import same_bits

    if len(argv) != 2:
        raise UserError("name one other checkout: espalier same_bits OTHER_CHECKOUT")
    sides = same_bits.look(Path(argv[1])), same_bits.look(same_bits.THIS)
    both = sorted(sides[0].mixers & sides[1].mixers, key=lambda x: (x != sides[1].pattern, x))
    for name in sorted(sides[0].mixers ^ sides[1].mixers):
        print(f"mixer {name}: only in {sides[name in sides[1].mixers].root}, not compared")
    if not both:
        raise UserError(f"{sides[0].root} shares no mixer with this checkout; name another")
    if unknown := [name for name in _MIXERS.value if name not in both]:
        raise UserError(
            f"--mixers={unknown[0]}: not in both checkouts; {nearest(unknown[0], both)}"
        )
    asked = same_bits.cases(_CASES.value or same_bits.GROUPS, _MIXERS.value or both)
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = cli.path("folder", _FOLDER.value or temporary)
        for verdict in same_bits.compare(
            sides, asked, folder, steps=_STEPS.value, added=_ADDED.value
        ):
            differ += bool(verdict.differences)
            equal = f"equal: {verdict.num_records} records, {verdict.num_arrays} final arrays"
            lines = verdict.differences[:5] or [equal]
            print(f"{verdict.case}: {'; '.join(lines)}", flush=True)
    print(f"{len(asked) - differ} of {len(asked)} equal, bit for bit")
    return 1 if differ else 0


if __name__ == "__main__":
    cli.run(main, positional=True)
