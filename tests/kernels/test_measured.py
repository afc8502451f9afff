"""What `auto` chooses with a file of measurements."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from kernels import dispatch, measured

KIND = "NVIDIA Test 1"


def row(**changes: Any) -> dict[str, Any]:
    usual = {
        "op": "gated_linear",
        "form": "triton_gpu",
        "options": {"decay": "scalar"},
        "dims": {"T": 2048, "H": 8, "K": 64, "V": 64},
        "dtype": "bfloat16",
        "blocks": {},
        "ratio": {"forward": 0.5, "both": 0.6},
        "peak": {"forward": 1.0, "both": 1.2},
        "wins": True,
    }
    return usual | changes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.table.cache_clear()
    yield tmp_path
    measured.table.cache_clear()


def write(*rows: dict[str, Any]) -> None:
    text = json.dumps({"device_kind": KIND, "evidence": "measured", "rows": rows})
    measured.path(KIND).write_text(text)


def resolve(decay: str = "scalar", width: int = 64, dtype: Any = jnp.bfloat16) -> Any:
    dims = {"B": 2, "T": 4096, "H": 8, "K": width, "V": width}
    return dispatch.resolve(
        "gated_linear",
        "auto",
        target="gpu",
        dims=dims,
        dtype=dtype,
        options={"decay": decay},
        device_kind=KIND,
    )


def test_a_file_is_named_after_its_device(folder: Path) -> None:
    assert measured.path("NVIDIA H100 80GB HBM3") == folder / "nvidia_h100_80gb_hbm3.json"


def test_auto_takes_a_kernel_that_wins() -> None:
    pytest.importorskip("triton", reason="the kernels of gpu need triton")
    assert resolve().form == "chunked"  # nothing is measured yet
    write(row())
    measured.table.cache_clear()
    assert resolve() == ("triton_gpu", f"measured on {KIND} over chunked: forward 0.50, both 0.60")


def test_auto_takes_no_kernel_of_other_problems() -> None:
    write(row())
    assert resolve(decay="none").form == "chunked"
    assert resolve(dtype=jnp.float32).form == "chunked"


def test_the_nearest_row_decides() -> None:
    """The nearest row is found by head width, then by length. A kernel that loses there is not
    taken.
    """
    pytest.importorskip("triton", reason="the kernels of gpu need triton")
    wide = {"T": 2048, "H": 8, "K": 128, "V": 128}
    write(row(), row(dims=wide, wins=False), row(dims={**wide, "K": 64, "V": 64, "T": 64}))
    assert resolve(width=64).form == "triton_gpu"
    assert resolve(width=112).form == "chunked"
    found = measured.find(
        measured.table(KIND),
        "gated_linear",
        "triton_gpu",
        {"K": 64, "V": 64, "T": 100},
        "bfloat16",
        {"decay": "scalar", "scale": 0.1},
    )
    assert found is not None
    assert found.dims["T"] == 64


def test_wins_are_counted() -> None:
    assert dispatch.wins("gated_linear", "triton_gpu") == []
    write(row(), row(wins=False), row(op="delta_rule"))
    measured.table.cache_clear()
    sentences = dispatch.wins("gated_linear", "triton_gpu")
    assert sentences == [f"measured on {KIND}: 1 of 2 problems"]
