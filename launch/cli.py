"""Command lines: one `--config` flag, and mistakes told in one line.

`run(main)` is what every launcher ends with. Order of steps: parse the flags (the config file is
executed, overrides `--config.key=value` are checked against it), call `main`, and turn every
mistake the user can mend (a flag, the config file, `lm.config.UserError`, a full disk) into
`error: ...` on stderr with exit status 2; signals are in launch/ends.py. Nothing here imports JAX,
so a wrong command touches no device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging as std_logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch import ends, overrides
from lm import files
from lm.config import Config, UserError, from_mapping
from lm.families import Family
from lm.mapping import INTERRUPTED, MISTAKE, check_text, completed, shown

# The launcher that asks for the flag owns it, so that `--help` lists it.
flags.disclaim_key_flags()

# What a mistake in a config file raises when it is executed.
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

# The command line while it is parsed; the config flag reads it to find its overrides.
_argv: list[str] = []


def config_flag(
    name: str = "config",
    flag_values: flags.FlagValues = flags.FLAGS,
    *,
    is_required: bool = True,
) -> flags.FlagHolder[ConfigDict]:
    """Defines the `--config=file.py[:arg]` with overrides `--config.key=value`."""
    holder = config_flags.DEFINE_config_file(
        name,
        default=None,
        help_string="Python file with get_config(arg), as file.py or file.py:arg; "
        f"--{name}.key=value overrides a value",
        flag_values=flag_values,
        lock_config=True,
        sys_argv=_argv,
    )
    flag_values[name].parser = _ConfigFile(name)
    if is_required:
        flags.mark_flag_as_required(name, flag_values)
    return holder


def read_config_file(argument: str) -> ConfigDict:
    """Executes "file.py" or "file.py:arg" and returns what its get_config gives."""
    path, _, arg = argument.partition(":")
    value = _get_config(Path(path), arg)
    if not isinstance(value, Mapping | ConfigDict):
        kind = type(value).__name__
        raise UserError(f"{path}: get_config() returned a {kind}; return a ConfigDict")
    values = _todays(value if isinstance(value, Mapping) else value.to_dict(), path)
    return ConfigDict(completed(Config, values))


def load_config(config: ConfigDict) -> Config:
    """The value of the config flag -> the validated configuration of a run."""
    return from_mapping(_todays(config.to_dict(), "the configuration"))


def _todays(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config.json of a run, which the experiment beside an imported folder hands on, in today's
    format; any other configuration is in it.
    """
    if "format" not in values and "decay_from" not in values.get("schedule", {}):
        return values
    from lm.run import formats  # here, since it imports jax

    return formats.upgraded(values, where)


def path(flag: str, value: str) -> Path:
    """A path given by a flag; an empty one (an unset variable in a script) is a mistake."""
    if not value.strip():
        raise UserError(f"--{flag} is empty; name a path")
    if "://" in value:  # as a path it would be a folder named gs: here
        raise UserError(f"--{flag}={value} is an address; name a path, of a mounted file system")
    return Path(value).expanduser()


def workdir(value: str, maker: str) -> Path:
    """The folder given by --workdir, which becomes that of the command `maker`.

    Raises:
      UserError: it is another command's.
    """
    found = path("workdir", value)
    files.claim(found, maker)
    return found


def out_file(flag: str, value: str, *, makes_folder: bool = False) -> Path | None:
    """A file to write at the end of long work, so its folder is looked at, or made, before; None:
    not asked for.
    """
    if not value:
        return None
    found = Path(value).expanduser()
    if makes_folder:
        try:
            found.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{flag}={value}: {error.strerror}; choose another file") from None
    if not found.parent.is_dir():
        raise UserError(f"--{flag}={value}: no such folder {found.parent}")
    if found.is_dir():
        raise UserError(f"--{flag}={value} is a folder; name a file")
    if not os.access(found.parent, os.W_OK | os.X_OK):
        raise UserError(f"--{flag}={value}: {found.parent} cannot be written; name another folder")
    return found


def check_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """Refuses a file to write whose name says that it holds something else."""
    if path is not None and path.suffix != suffix:
        raise UserError(f"--{flag}={path} does not end in {suffix}, which is what it will hold")


def layer_flag() -> flags.FlagHolder[list[str]]:
    """Defines the repeatable `--layer=LABEL.OPTION=VALUE`, read by `layers`."""
    return flags.DEFINE_multi_string(
        "layer", [], "LABEL.OPTION=VALUE: an option of a layer other than the run's; repeatable"
    )


def layers(values: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by label: ["softmax.window=512"] -> {"softmax": {"window": 512}}.

    A value is JSON where it can be (512, 0.5, true), else a word.
    """
    return _assignments("layer", values, "softmax.window=512")


def tasks(values: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same for `--task`, where a bare word is a task with its defaults: ["position"] ->
    {"position": {}}.
    """
    bare = {text: {} for text in values if re.fullmatch(r"[\w-]+", text)}
    set_ = _assignments("task", [x for x in values if x not in bare], "blimp.max_items=100")
    return bare | set_


def member(flag: str, text: str, family: Family) -> dict[str, Any]:
    """A member of a family with options, as one word: "wsd:decay_shape=sqrt,decay=10 percent" ->
    {"family": "wsd", "decay_shape": "sqrt", "decay": "10 percent"}. A value is JSON where it can
    be, else a word.

    Raises:
      UserError: no such member, or another form.
    """
    name, colon, rest = text.partition(":")
    family.find(name, f"--{flag}={text}")
    found: dict[str, Any] = {family.key: name}
    for part in re.split(r",(?=\w+=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if not (equals and re.fullmatch(r"\w+", key)):
            raise UserError(f"--{flag}={text}: write NAME:OPTION=VALUE,OPTION=VALUE")
        if key in found:
            raise UserError(f"--{flag}={text}: {key} is given twice")
        found[key] = _value(value)
    return found


def _assignments(flag: str, values: Iterable[str], example: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in values:
        name, equals, value = text.partition("=")
        label, dot, option = name.rpartition(".")
        if not (equals and dot and label and option):
            raise UserError(f"--{flag}={text}: write LABEL.OPTION=VALUE, as {example}")
        options = found.setdefault(label, {})
        if option in options:
            raise UserError(f"--{flag}={label}.{option} is given twice")
        options[option] = _value(value)
    return found


def _value(text: str) -> Any:
    """JSON where it can be, else the word itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also of too many digits or brackets
        return text


def run(main: Callable[[list[str]], int | None], *, positional: bool = False) -> NoReturn:
    """Parses the command line, calls `main(argv)`, exits: 0 or what `main` returns, 2 for a
    mistake, 75 if a signal stopped it, 130 if interrupted.

    Args:
      positional: whether arguments that are no flags are allowed; `main` finds them in argv[1:].
    """

    def parser(argv: list[str]) -> list[str]:
        rest = parse(argv, flags.FLAGS, are_positional_allowed=positional)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # absl would show every library's INFO lines
            std_logging.getLogger("lm").setLevel(std_logging.INFO)  # and ours are few
        return rest

    ends.outlast_readers()
    with mistakes_in_one_line(), ends.unwinding():
        app.run(main, flags_parser=parser)
    raise AssertionError("app.run returns only by SystemExit")


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the process with one line on stderr for what the user can mend; other errors pass."""
    try:
        yield
    except UserError as error:
        _fail(error)
    except Exception as error:  # whatever a library raises where the system fails
        if (told := files.told(error)) is None:
            raise
        _fail(told)
    except ends.Stopped as stopped:
        print(f"{stopped}; the same command starts again", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def parse(
    argv: list[str], flag_values: flags.FlagValues, *, are_positional_allowed: bool = False
) -> list[str]:
    """Parses `argv` into `flag_values` and returns what is no flag, the program name first.

    Raises:
      UserError: any mistake on the command line or in the config file.
      SystemExit: status 0, after `--help`.
    """
    for word in argv:
        check_text(word, word.partition("=")[0] if word.startswith("-") else "the command line")
    _argv[:] = overrides.members_by_name(_last_config_wins(argv, "config"), "config")
    try:
        rest = flag_values(_argv)
    except flags.UnrecognizedFlagError as error:
        group = error.flagname.split(".")[0]  # overrides become flags when the file is read
        if group in flag_values and group != error.flagname:
            raise UserError(f"missing flag --{group}; set --{group}=...") from None
        hint = _flag_hint(error.flagname, flag_values)
        raise UserError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise UserError(_plain(str(error))) from None
    except SystemExit:  # absl's --help exits with 1 after printing what was asked for
        raise SystemExit(0) from None
    finally:
        _argv.clear()
    for name in flag_values:
        if "." in name:  # an override, which is checked by its key
            continue
        value = flag_values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} must be a finite number")
        if isinstance(value, int) and abs(value) >= 1 << 32:
            raise UserError(f"--{name}={shown(value)} must be below 2^32 in size")
    if len(rest) > 1 and not are_positional_allowed:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def _fail(message: object) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(MISTAKE) from None


def _last_config_wins(argv: list[str], name: str) -> list[str]:
    """Keeps the last `--config`, at the place of the first; absl would apply overrides to each."""
    places, value = [], None
    for i, arg in enumerate(argv):
        if arg == "--":
            break
        if re.fullmatch(rf"--?{name}", arg) and i + 1 < len(argv):
            places.append((i, i + 2))
            value = argv[i + 1]
        elif found := re.fullmatch(rf"--?{name}=(.*)", arg, flags=re.DOTALL):
            places.append((i, i + 1))
            value = found[1]
    if len(places) < 2:
        return list(argv)
    dropped = {j for start, stop in places for j in range(start, stop)}
    kept = [None if i in dropped else arg for i, arg in enumerate(argv)]
    kept[places[0][0]] = f"--{name}={value}"
    return [arg for arg in kept if arg is not None]


def _flag_hint(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean --{close[0]}?" if close else "--help lists the flags"


def _plain(message: str) -> str:
    """absl's message, shorter where its words do not help."""
    if found := re.match(r"flag --([\w.]+)=None: Flag --\1 must have a value", message):
        return f"missing flag --{found[1]}; set --{found[1]}=..."
    patterns = (
        (r"flag --(\S+?)=(.*): invalid literal for int", "an integer"),
        (r"flag --(\S+?)=(.*): could not convert string to float", "a number"),
        (r"flag --(\S+?)=(.*): .*Non-boolean argument", "true or false"),
    )
    for pattern, wanted in patterns:
        if found := re.match(pattern, message, flags=re.DOTALL):
            return f"--{found[1]}={found[2]} is not {wanted}"
    return message


class _ConfigFile(flags.ArgumentParser[ConfigDict]):
    """Executes a config file and checks the overrides on the command line against its keys."""

    def __init__(self, name: str) -> None:
        self.name = name

    def parse(self, argument: Any) -> ConfigDict:
        config = read_config_file(argument)
        asked = overrides.read(self.name, _argv)
        overrides.complete_families(config, asked, f"--{self.name}")
        for override in asked:
            overrides.check_key(config, override, f"--{self.name}")
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def _get_config(path: Path, arg: str) -> Any:
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
        raise UserError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = get_close_matches(str(path), siblings, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the current directory is {Path.cwd()}"
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
