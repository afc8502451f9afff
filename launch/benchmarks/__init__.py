"""The cases of `espalier bench`. A case is a file of this folder with `run(options)`, which returns
results (timing.py); the first sentence of its docstring says what it measures.
"""

from pathlib import Path

from launch import command

HERE = Path(__file__).parent
# The cases that run without --cases: any machine can run them in minutes.
DEFAULT = (
    "train_step",
    "matmul_fraction",
    "ops",
    "recurrences",
    "memory",
    "compile",
    "decode",
    "evaluation",
)


def names() -> list[str]:
    """The cases, in alphabetical order."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef run(" in path.read_text())


def listing() -> str:
    """A line for each case that says what it measures."""
    return "\n".join(f"{name}: {command.summary(HERE / f'{name}.py')}" for name in names())
