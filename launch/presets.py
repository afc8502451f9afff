"""Reads what --config names: a file with get_config, or a preset (an experiment of Espalier).

    --config=quickstart:softmax      experiments/quickstart.py with the argument "softmax"
    --config=compare:smoke           experiments/compare/config.py
    --config=mine.py:argument        a file: its name ends in .py

A preset imports other experiments as `experiments.NAME`. While a preset is executed, `experiments`
is Espalier's folder, even if the user has a folder of that name. In a user's file, `experiments`
is first the user's folder, and then Espalier's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels.spelling import near
from lm.mapping import UserError, nearest

PACKAGE = "experiments"
FOLDER = Path(__file__).resolve().parent.parent / PACKAGE
STUDY = "config.py"  # the file of an experiment that is a folder
BASE = "base"  # the preset that states every key

# Exceptions that a mistake in a config file raises when it is executed.
CONFIG_FILE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def names() -> list[str]:
    """The presets, in alphabetical order."""
    studies = (path.parent for path in FOLDER.glob(f"*/{STUDY}"))
    return sorted(path.stem for path in (*FOLDER.glob("*.py"), *studies))


def forms() -> list[str]:
    """The presets as --config takes them: NAME, NAME:ARG with an argument, NAME[:ARG] if it may be
    left out. The files are read and not executed.
    """
    return [name + _argument(find(name)) for name in names()]


def _argument(path: Path) -> str:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config" and node.args.args:
            return "[:ARG]" if node.args.defaults else ":ARG"
    return ""


def find(name: str) -> Path:
    """The file of a preset. A word that cannot be a preset's name is taken as a path.

    Raises:
      UserError: the word could be a preset's name, but no preset has it.
    """
    if not re.fullmatch(r"[\w-]+", name):
        return Path(name)
    if name in (known := names()):
        single = FOLDER / f"{name}.py"
        return single if single.is_file() else FOLDER / name / STUDY
    raise UserError(f"--config={name}: no such preset, and no such file; {nearest(name, known)}")


def read(argument: str) -> tuple[Path, Any]:
    """The file that "NAME" or "NAME:arg" names, and what its get_config returns.

    Raises:
      UserError: the file does not exist, or has a mistake.
    """
    name, _, arg = argument.partition(":")
    path = find(name)
    with _importable(path):
        return path, _get_config(path, arg, argument)


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """While an experiment's file is executed, makes `experiments` mean the right folder."""
    if _imported_from() == FOLDER:
        yield
        return
    if FOLDER not in path.resolve().parents:
        with contextlib.suppress(*CONFIG_FILE_ERRORS):  # reported when the file imports it
            places = importlib.import_module(PACKAGE).__path__
            if isinstance(places, list) and str(FOLDER) not in places:
                places.append(str(FOLDER))
        yield
        return
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_within(name)}
    module = ModuleType(PACKAGE)
    module.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_within(name)]:
            del sys.modules[name]
        sys.modules.update(others)


def _imported_from() -> Path | None:
    """The folder where Python finds `experiments` first; None if it does not."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).resolve() if places else None


def _is_within(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _get_config(path: Path, arg: str, argument: str) -> Any:
    try:
        module = _execute(path)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{path} defines no get_config(); write one that returns a ConfigDict")
        if not arg:
            return module.get_config()
        try:
            inspect.signature(module.get_config).bind(arg)
        except TypeError:
            raise UserError(f"{path} takes no argument: drop {f':{arg}'!r}") from None
        return module.get_config(arg)
    except CONFIG_FILE_ERRORS as error:
        if arg and isinstance(error, ValueError) and FOLDER in path.resolve().parents:
            # A preset refuses its argument, and says why.
            raise UserError(f"--config={argument}: {error}") from error
        raise UserError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = near(path.name, siblings)
        here = f"the current directory is {Path.cwd()}; espalier alone lists the presets"
        hint = here if close is None else f"did you mean {path.parent / close}?"
        raise UserError(f"--config={path}: no such file; {hint}")
    spec = importlib.util.spec_from_file_location("espalier_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(path: Path, error: BaseException) -> str:
    """ "file:line" of the deepest line of the config file in the traceback."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else str(path)
