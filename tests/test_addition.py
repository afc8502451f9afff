"""A member of every family is added by one file each, without another edit, and a run of three
steps uses all of them. A schedule comes from an installed package instead.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "lm", "launch", "experiments")

ADDED = {
    "lm/optimizers/yogi.py": """
import dataclasses
from typing import Annotated

import optax

from lm.mapping import BELOW_ONE
from lm.optimizers import Optimizer, unless_skipped

@dataclasses.dataclass(frozen=True, kw_only=True)
class Yogi(Optimizer):
    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.999

    def direction(self, infos):
        return unless_skipped(optax.scale_by_yogi(b1=self.beta1, b2=self.beta2))
""",
    "lm/objectives/smoothed.py": """
import dataclasses

from lm.objectives.next_token import NextToken

@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothed(NextToken):
    factor: float = 0.5

    def __call__(self, forward, params, batch):
        found = super().__call__(forward, params, batch)
        return found._replace(total=self.factor * found.total)
""",
    "lm/feed_forward/squared.py": """
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.feed_forward import FeedForward
from lm.modules.linear import linear

class Squared(FeedForward):
    ffn_dim: int
    power: int = 2

    def setup(self):
        self.up = linear(self.context, "D F", (self.width, self.ffn_dim), 1)
        self.down = linear(self.context, "F D", (self.ffn_dim, self.width), 1)

    def __call__(self, x):
        out = self.down(nn.relu(self.up(x)) ** self.power)
        return out, {"energy": jnp.mean(out**2, axis=-1)}
""",
    "lm/trackers/lines.py": """
import dataclasses
from typing import ClassVar

@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    name: str = "shown.txt"
    package: ClassVar[str] = "json"

    def problem(self):
        return None

    def open(self, workdir, config, first_step):
        return _Log(workdir / self.name, f"{config['run']['length']} from {first_step}")

class _Log:
    def __init__(self, path, head):
        self._path, self._lines = path, [head]

    def write(self, step, values):
        self._lines.append(f"{step} {len(values) > 5}")

    def close(self):
        self._path.write_text(chr(10).join(self._lines))
""",
    "lm/blocks/sandwich.py": """
from lm.blocks.pre_norm import PreNorm

class Sandwich(PreNorm):
    gain: float = 0.5

    def _scaled(self, branch):
        return self.gain * super()._scaled(branch)
""",
    "lm/matrices/halves.py": """
from flax import linen as nn

from lm.modules.linear import Factor, Matrix
from lm.params import declare

class Halves(Matrix):
    rank: int = 4

    def problem(self):
        return f"rank={self.rank} must be positive" if self.rank < 1 else None

    @nn.compact
    def chains(self):
        names, n = self.letters.split(), self.contracted
        std = self.context.multipliers.init_std("hidden")
        def made(name, letters, shape, contracted):
            init = nn.initializers.normal(std)
            init = declare(init, " ".join(letters), "hidden", decay=True, contracted=contracted)
            return Factor(self.param(name, init, shape), " ".join(letters), contracted)
        first = made("first", [*names[:n], "R"], (*self.shape[:n], self.rank), n)
        second = made("second", ["R", *names[n:]], (self.rank, *self.shape[n:]), 1)
        return ((first, second),)
""",
    "lm/mixers/recent.py": """
from typing import ClassVar

from lm.modules.linear_mixer import LinearMixer

class Recent(LinearMixer):
    factor: float = 2.0
    op: ClassVar[str] = "gated_linear"

    def calls(self):
        return {"main": self.op_call(self.key_dim, self.value_dim, decay="none")}

    def mix(self, x, positions, run):
        q, k, v = self.project(x)
        return self.out(run("main", {"q": self.factor * q, "k": k, "v": v}))
""",
    "lm/evals/longest.py": """
import dataclasses
from typing import ClassVar

import numpy as np

from lm.evals.position import Position
from lm.evaluation import statistics

@dataclasses.dataclass(frozen=True, kw_only=True)
class Longest(Position):
    share: float = 1.0
    headline: ClassVar[str] = "tokens"

    def numbers(self, items, scored):
        count = np.asarray([float(len(row.tokens)) for row in items.rows])
        return {"tokens": statistics.ratio(self.share * count, np.ones_like(count))}
""",
    "lm/readers/shout.py": """
import dataclasses

from lm.readers import Reader, Row

@dataclasses.dataclass(frozen=True, kw_only=True)
class Shout(Reader):
    endings = (".shout",)
    packs = True

    def rows(self, opened, asked):
        data = opened.whole(asked).upper()
        yield Row(opened.file.name, data, opened.file.size, str(opened.file.path))
""",
    "experiments/all_of_it.py": """
from experiments import base

def get_config(arg=""):
    config = base.get_config()
    config.model.update({"width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2})
    config.model.update({"head_dim": 16, "ffn_dim": 24, "pattern": "recent"})
    config.model.layers = {"recent": {"factor": 3.0}}
    config.model.mlp = {"family": "squared", "power": 3}
    config.model.residual = {"family": "sandwich"}
    config.model.matrix = {"family": "halves"}
    config.data.tokenizer.update({"kind": "bytes", "vocab_size": 300})
    config.data.sources = {"text": base.source("TEXT", weight=1.0, valid_fraction=0.5)}
    config.data.update({"context_length": 32, "batch_size": 2})
    config.optimizer = {"family": "yogi", "beta2": 0.98}
    config.objective = {"family": "smoothed"}
    config.evaluate.tasks = {"longest": {"share": 0.5}}
    config.evaluate.max_tokens = 128
    config.run.length = "3 steps"
    config.log.samples = ()
    config.log.tracker = {"family": "lines"}
    return config
""",
}

# The files that pip leaves for an installed package.
INSTALLED = {
    "sawtooth_rates/sawtooth.py": """
import dataclasses

import jax.numpy as jnp

from lm.mapping import Duration
from lm.schedules import Phases, Rule, Schedule

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sawtooth(Rule):
    period: Duration = Duration(10, "steps")

    def schedule(self, run):
        period = self.period.tokens(run_tokens=run.tokens, tokens_per_step=run.tokens_per_step)
        peak = self.peak_learning_rate
        return Schedule(
            phases=Phases(0.0, run.tokens, run.tokens),
            peak=peak,
            stable=lambda tokens: peak * (1.0 - jnp.mod(tokens, period) / period),
            shape="sqrt",
            final_ratio=0.0,
        )
""",
    "sawtooth_rates/__init__.py": "",
    "sawtooth_rates-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sawtooth-rates\n"
    "Version: 1.0\n",
    "sawtooth_rates-1.0.dist-info/entry_points.txt": "[espalier.schedules]\n"
    "sawtooth = sawtooth_rates.sawtooth:Sawtooth\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert not (root / name).exists(), name
        (root / name).write_text(text, encoding="utf-8")


def test_one_file_adds_one_of_each_kind(tmp_path: Path) -> None:
    copy, site = tmp_path / "copy", tmp_path / "site"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    text = tmp_path / "text" / "a.txt"
    plant(tmp_path, {"text/a.txt": "A line of text, and another. " * 40, "text/b.txt": "b" * 400})
    with gzip.open(text.parent / "c.shout.gz", "wt") as file:
        file.write("read by a reader of its own " * 20)
    pattern = str(text.parent / "*")
    plant(copy, {name: source.replace("TEXT", pattern) for name, source in ADDED.items()})
    plant(site, INSTALLED)
    where = os.pathsep.join((str(copy), str(site)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launch.train", "--config=experiments/all_of_it.py"),
            *("--config.schedule.period=2 steps", "--config.schedule.family=sawtooth"),
            *(f"--workdir={tmp_path / 'run'}", f"--data_dir={tmp_path / 'data'}"),
        ],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": where, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stored = [np.fromfile(path, "<u2") for path in tmp_path.glob("data/text-*/*/tokens.bin")]
    assert any(b"READ BY A READER OF ITS OWN" in bytes(x[x < 256].tolist()) for x in stored)
    config: dict[str, Any] = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["schedule"] == {
        "family": "sawtooth",
        "peak_learning_rate": 0.02,
        "period": "2 steps",
    }
    yogi = {"family": "yogi", "beta1": 0.9, "beta2": 0.98, "clip_norm": 1.0}
    assert yogi.items() <= config["optimizer"].items()
    assert config["objective"] == {"family": "smoothed", "factor": 0.5}
    assert config["model"]["mlp"] == {"family": "squared", "power": 3}
    assert config["model"]["residual"] == {"family": "sandwich", "gain": 0.5}
    assert config["model"]["matrix"] == {"family": "halves", "rank": 4}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [round(line["lr/vector"], 6) for line in steps] == [0.02, 0.01, 0.02]
    for line in steps:
        assert line["aux/energy"] > 0
        whole = 0.5 * line["train/nll"] + line["aux/energy"]
        assert abs(line["train/loss"] - whole) < 1e-5 * whole
    assert steps[-1]["task/longest/tokens"] > 0
    shown = (tmp_path / "run" / "shown.txt").read_text().splitlines()
    assert shown == ["3 steps from 0", "1 True", "2 True", "3 True"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    parameters = (tmp_path / "run" / "params.txt").read_text()
    assert "mlp/up/second" in parameters
    assert "mlp/up/kernel" not in parameters
