"""launch.bench --cases=kernels: what is compared with what, keys that stop nothing, and how to time
runs that take less time than their launch. On a CPU a chunked form stands in for the kernel.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.base import get_config
from kernels import dispatch
from launch.benchmarks import forms, kernels, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal
from lm.config import UserError

TINY = forms.Sizes(widths=(8,), lengths=(16,), tokens=32, heads=2, square=16, copied=64)
OPTIONS = Options(base=get_config().to_dict(), pairs=2, precision="bfloat16")


@pytest.mark.parametrize("width", forms.SIZES.widths)
def test_shy_keys_stop_nothing(width: int) -> None:
    """The bias gets what is left of the stick. Bits add up along keys, so 32,768 keys take sixteen
    times as many as 2,048. Random keys leave less than float32 can hold.
    """
    time = forms.DRAWN
    sizes = forms.Sizes(widths=(width,), lengths=(time,), tokens=time, heads=1)
    left: dict[str, np.ndarray] = {}
    for problem in forms.timed([("stickbreaking", {})], sizes):
        inputs, _ = forms.drawn(problem)
        inputs |= {"v": jnp.zeros_like(inputs["v"]), "remainder_bias": jnp.ones((1, width))}
        given: Any = {"form": "reference", "options": {"remainder": "bias"}}
        left[problem.keys] = np.asarray(dispatch.apply("stickbreaking", inputs, **given)[0])
    bits = -math.log2(left["shy keys"].astype(np.float32).min())
    assert 1 < bits < 150 * time / max(forms.SIZES.lengths)
    assert left["random keys"][:, 1024:].max() == 0


def test_a_row_is_drawn_once() -> None:
    sizes = forms.Sizes(widths=(4,), lengths=(4096,), tokens=8192, heads=1)
    (problem,) = forms.timed([("delta_rule", {"decay": "scalar"})], sizes)
    inputs, cotangent = forms.drawn(problem)
    assert {name: x.shape for name, x in inputs.items()} == {
        **dict.fromkeys("qkv", (2, 4096, 1, 4)),
        **dict.fromkeys(("beta", "log_decay"), (2, 4096, 1)),
    }
    assert np.array_equal(inputs["q"][0, :2048], inputs["q"][1, 2048:])
    assert cotangent.shape == (2, 4096, 1, 4)


def test_a_timer_runs_what_it_compiled() -> None:
    (problem,) = forms.timed([("gated_linear", {"decay": "none"})], TINY)
    assert forms.timer(problem, "chunked", "both", forms.drawn(problem))(2) > 0


def test_samples_have_the_same_number_of_runs_on_both_sides() -> None:
    asked: list[tuple[str, int]] = []

    def timer(name: str, seconds: float) -> timing.Timer:
        return lambda runs: asked.append((name, runs)) or runs * seconds

    samples = timing.take_turns({"a": timer("a", 2e-3), "b": timer("b", 8e-3)}, 2)
    warm = [("a", 1), ("b", 1)] * 2
    assert asked == [*warm, ("a", 3), ("b", 3), ("b", 3), ("a", 3)]
    assert samples == {"a": pytest.approx([2e-3] * 2), "b": pytest.approx([8e-3] * 2)}


def test_rows_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have goals where keys stop nothing, fractions of the ceilings everywhere, and a reason
    where softmax cannot run.
    """
    played = ("stickbreaking", "gated_linear", "softmax")
    monkeypatch.setattr(forms, "kernel", lambda name, _: "chunked" if name in played else None)

    def timer(problem: forms.Timed, form: str, which: str, inputs: Any) -> timing.Timer:
        assert set(inputs[0]) >= {"q", "k", "v"}
        if (problem.op, which) == ("softmax", "both"):
            raise RuntimeError("no engine\nand much more")
        return lambda runs: runs * (3e-3 if problem.op == "stickbreaking" else 1e-3)

    monkeypatch.setattr(forms, "timer", timer)
    rows = {row.name: row for row in kernels.run(OPTIONS, TINY)}
    linear = [f"gated_linear decay={decay}-K8" for decay in ("none", "scalar", "vector")]
    assert list(rows)[:2] == ["kernels/ceiling/TFLOP per s", "kernels/ceiling/TB per s"]
    assert list(rows)[2:8] == [
        f"kernels/T16/{name}/{which}/over chunked" for name in linear for which in forms.PASSES
    ]
    for keys, goal in (("random keys", None), ("shy keys", Goal("<=", 2.0))):
        title = f"kernels/T16/stickbreaking K8 {keys}"
        beside = rows[f"{title}/forward/over softmax"]
        assert (beside.value, beside.goal) == (pytest.approx(3.0), goal)
        assert min(beside.facts["of_ceilings"].values()) > 0
        assert rows[f"{title}/both/over chunked"].goal is None
        refused = rows[f"{title}/both/over softmax/refused"]
        assert refused.facts["refused"] == {"softmax": "no engine"}
        assert refused.goal is None
    assert len(rows) == 2 + 6 + 2 * 4


def test_a_refusal_is_null_in_a_file_and_explained_in_the_table() -> None:
    result = timing.refused("n", refused={"kernel": "too wide"})
    text = json.dumps(result.to_mapping(), allow_nan=False)
    assert json.loads(text)["value"] is None
    page = io.StringIO()
    Console(file=page, width=60).print(timing.table([result]))
    lines = page.getvalue().splitlines()
    assert lines[1].split() == ["n/refused", "refused"]
    assert lines[2].split(":")[1].strip() == "too wide"


def test_kernels_need_a_device() -> None:
    with pytest.raises(UserError, match="needs a GPU or a TPU, but JAX's backend is cpu"):
        list(kernels.run(OPTIONS))


@pytest.mark.gpu
def test_every_kernel_of_a_gpu_is_timed() -> None:
    sizes = forms.Sizes((64, 128), (256,), tokens=512, heads=2, square=256, copied=1 << 20)
    rows = list(kernels.run(OPTIONS, sizes))
    assert not [row.facts["refused"] for row in rows if math.isnan(row.value)]
    timed = [row.facts["forms"] for row in rows[2:]]
    assert {form["kernel"] for form in timed} == {"triton_gpu"}
    assert {form["softmax"] for form in timed if "softmax" in form} == {"jax_nn"}
