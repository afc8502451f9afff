"""A row of a comparison for tests, which set only the fields that matter to them."""

from __future__ import annotations

from typing import Any

from lm.report.compared import Row


def row(name: str, **fields: Any) -> Row:
    """Fields that are not given are 1 or empty."""
    ones: dict[str, Any] = dict.fromkeys(
        ("parameters", "ffn_dim", "num_layers", "seconds", "tokens_per_second", "flops_per_token"),
        1,
    )
    nothing = {"peak_bytes": None, "decode_seconds": {}, "state_bytes": {}, "curve": None}
    return Row(pattern=name, **{**ones, **nothing, "tasks": {}, **fields})
