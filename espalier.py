"""The console command: `espalier COMMAND FLAGS` is `python -m launch.COMMAND FLAGS`.

This file lies beside the packages `launch`, `lm` and `kernels`, so it finds these three in any
folder, whatever else has one of their names. `python PATH/espalier.py COMMAND FLAGS` works without
an installation.

On Linux the process starts itself once more, with glibc told to ask for huge pages; glibc reads
this variable only when a process starts. XLA:CPU takes the temporary arrays of every step from the
system anew: at 8 million parameters 140,000 pages of 4 KiB a step, an eighth of its time
(docs/speed.md). A variable that the user has set stays.
"""

import os
import sys
from pathlib import Path

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def main() -> None:
    """Runs the command that the command line names; without one, lists the commands."""
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from launch import ends

        ends.at_once()  # until the command has been imported
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # lm.mapping.INTERRUPTED
    from launch import command

    command.run(sys.argv[1:])


if __name__ == "__main__":
    main()
