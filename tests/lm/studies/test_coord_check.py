"""The coordinate check: slopes and verdicts of planted curves, what a cell is, what a probe
measures, and a check of two widths from the command line.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import UserError
from lm.parallel import mesh
from lm.report import coord_check as page
from lm.report.coord_check import Curve
from lm.studies import coord_check
from lm.studies.coord_check import Asked, Cell
from tests.lm import lab, launched, tiny

STEPS = 4
WIDTHS = (64, 128, 512)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))


def curves(
    parametrization: str, exponents: dict[str, list[float]], over: str = "width"
) -> list[Curve]:
    """Three seeds of each size. Activations are (1 + seed) size^exponent, with one exponent for
    each step.
    """

    def curve(size: int, seed: int) -> Curve:
        sizes = {"width": 64, "layers": 2} | {over: size}
        probes = {
            probe: tuple((1 + seed) * size**exponent for exponent in steps)
            for probe, steps in exponents.items()
        }
        name = f"{parametrization}-{size}"
        return Curve(
            "softmax",
            parametrization,
            **sizes,
            optimizer="adamw",
            seed=seed,
            digest=name,
            over=over,
            probes=probes,
        )

    return [curve(size, seed) for size in WIDTHS for seed in range(3)]


def test_slopes_are_the_exponents() -> None:
    exponents = {"mixer": [0.0, 0.02, -0.07, 0.09, 0.1], "logits": [-0.5, -0.4, 0.1, 0.05, 0.0]}
    (found,) = page.verdicts(curves("mup", exponents))
    for probe, wanted in exponents.items():
        np.testing.assert_allclose(found.slopes[probe], wanted, atol=1e-12)
    assert page.judged("logits", STEPS) == range(2, 5)  # its fall at steps 0 and 1 does not count
    assert abs(found.steepest) == pytest.approx(0.1)


@pytest.mark.parametrize("parametrization", ["mup", "standard"])
def test_a_probe_that_is_zero_does_not_pass(parametrization: str) -> None:
    """It has no slope, so it is neither flat, nor does it show that the check has power."""
    of = {"mlp": (1.0, 1.0, 0.0), "stream": (1.0, 1.0, 1.0)}
    planted = curves(parametrization, {"mlp": [0.0]})
    silent = [dataclasses.replace(curve, probes=of) for curve in planted]
    (found,) = page.verdicts(silent)
    assert (found.worst, found.holds) == (("mlp", 2), False)
    for figure in (page.slopes_figure, page.curves_figure):
        assert figure(silent).startswith("<svg")


@pytest.mark.parametrize(
    ("parametrization", "over", "exponent", "holds", "message"),
    [
        ("mup", "width", 0.09, True, "flat"),
        ("mup", "width", -0.11, False, "not flat"),
        ("completep", "width", 0.11, False, "not flat"),
        ("standard", "width", 0.5, True, "fails, as it should"),
        ("standard", "width", 0.2, False, "does not fail: no power"),
        ("completep", "layers", 0.05, True, "flat"),
        ("mup", "layers", 0.5, True, "fails, as it should"),
        ("mup", "layers", 0.05, False, "does not fail: no power"),
    ],
)
def test_verdicts(
    parametrization: str, over: str, exponent: float, holds: bool, message: str
) -> None:
    planted = {"embedding": [0.0] * 5, "mlp": [0.0, 0.0, exponent, 0.0, 0.0]}
    (found,) = page.verdicts(curves(parametrization, planted, over))
    assert (found.holds, found.message, found.worst) == (holds, message, ("mlp", 2))
    assert f"{exponent:+.3f} (step 2)" in page.table(curves(parametrization, planted, over))


def test_curves_survive_the_table(tmp_path: Path) -> None:
    found = curves("mup", {"mixer": [0.0] * 5}) + curves("standard", {"mixer": [0.5] * 5})
    coord_check.write(found, {"command": "c"}, tmp_path)
    assert coord_check.read(tmp_path / "coord_check.json") == found
    for name in ("slopes.svg", "curves.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<svg")
    assert (tmp_path / "coord_check.md").read_text(encoding="utf-8") == page.table(found)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a table of a coordinate check"):
        coord_check.read(tmp_path / "other.json")


def check(**changes: Any) -> coord_check.Check:
    asked = {"patterns": ["softmax"], "parametrization": "both", "widths": [32, 64], "depths": []}
    return coord_check.create(tiny.config(), Asked(**asked | {"seeds": [0], "steps": 2} | changes))


def test_cells_differ_only_in_width_and_parametrization() -> None:
    found = check()
    assert found.cells == [
        Cell("softmax", name, width, 1) for name in ("mup", "standard") for width in (32, 64)
    ]
    wide = coord_check.configuration(found, found.cells[1])
    assert (wide.model.num_heads, wide.model.head_dim, wide.mup.base_width) == (8, 8, 32)
    standard = coord_check.configuration(found, found.cells[3])
    assert (standard.mup.embedding_multiplier, standard.mup.residual_multiplier) == (1.0, 1.0)
    assert wide.run.length == standard.run.length
    assert len({coord_check.digest(found, cell) for cell in found.cells}) == 4


def test_depths_are_checked_under_completep() -> None:
    found = check(widths=[], depths=[1, 4])
    assert found.parametrizations == ("completep", "mup")
    deep = coord_check.configuration(found, found.cells[1])
    assert (deep.model.num_layers, deep.mup.base_depth, deep.model.width) == (4, 1, 32)


def test_a_digest_covers_all_but_the_seed() -> None:
    of = lambda **changes: coord_check.digest(check(**changes), check().cells[0])
    assert of(seeds=[3, 4]) == of() != of(steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [32]}, "a slope is over one of them"),
        ({"depths": [1, 2]}, "a slope is over one of them"),
        ({"widths": [32, 32]}, "--widths=32,32 must name each once"),
        ({"seeds": []}, "--seeds= must name each once"),
        ({"widths": [32, 20]}, "is not whole at width 20"),
        ({"steps": 0}, "--steps=0 must be at least 1"),
        ({"patterns": ["softmx"]}, "did you mean 'softmax'"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(**changes)
    assert message in str(caught.value)


def test_what_is_in_the_table_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = check(seeds=[0, 1]), []

    def trained(_: Any, cell: Cell, seeds: list[int], __: Any) -> list[Curve]:
        asked.append((cell, seeds))
        return [coord_check._curve(found, cell, seed, {"mlp": (1.0,)}) for seed in seeds]

    monkeypatch.setattr(coord_check, "trained", trained)
    nothing: Any = None
    first = coord_check.run(check(), nothing, [], lambda *_: None)
    assert asked == [(cell, [0]) for cell in found.cells]
    asked.clear()
    again = coord_check.run(found, nothing, first[:2], lambda *_: None)
    assert asked == [(cell, [1] if i < 2 else [0, 1]) for i, cell in enumerate(found.cells)]
    assert len(again) == 8


def test_probes_are_means_of_what_the_modules_give() -> None:
    built = tiny.create({"model.num_layers": 2, "model.pattern": "softmax"})
    params, batch = tiny.params(built), built.put(tiny.batch())
    found = jax.device_get(coord_check.probes(built, params, batch))
    table = np.asarray(params["embed"]["table"])
    multiplier = built.model.context.multipliers.embedding
    embedded = multiplier * table[np.asarray(batch.tokens)]
    assert found["embedding"] == pytest.approx(np.mean(np.abs(embedded)), rel=1e-5)
    inputs = batch.tokens, batch.segment_ids, batch.positions
    hidden: Any = built.model.apply({"params": params}, *inputs)
    logits = np.asarray(hidden[0]) @ table[: tiny.VOCAB].T
    assert found["logits"] == pytest.approx(np.mean(np.abs(logits)), rel=1e-5)
    # Zeroing what writes to the residual stream in one of two layers about halves the probe of that
    # branch.
    for probe, place in (("mixer", ("mixer", "out")), ("mlp", ("mlp", "down"))):
        changed = jax.tree.map(jnp.asarray, params)
        node = changed["groups_0"]["blocks_0"][place[0]][place[1]]
        node["kernel"] = node["kernel"].at[1].set(0.0)
        first = coord_check.probes(built, changed, batch)[probe]
        assert 0.2 * found[probe] < float(first) < 0.8 * found[probe]
    silent = jax.tree.map(jnp.zeros_like, params) | {"embed": params["embed"]}
    stream = coord_check.probes(built, silent, batch)["stream"]
    assert float(stream) == pytest.approx(np.mean(np.abs(embedded)), rel=1e-5)


def test_two_widths_from_the_command_line(tmp_path: Path) -> None:
    """The exit status is 0 if the table's verdict holds, and 1 if not. The same command does not
    train again.
    """
    config = tmp_path / "small.py"
    corpus = lab.write_corpus(tmp_path / "corpus")
    source = {"path": f"{corpus}/*.txt", "text_key": "text", "weight": 1.0, "valid_fraction": 0.1}
    config.write_text(
        "from experiments.coord_check import config as own\n"
        "def get_config(arg=''):\n"
        "    config = own.get_config()\n"
        "    config.model.update({'width': 32, 'num_heads': 2, 'num_kv_heads': 2, 'ffn_dim': 64})\n"
        f"    config.data.sources = {{'text': {source!r}}}\n"
        "    return config\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "launch.coord_check", f"--config={config}", "--steps=1"]
    command += [
        "--widths=32,64",
        "--seeds=0",
        "--parametrization=mup",
        f"--workdir={tmp_path / 'out'}",
    ]
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=launched.ROOT,
            env=launched.os.environ | launched.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        kept = json.loads((tmp_path / "out" / "coord_check.json").read_text(encoding="utf-8"))
        found = page.curves_of(kept["coord_check"])
        assert [curve.width for curve in found] == [32, 64]
        (verdict,) = page.verdicts(found)
        assert done.returncode == (0 if verdict.holds else 1), done.stderr
        assert page.table(found) in done.stdout
        assert len(found[0].probes["mlp"]) == 2
