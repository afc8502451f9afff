"""Does it work here? A stick-breaking model on the standard library's sources, in minutes.

Command: python -m launch.train --config=experiments/quickstart.py[:PATTERN] --workdir=DIR
         PATTERN is a mixer or a cycle of them: softmax, or softmax,stickbreaking.
Cost:    about one million tokens; <= 5 minutes on two idle CPU cores.
Expected: validation bits per byte < 1.85.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(arg: str = "") -> ConfigDict:
    """The base configuration; `arg` names the pattern of mixers."""
    config = base.get_config()
    if arg:
        config.model.pattern = arg
    return config
