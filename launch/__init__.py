"""Command lines: absl mains of at most 80 lines, and the shell scripts that start them."""

import sys

if sys.argv[:1] == ["-m"]:  # Python looks for the launcher to run, whose imports take a second
    from launch import ends

    ends.at_once()
