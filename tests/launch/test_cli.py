"""A mistake on a command line or in a config file gives one line with its remedy, and status 2."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from launch import cli
from lm.config import Config, UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG, WORKDIR = "--config=experiments/base.py", "--workdir=run"


def load(arguments: list[str]) -> Config:
    """Does what a launcher does before it touches a device, with its own flags."""
    values = flags.FlagValues()
    config = cli.config_flag(flag_values=values)
    flags.DEFINE_string("workdir", None, "", required=True, flag_values=values)
    flags.DEFINE_integer("profile_steps", 0, "", lower_bound=0, flag_values=values)
    flags.DEFINE_float("rate", 1.0, "", flag_values=values)
    cli.parse(["train", *arguments], values)
    return cli.load_config(config.value)


def line_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.chdir(ROOT), pytest.raises(SystemExit) as stop, cli.mistakes_in_one_line():
        load(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# Whole command lines, and a part of the message.
COMMANDS = [
    ([], "missing flag --config; set --config=..."),
    ([CONFIG], "missing flag --workdir; set --workdir=..."),
    ([WORKDIR], "missing flag --config"),
    ([CONFIG, "--workdri=run"], "unknown flag --workdri; did you mean --workdir?"),
    ([CONFIG, WORKDIR, "--zzz"], "unknown flag --zzz; --help lists the flags"),
    ([WORKDIR, "--config.seed=1"], "missing flag --config; set --config=..."),
    ([CONFIG, WORKDIR, "word"], "unexpected argument 'word'"),
    ([CONFIG, "--workdir"], "Missing value for flag --workdir"),
    ([CONFIG, WORKDIR, "--profile_steps=-1"], "non-negative"),
    ([CONFIG, WORKDIR, "--profile_steps=few"], "--profile_steps=few is not an integer"),
    ([CONFIG, WORKDIR, "--flagfile=absent"], "absent"),
    ([WORKDIR, "--config=experiments/bas.py"], "did you mean experiments/base.py?"),
    ([WORKDIR, "--config=bas"], "no such preset, and no such file; did you mean 'base'?"),
    ([WORKDIR, "--config=zzz"], "no such file; known: annealing, autolrs, base, compare"),
    ([WORKDIR, "--config=base:x"], "experiments/base.py takes no argument: drop ':x'"),
    ([WORKDIR, "--config=absent/x.py"], "no such file; the current directory is"),
    ([WORKDIR, "--config=experiments"], "no such file"),
    ([WORKDIR, "--config="], "no such file"),
    ([WORKDIR, "--config=pyproject.toml"], "its name must end in .py"),
    ([WORKDIR, "--config=experiments/base.py:x"], "takes no argument: drop ':x'"),
    ([CONFIG, WORKDIR, "--config.seed"], "--config.seed has no value; write --config.seed=VALUE"),
    ([CONFIG, "--config.seed", WORKDIR], "--config.seed has no value"),
    ([CONFIG, WORKDIR, "--noconfig.seed"], "--config.seed has no value"),
    (
        [CONFIG, WORKDIR, "--config.mesh.data=1", "--config.mesh={}"],
        "--config.mesh comes after --config.mesh.data and would undo it; swap them",
    ),
    ([CONFIG, WORKDIR, "--rate=nan"], "--rate=nan must be a finite number"),
    ([CONFIG, WORKDIR, "--rate=-inf"], "--rate=-inf must be a finite number"),
    ([CONFIG, WORKDIR, "--rate=1e999"], "--rate=inf must be a finite number"),
    ([CONFIG, WORKDIR, "--profile_steps=4294967296"], "must be below 2^32 in size"),
    ([CONFIG, "--workdir=a\udcff"], "--workdir is not UTF-8 at place 11 of '--workdir=a\\udcff'"),
    ([CONFIG, WORKDIR, "a\udc80"], "the command line is not UTF-8 at place 1 of 'a\\udc80'"),
    ([CONFIG, WORKDIR, "--config.init_from=\udc80"], "--config.init_from is not UTF-8 at place 19"),
]

SOURCE = {"path": "x", "text_key": "text", "weight": 1, "valid_fraction": 0}
# Overrides of experiments/base.py, each written --config.<...>.
OVERRIDES = [
    (["model.widht=3"], "unknown key --config.model.widht; did you mean 'width'?"),
    (["modle.width=3"], "unknown key --config.modle; did you mean 'model'?"),
    (["width=3"], "did you mean 'model.width'?"),
    (["model.batch_size=3"], "did you mean 'data.batch_size'?"),
    (["model.zzz=3"], "known: cpu_unroll, ffn_dim"),
    (["seed.x=3"], "--config.seed is a value, not a group of keys"),
    (["data.sources.books.weight=1"], "missing key config.data.sources.books.path"),
    (
        ["data.sources.books.size=1"],
        "unknown key --config.data.sources.books.size; known: max_tokens",
    ),
    (["model.layers.a.window=8"], "--config.model.layers.a does not name a mixer; set --config"),
    (["model.layers.gla.windw=8"], "unknown key --config.model.layers.gla.windw; known: expand_k"),
    (["model.layers.a.mixer=gla", "model.layers.a.window=8"], "it is an option of softmax, and"),
    (["model.pattern=((1,'gla')"], "does not read as a value; close its brackets"),
    (["evaluate.tasks.mine.pairs=4"], "--config.evaluate.tasks.mine does not name a task; set"),
    (["evaluate.tasks.mqar.pair=4"], "did you mean 'pairs'?"),
    (["seed=word"], "--config.seed=word is not an integer"),
    (["model.width=3.5"], "--config.model.width=3.5 is not an integer"),
    (["optimizer.beta1=word"], "--config.optimizer.beta1=word is not a number"),
    (["model.unroll=maybe"], "--config.model.unroll=maybe is not true or false"),
    (["data.sources=[]"], "is not a dict"),
    ([f"data.sources={{'a/b': {SOURCE}}}"], "data.sources.a/b: a name takes letters"),
    (["model={}"], "missing key config.model.width"),
    (["model.layers={'a': 1}"], "config.model.layers.a=1 is a int"),
    (["model.precision=fp8"], "is not one of float32, bfloat16, bfloat16_operands"),
    (["model.remat=some"], "is not one of none, full, dots, named"),
    (["data.packing=tight"], "is not one of concat, best_fit"),
    (["schedule.family=zigzag"], "unknown schedule 'zigzag'; known: "),
    (["schedule.decay_shape=square"], "is not one of exponential"),
    (["optimizer.eps=nan"], "config.optimizer.eps=nan must be finite"),
    (["schedule.peak_learning_rate=inf"], "must be finite"),
    (["loss.z_loss=-1"], "loss.z_loss=-1.0 must be >= 0"),
    (["seed=-1"], "seed=-1 must lie in [0, 2^31)"),
    (["model.width=0"], "model.width=0 must be positive"),
    (["loss.chunk_size=-8"], "loss.chunk_size=-8 tokens must be positive"),
    (["optimizer.clip_norm=0"], "optimizer.clip_norm=0.0 must be positive"),
    (["model.num_kv_heads=3"], "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
    (["run.accumulation=3"], "is not a multiple of run.accumulation=3"),
    (["run.length=10 percent"], "must be a positive number of tokens or steps"),
    (["run.length=0 steps"], "must be a positive number of tokens or steps"),
    (["run.length=10"], "is not a duration; write a number and one of steps, tokens, percent"),
    (["run.length=ten steps"], "'ten' is not a number"),
    (["evaluate.every=-1 steps"], "must be a finite duration >= 0"),
    (["log.every=nan steps"], "must be a finite duration >= 0"),
    (["optimizer.beta2=1"], "optimizer.beta2=1.0 must lie in [0, 1)"),
    (["init_from=a", "decay_from=b"], "exclude each other"),
    (["mup.parametrization=standard"], "set mup.embedding_multiplier=1.0"),
    (["schedule.b=0.5"], "Power needs a > 0 and b < 0"),
    (["schedule.final_ratio=2"], "schedule.final_ratio=2.0 must lie in [0, 1]"),
    (["schedule.warmup=95 percent"], "run.length has 1003520; shorten them"),
    (["mesh.fsdp=-1"], "one may be -1 (all that is left); set mesh."),
    (["mesh.tensor=0"], "sizes must be positive, and one may be -1"),
    (["data.tokenizer.kind=json"], "needs data.tokenizer.path"),
    (["data.tokenizer.path=x.json"], "reads no file; set path to ''"),
    (["data.tokenizer.vocab_size=100"], "must be >= 257"),
    (["data.sources.stdlib.weight=-1"], "stdlib.weight=-1.0 must be >= 0"),
    (["data.sources.stdlib.valid_fraction=1.5"], "must lie in [0, 1]"),
    (["data.sources.stdlib.valid_fraction=1"], "nothing is left to train on"),
]

# Whole config files; `base` returns the values of experiments/base.py.
HEAD = "from experiments.base import get_config as base\n"
FILES = [
    ("def get_config(:\n", "config.py:1: SyntaxError"),
    ("x = 1\n\ndef get_config():\n    return absent\n", "config.py:4: NameError: name 'absent'"),
    ("import absent_module\n", "config.py:1: ModuleNotFoundError"),
    ("def get_config():\n    raise ValueError('one\\ntwo')\n", "config.py:2: ValueError: one two"),
    ("def get_config():\n    pass\n", "get_config() returned a NoneType; return a ConfigDict"),
    ("x = 1\n", "defines no get_config()"),
    ("get_config = 1\n", "defines no get_config()"),
    ("def get_config(a, b):\n    pass\n", "config.py: TypeError"),
    (HEAD + "def get_config():\n    c = base()\n    c.modle = 1\n    return c\n", "config.modle"),
    (
        HEAD + "def get_config():\n    c = base()\n    del c.seed\n    return c\n",
        "missing key config",
    ),
    (
        HEAD + "def get_config():\n    return base().to_dict() | {'seed': True}\n",
        "seed=True is a bool",
    ),
    (
        HEAD + "def get_config():\n    return base().to_dict() | {'seed': '1'}\n",
        "seed='1' is a str",
    ),
    (
        HEAD + "def get_config():\n    return base().to_dict() | {'run': None}\n",
        "run=None is a None",
    ),
    (HEAD + "def get_config():\n    base().seed = 'x'\n", "config.py:3: TypeError"),
]


@pytest.mark.parametrize(("arguments", "wanted"), COMMANDS, ids=ascii)
def test_bad_lines(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in line_of(arguments, capsys)


@pytest.mark.parametrize(("overrides", "wanted"), OVERRIDES, ids=str)
def test_mistakes_in_overrides_are_one_line(
    overrides: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of([CONFIG, WORKDIR, *(f"--config.{o}" for o in overrides)], capsys)
    assert wanted in line


@pytest.mark.parametrize(("text", "wanted"), FILES, ids=range(len(FILES)))
def test_mistakes_in_config_files_are_one_line(
    text: str, wanted: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.py").write_text(text)
    assert wanted in line_of([f"--config={tmp_path}/config.py", WORKDIR], capsys)


def test_good_command_lines_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load([CONFIG, WORKDIR]).seed == 0
    changed = ["--config.model.width=96", "--config.seed", "7", "--config.model.unroll"]
    config = load([CONFIG, WORKDIR, *changed, "--config.mesh.replicate=('H',)"])
    assert (config.model.width, config.seed, config.model.unroll) == (96, 7, True)
    assert config.mesh.replicate == ("H",)
    assert (
        load([CONFIG, WORKDIR, "--noconfig.model.tied_embeddings"]).model.tied_embeddings is False
    )


@pytest.mark.parametrize("pattern", ["softmax", "softmax,stickbreaking"])
def test_config_takes_an_argument(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load([f"--config=experiments/quickstart.py:{pattern}", WORKDIR])
    assert config.model.pattern == pattern


def test_the_last_config_and_override_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/quickstart names a config. A later one replaces it whole, before any override."""
    monkeypatch.chdir(ROOT)
    text = f"{HEAD}def get_config():\n    c = base()\n    c.seed = 5\n    return c\n"
    (tmp_path / "config.py").write_text(text)
    other = f"{tmp_path}/config.py"
    assert load([CONFIG, WORKDIR, f"--config={other}"]).seed == 5
    assert load([CONFIG, WORKDIR, "--config", other]).seed == 5
    config = load([CONFIG, "--config.model.width=32", WORKDIR, f"--config={other}"])
    assert (config.seed, config.model.width) == (5, 32)
    assert load([CONFIG, WORKDIR, "--config.seed=1", "--config.seed=2"]).seed == 2


LAUNCHER = """
import sys
from absl import flags, logging
from launch import cli
CONFIG = cli.config_flag()
flags.DEFINE_enum("what", "print", ["print", "interrupt", "mistake"], "what to do")

def main(argv):
    config = cli.load_config(CONFIG.value)
    bridge = sys.modules["jax._src.xla_bridge"]  # the files of families have imported it
    assert not bridge.backends_are_initialized(), "a device is touched before the config is right"
    logging.info("noise of a library")
    if flags.FLAGS.what == "interrupt":
        raise KeyboardInterrupt
    if flags.FLAGS.what == "mistake":
        from lm.config import UserError
        raise UserError("a mistake")
    print(config.model.width)

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        ([CONFIG, "--config.model.width=64"], 0, "64\n", ""),
        ([CONFIG, "--what=interrupt"], 130, "", "interrupted\n"),
        ([CONFIG, "--what=mistake"], 2, "", "error: a mistake\n"),
        ([CONFIG, "--waht=mistake"], 2, "", "error: unknown flag --waht; did you mean --what?\n"),
        (["--config.model.width=64"], 2, "", "error: missing flag --config; set --config=...\n"),
    ],
)
def test_processes(tmp_path: Path, arguments: list[str], status: int, out: str, err: str) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, "-W", "error", str(tmp_path / "launcher.py"), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_help(tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--config" in done.stdout
    assert "--what" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "error: absent: no such run folder\n"),
        ([], "error: which runs? name their folders: espalier report WORKDIR...\n"),
    ],
)
def test_report_without_a_run_is_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "launch.report", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("name", ["compare", "recall"])
def test_presets_are_listed(name: str) -> None:
    path = ROOT / "experiments" / name / "config.py"
    with pytest.raises(UserError, match="there is no preset 'nope'; presets: smoke, "):
        cli.read_config_file(f"{path}:nope")


def test_a_task_is_added_to_a_comparison(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.compare", "--workdir=runs"]
    command += [f"--config={ROOT}/experiments/mixers/config.py", "--task=position"]
    command += ["--task=mine.task=mqar", "--task=mine.pair=4"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    message = "error: unknown option config.tasks.mine.pair; did you mean 'pairs'?\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_verdict_can_be_rechecked(tmp_path: Path) -> None:
    """The last verdict of a committed page is reversed; --recheck finds it."""
    page = json.loads((ROOT / "experiments" / "length" / "compare.json").read_text())
    turned = page["verdicts"][-1]
    turned |= {"outcome": "worse" if turned["outcome"] != "worse" else "better"}
    (tmp_path / "page.json").write_text(json.dumps(page))

    def call(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "launch.compare", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    status, out, _ = call("--recheck=page.json")
    words = [line.partition(":")[0] for line in out.splitlines()]
    assert words == ["stands"] * (len(page["verdicts"]) - 1) + ["does not stand"]
    assert status == 1
    message = "error: --config is missing; name the file of a study\n"
    assert call("--workdir=runs") == (2, "", message)
    assert call("--recheck=page.json", "--task=position") == (2, "", message)


@pytest.mark.parametrize("module", ["launch.evaluate", "launch.generate"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["window=8"], "--layer=window=8: write LABEL.OPTION=VALUE, as softmax.window=512"),
        (["a.b"], "--layer=a.b: write LABEL.OPTION=VALUE, as softmax.window=512"),
        (["a.b=1", "a.b=2"], "--layer=a.b is given twice"),
    ],
)
def test_bad_layer_flags_are_refused(
    module: str, layers: list[str], message: str, tmp_path: Path
) -> None:
    prompt = ["--prompt=a"] if module == "launch.generate" else []
    command = [sys.executable, "-m", module, "--checkpoint=absent", *prompt]
    done = subprocess.run(
        [*command, *(f"--layer={x}" for x in layers)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize(("value", "wanted"), [(" ", "is empty"), ("gs://b/x", "is an address")])
def test_a_value_that_is_not_a_path_is_refused(value: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        cli.path("workdir", value)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("evaluate", ["--out=file/x.json"], "--out=file/x.json: File exists; choose another file"),
        (
            "eval_harness",
            ["--tasks=a", "--out=."],
            "--out=. is a folder; name a file",
        ),
        (
            "verify_export",
            ["--folder=absent", "--tolerance=nan"],
            "--tolerance=nan must be a finite number",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    module: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", "--checkpoint=absent", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
