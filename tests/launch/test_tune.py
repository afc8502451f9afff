"""launch.tune on kernels with made-up costs, and its mistakes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from kernels import dispatch, measured
from kernels.contract import Case
from launch import tune
from launch.benchmarks import forms, tuning
from launch.benchmarks.forms import Cost, Costs
from lm import targets
from lm.config import UserError

ROOT = Path(__file__).parents[2]


class Made:
    """A device on which larger tiles are faster, and the largest does not compile."""

    device_kind, platform = "Made 1", "tpu"

    def __init__(self, chunked: float, evidence: str = "measured", peak: int = 100) -> None:
        self.chunked, self.evidence, self.peak = chunked, evidence, peak

    def costs(self, name: str, case: Case, sides: Any, trials: int) -> dict[str, Costs]:
        found, order = {}, list(dispatch.get(name).candidate_blocks("pallas_tpu"))
        for side, (form, blocks) in sides.items():
            if form == "chunked":
                found[side] = Costs(Cost(self.chunked, 100), Cost(self.chunked, 100))
            elif blocks != order[-1]:
                seconds = 1.0 / (1 + order.index(blocks))
                found[side] = Costs(Cost(seconds, self.peak), Cost(seconds, self.peak))
        return found


def first_row(place: Any) -> dict[str, Any]:
    return next(tuning.rows(place, ["gated_linear"], lambda message: None))


def test_the_fastest_tiles_that_compile_are_taken() -> None:
    order = dispatch.get("gated_linear").candidate_blocks("pallas_tpu")
    assert len(order) > 1
    row = first_row(Made(chunked=2.0))
    assert row["refused"] == [str(order[-1])]
    made = order[-2]
    assert row["blocks"] == {name: getattr(made, name) for name in row["blocks"]}
    assert row["wins"]
    assert row["ratio"]["both"] == pytest.approx(0.5 / (len(order) - 1))
    assert set(measured.Row._fields) <= set(row)


def test_a_kernel_that_is_slower_or_takes_more_memory_loses() -> None:
    assert not first_row(Made(chunked=1e-3))["wins"]
    assert not first_row(Made(2.0, "modelled", peak=101))["wins"]
    assert first_row(Made(2.0, "measured", peak=101))["wins"]


def test_a_model_ranks_no_tiles() -> None:
    row = first_row(Made(2.0, "modelled"))
    assert len(row["tried"]) == 1
    default = dispatch.get("gated_linear").default_blocks("pallas_tpu")
    assert row["blocks"] == dataclasses.asdict(default)


def test_every_setting_and_size_is_tried() -> None:
    found = list(forms.problems(["gated_linear"]))
    assert len(found) == len({case.name for _, case in found})
    assert {case.options["decay"] for _, case in found} == {"none", "scalar", "vector"}


def test_a_side_that_does_not_compile_is_left_out() -> None:
    """Forms that run here stand in for tiles; the kernel of an absent device does not compile."""
    dims = {"B": 1, "T": 8, "H": 2, "G": 2, "K": 4, "V": 4}
    sides = {name: (name, None) for name in ("chunked", "pallas_tpu", "reference")}
    found = forms.measured("stickbreaking", Case(dims), sides, 2)
    assert found.keys() == {"chunked", "reference"}
    for costs in found.values():
        assert costs.forward.seconds > 0
        assert costs.both.peak > costs.forward.peak
    assert forms.kinds("stickbreaking")[-1] == forms.SHY


def test_rows_of_other_ops_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    assert tuning.kept(path, ["gated_linear"]) == []
    path.write_text(json.dumps({"rows": [{"op": "gated_linear"}, {"op": "delta_rule"}]}))
    assert tuning.kept(path, ["gated_linear"]) == [{"op": "delta_rule"}]
    path.write_text("[")
    with pytest.raises(UserError, match="is damaged"):
        tuning.kept(path, ["gated_linear"])


def test_unknown_ops_and_devices_are_refused() -> None:
    for device in (tuning.here(1), tuning.Absent(targets.parse("cpu-8").chip, None)):
        with pytest.raises(UserError, match="no op has a kernel for cpu, so there is nothing to"):
            tuning.names(device, [])
    place: Any = Made(1.0)
    with pytest.raises(UserError, match="no op 'sofmax'"):
        tuning.names(place, ["sofmax"])
    with pytest.raises(UserError, match="gated_conv has no kernel for tpu"):
        tuning.names(place, ["gated_conv"])


@pytest.mark.parametrize("arguments", [["--target=cpu-8"], ["--target=cpu-8", "--ops=softmax"]])
def test_a_refused_command_writes_and_reports_nothing(tmp_path: Path, arguments: list[str]) -> None:
    out = tmp_path / "made.json"
    command = [sys.executable, "-m", "launch.tune", *arguments, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, out.exists()) == (2, "", False)
    assert done.stderr.startswith("error: no op has a kernel for cpu")
    assert done.stderr.count("\n") == 1


def test_kernels_that_refuse_every_problem_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a kernel refuses every problem, that is an error, and no file is reported as written."""
    monkeypatch.setattr(tuning, "here", lambda pairs: Made(1.0))
    monkeypatch.setattr(Made, "head", lambda place: {}, raising=False)
    monkeypatch.setattr(forms, "refusal", lambda *problem: "not here")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tune"])
    with pytest.raises(UserError, match="takes any problem on Made 1, so nothing was written"):
        tune.main(["tune"])
