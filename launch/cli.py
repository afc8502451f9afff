"""Command lines: one `--config` flag, and mistakes reported in one line.

Every launcher ends with `run(main)`. It parses the flags, which executes the config file and checks
the overrides `--config.key=value` against it, and calls `main`. It turns every mistake that the
user can fix (a flag, the config file, `lm.config.UserError`, a full disk) into a line `error: ...`
on stderr and exit status 2. Signals are handled in launch/ends.py. Nothing here imports JAX, so a
wrong command touches no device.
"""

from __future__ import annotations

import contextlib
import importlib
import logging as std_logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from kernels.spelling import near
from launch import ends, overrides, presets, result
from lm import files
from lm.config import Config, UserError, from_mapping
from lm.mapping import INTERRUPTED, MISTAKE, check_text, shown

# The launcher that asks for the flag owns it, so that `--help` lists it.
flags.disclaim_key_flags()

NAME = "config"


class _ConfigFlag(flags.Flag[Any]):
    """`--config`. `study`: "module:Class", the dataclass that a file may hold instead of a run.
    `words`: the flag and its overrides as they were given.
    """

    study = ""
    words: tuple[str, ...] = ()

    def kind(self, values: Mapping[str, Any]) -> Any:
        """The dataclass that these values describe; None if it is not known."""
        if "model" in values:
            return Config
        if not self.study:
            return None
        module, _, name = self.study.partition(":")
        return getattr(importlib.import_module(module), name)


def _help_config(flag: _ConfigFlag, argv: list[str]) -> None:
    """Given --help_config, prints the keys of a configuration and exits."""
    for word in argv:
        if match := re.fullmatch(r"--?help_config(?:=(.*))?", word):
            from launch import reference  # here, since it imports jax

            print(reference.shown(flag.study, match[1] or ""))
            raise SystemExit(0)


def config_flag(
    flag_values: flags.FlagValues = flags.FLAGS, *, is_required: bool = True, study: str = ""
) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config=file.py[:arg]` with overrides `--config.key=value`. `study`: the dataclass
    that a file may hold instead of a run, such as "lm.studies.sweep:Sweep".
    """
    text = (
        "a Python file with get_config(arg), as file.py or file.py:arg, or a preset, as quickstart "
        "or quickstart:arg; --config.key=value overrides a value; --help_config prints every key, "
        "--help_config=KEY those under KEY"
    )
    flag = _ConfigFlag(flags.ArgumentParser(), flags.ArgumentSerializer(), NAME, None, text)
    flag.study = study
    holder = flags.DEFINE_flag(flag, flag_values)
    if is_required:
        flags.mark_flag_as_required(NAME, flag_values)
    return holder


def data_dir_flag() -> flags.FlagHolder[str]:
    """Defines `--data_dir`, read by lm.data.prepare.resolve_data_dir."""
    text = "folder of prepared data; default $ESPALIER_DATA, else the user's cache"
    return flags.DEFINE_string("data_dir", "", text)


def config_words(flag_values: flags.FlagValues = flags.FLAGS) -> tuple[str, ...]:
    """`--config` and its overrides as given on the command line, each as one word."""
    flag = flag_values[NAME]
    assert isinstance(flag, _ConfigFlag)
    return flag.words


def read_config_file(argument: str) -> ConfigDict:
    """Executes "file.py", "file.py:arg", "preset" or "preset:arg" (launch/presets.py) and returns
    what its get_config returns.
    """
    path, value = presets.read(argument)
    if not isinstance(value, Mapping | ConfigDict):
        kind = type(value).__name__
        raise UserError(f"{path}: get_config() returned a {kind}; return a ConfigDict")
    return ConfigDict(_todays(value if isinstance(value, Mapping) else value.to_dict(), str(path)))


def load_config(config: ConfigDict) -> Config:
    """The validated configuration of a run, from the value of the config flag.

    Raises:
      UserError: the values are not a run, or have a mistake.
    """
    if "run" in config and "model" not in config:
        from launch import reference  # here, since it imports jax

        takers = " or ".join(f"espalier {name}" for name in reference.takers(config))
        raise UserError(f"{_given()} is a study, not a run; use {takers or 'another file'}")
    return from_mapping(_todays(config.to_dict(), "the configuration"))


def study_values(config: ConfigDict) -> dict[str, Any]:
    """The values of a study, from the value of the config flag.

    Raises:
      UserError: they are those of a run.
    """
    if "model" in config:
        raise UserError(f"{_given()} is a run, not a study; use espalier train, or name a study")
    return dict(config.to_dict())


def _given() -> str:
    """The config flag as it was given, without its overrides."""
    words = config_words() if NAME in flags.FLAGS else ()
    return words[0] if words else f"--{NAME}"


def _todays(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The values converted to the current format. Only the config.json of an imported run, which
    the experiment beside it passes on, can be in an older one.
    """
    if "format" not in values and "decay_from" not in values.get("schedule", {}):
        return values
    from lm.run import formats  # here, since it imports jax

    return formats.upgraded(values, where)


def path(flag: str, value: str) -> Path:
    """A path given by a flag; an empty one (an unset variable in a script) is a mistake."""
    if not value.strip():
        raise UserError(f"--{flag} is empty; name a path")
    if "://" in value:  # as a path, gs://... would be a folder named "gs:"
        raise UserError(f"--{flag}={value} is an address; name a path on a mounted file system")
    return Path(value).expanduser()


def workdir(value: str, maker: str) -> Path:
    """The folder given by --workdir, which is claimed for the command `maker`.

    Raises:
      UserError: another command made the folder.
    """
    found = path("workdir", value)
    files.claim(found, maker)
    return found


def out_file(flag: str, value: str) -> Path | None:
    """A file to write at the end of long work, None if `value` is empty. Its folder is created and
    checked now, so that a mistake is reported before the work starts.
    """
    if not value:
        return None
    found = Path(value).expanduser()
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={value}: {error.strerror}; choose another file") from None
    if found.is_dir():
        raise UserError(f"--{flag}={value} is a folder; name a file")
    if not os.access(found.parent, os.W_OK | os.X_OK):
        raise UserError(f"--{flag}={value}: {found.parent} cannot be written; name another folder")
    return found


def check_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """Refuses an output file whose name says that it holds something else."""
    if path is not None and path.suffix != suffix:
        raise UserError(f"--{flag}={path} does not end in {suffix}, which is what it will hold")


def run(main: Callable[[list[str]], int | None], *, positional: bool = False) -> NoReturn:
    """Parses the command line, calls `main(argv)` and exits with 0 or the status that `main`
    returns, 2 after a mistake, 75 if a signal stopped it, 130 if it was interrupted.

    Args:
      positional: whether arguments that are not flags are allowed; `main` gets them in argv[1:].
    """

    def parser(argv: list[str]) -> list[str]:
        rest = parse(argv, flags.FLAGS, are_positional_allowed=positional)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # without the INFO lines of libraries
            std_logging.getLogger("lm").setLevel(std_logging.INFO)  # but with our few
        logging.get_absl_handler().setFormatter(_Plain())
        return rest

    def command(argv: list[str]) -> int | None:
        with result.printed():
            return main(argv)

    ends.outlast_readers()
    with mistakes_in_one_line(), ends.unwinding():
        app.run(command, flags_parser=parser)
    raise AssertionError("app.run returns only by SystemExit")


class _Plain(std_logging.Formatter):
    """The message alone, after a word if it is more than information."""

    def format(self, record: std_logging.LogRecord) -> str:
        error, warning = std_logging.ERROR, std_logging.WARNING
        word = "error: " if record.levelno >= error else "warning: "
        return (word if record.levelno >= warning else "") + super().format(record)


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Turns mistakes that the user can fix into one line on stderr and an exit; others pass."""
    try:
        yield
    except UserError as error:
        _fail(error)
    except Exception as error:  # any type that a library raises for a failure of the system
        if (text := files.message_of(error)) is None:
            raise
        _fail(text)
    except ends.Stopped as stopped:
        print(f"{stopped}; the same command starts again", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def parse(
    argv: list[str], flag_values: flags.FlagValues, *, are_positional_allowed: bool = False
) -> list[str]:
    """Parses `argv` into `flag_values`. Returns the program name and the words that are not flags.

    Raises:
      UserError: any mistake on the command line or in the config file.
      SystemExit: status 0, after `--help`.
    """
    for word in argv:
        check_text(word, word.partition("=")[0] if word.startswith("-") else "the command line")
    flag = flag_values[NAME] if NAME in flag_values else None  # noqa: SIM401 (FlagValues lacks get)
    asked = {}
    try:
        argv = [argv[0], *flag_values.read_flags_from_files(argv[1:], force_gnu=False)]
        if isinstance(flag, _ConfigFlag):
            _help_config(flag, argv)
            argv, asked = overrides.split(argv, NAME)
        rest = flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        hint = _flag_hint(error.flagname, flag_values)
        raise UserError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise UserError(_plain(str(error))) from None
    except SystemExit:  # absl's --help prints the help and exits with 1
        raise SystemExit(0) from None
    for name in flag_values:
        value = flag_values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} must be a finite number")
        if isinstance(value, int) and abs(value) >= 1 << 32:
            raise UserError(f"--{name}={shown(value)} must be below 2^32 in size")
    if len(rest) > 1 and not are_positional_allowed:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    if isinstance(flag, _ConfigFlag) and (flag.value is not None or asked):
        flag.value = _overridden(flag, asked)
    return rest


def _overridden(flag: _ConfigFlag, asked: Mapping[str, overrides.Text]) -> ConfigDict:
    """The values of the file that the flag names, with the overrides applied."""
    if flag.value is None:
        raise UserError(f"missing flag --{NAME}; set --{NAME}=...")
    changes = [f"--{NAME}.{key}={value}" for key, value in asked.items()]
    flag.words = (f"--{NAME}={flag.value}", *changes)
    given = read_config_file(flag.value)
    if asked:
        plain = given.to_dict()
        base = lambda: read_config_file(presets.BASE).to_dict()
        given = ConfigDict(overrides.apply(plain, flag.kind(plain), asked, f"--{NAME}", base))
    return given.lock()


def _fail(message: object) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(MISTAKE) from None


def _flag_hint(word: str, known: Iterable[str]) -> str:
    close = near(word, known)
    return f"did you mean --{close}?" if close else "--help lists the flags"


def _plain(message: str) -> str:
    """absl's message; a plainer one for the commonest mistakes."""
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
