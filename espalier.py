"""The console command: `espalier COMMAND FLAGS` is `python -m launch.COMMAND FLAGS`.

This file lies beside the packages `launch`, `lm` and `kernels`, so it finds these three in any
folder, whatever else has one of their names. `python PATH/espalier.py COMMAND FLAGS` works without
an installation.
"""

import sys
from pathlib import Path


def main() -> None:
    """Runs the command that the command line names; without one, lists the commands."""
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
