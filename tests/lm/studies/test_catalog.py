"""The catalogue lists what the folders hold. A form is unproven until a proof names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.base import get_config
from kernels import dispatch
from lm.config import UserError
from lm.families import MIXERS, Family
from lm.studies import catalog
from lm.studies.catalog import MixerRow

PROOF = {
    "forms": {
        "softmax/chunked": {"passed": 30, "skipped": 1},
        "softmax/pallas_tpu": {"passed": 2},
    },
    "device": "cpu",
    "cpu": "A processor",
    "commit": "0123456789abcdef",
}


@pytest.mark.slow
def test_every_mixer_has_a_row() -> None:
    mixers = catalog.mixers(get_config().to_dict())
    assert [row.mixer for row in mixers] == list(MIXERS.names())


def test_rows_of_mixers_and_of_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Family.names
    two = lambda family: ("retnet", "softmax") if family is MIXERS else names(family)
    monkeypatch.setattr(Family, "names", two)
    mixers = catalog.mixers(get_config().to_dict())
    assert [row.mixer for row in mixers] == ["retnet", "softmax"]
    softmax = next(row for row in mixers if row.mixer == "softmax")
    assert softmax.parameters == 4 * 256 * 256
    # A token takes k and v of 4 heads of 64 in float32, and a segment id. A row takes its length.
    assert softmax.state == f"4 + {2 * 4 * 64 * 4 + 4:,} T"
    recurrent = next(row for row in mixers if row.mixer == "retnet")
    assert recurrent.state == f"{4 * 64 * 128 * 4 + 4:,}"
    rows = catalog.forms(mixers, [PROOF])
    assert {(row.op, row.form) for row in rows} == {
        (name, form) for name in dispatch.names() for form in dispatch.get(name).forms
    }
    proofs = {(row.op, row.form): row.proof for row in rows}
    assert proofs["softmax", "chunked"] == "30 passed, 1 skipped on A processor at 0123456789"
    assert proofs["softmax", "pallas_tpu"] == "2 passed interpreted on A processor at 0123456789"
    assert proofs["softmax", "reference"] == catalog.UNPROVEN
    chunked = next(row for row in rows if (row.op, row.form) == ("softmax", "chunked"))
    assert chunked.preferred == "cpu 1, gpu 2, tpu 1"
    assert "softmax" in chunked.mixers.split(", ")


def test_an_op_without_mixers_is_listed_too() -> None:
    rows = catalog.forms([MixerRow("one", "softmax", 1, "1", 1.0)], [])
    assert {row.mixers for row in rows if row.op != "softmax"} == {""}


def test_a_damaged_proof_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(PROOF)[:-3])
    with pytest.raises(UserError, match=r"cpu\.json is damaged"):
        catalog.read_proofs(tmp_path)


def test_a_study_is_not_a_configuration_of_a_run() -> None:
    with pytest.raises(UserError, match=r"unknown key config\.patterns"):
        catalog.mixers({"patterns": ("softmax",)})
