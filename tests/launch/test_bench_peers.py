"""launch.bench --cases=peers: processes of other libraries take turns with ours. A script stands in
for them, and our times are made up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.base import get_config
from launch.benchmarks import forms, peer, peer_process, peers, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError

SIZES = forms.Sizes(widths=(8,), lengths=(16, 32), tokens=64, heads=2, square=16, copied=64)
ACTOR = """
import sys
peer, *sizes, dtype, keys = sys.argv[1:]
log = open(__file__ + ".log", "a", buffering=1)
if peer in ABSENT:
    sys.exit("no module of " + peer)
print("ready made 1.0", flush=True)
for line in sys.stdin:
    print(peer, *sizes, dtype, keys, line.strip(), file=log)
    which, runs = line.split()
    if peer == "delta" and which == "both":
        sys.exit("warning\\nout of memory")
    print(2e-3 * int(runs), flush=True)
"""


def acted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: list[str], chosen: list[str]
) -> Path:
    """The script stands in for the peers `chosen`, except those in `absent`; our kernel
    takes 1 ms.
    """
    script = tmp_path / "actor.py"
    script.write_text(ACTOR.replace("ABSENT", repr(absent)))
    monkeypatch.setattr(peers, "SCRIPT", script)
    monkeypatch.setattr(peers, "OURS", {peer: peers.OURS[peer] for peer in chosen})
    monkeypatch.setattr(forms, "timer", lambda *_: lambda runs: 1e-3 * runs)
    return script


def named(rows: list[Result]) -> dict[str, Result]:
    return {row.name: row for row in rows}


def test_both_passes_of_every_size_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = acted(tmp_path, monkeypatch, [], ["vector", "stickbreaking"])
    rows = named(list(peers.compare(SIZES, 2, sys.executable)))
    fla = [f"T{time}/gated_linear decay=vector-K8/{{}}/over vector" for time in (16, 32)]
    stick = [
        f"T{time}/stickbreaking K8 {keys}/{{}}/over stickbreaking"
        for time in (16, 32)
        for keys in ("random keys", "shy keys")
    ]
    want = [f"peers/{name.format(which)}" for name in fla + stick for which in forms.PASSES]
    assert list(rows) == ["peers/ceiling/TFLOP per s", "peers/ceiling/TB per s", *want]
    for name in want:
        row = rows[name]
        assert row.value == pytest.approx(0.5)
        assert [len(x) for x in row.samples.values()] == [2, 2]
        goals = {"vector": Goal("<=", 1.0), "stickbreaking": Goal("<=", 0.8)}
        assert row.goal == (None if "random" in name else goals[name.split()[-1]])
        assert (row.facts["form"], row.facts["peer"]) == ("chunked", "made 1.0")
        assert min(row.facts["of_ceilings"]["peer"].values()) > 0
    asked = Path(f"{script}.log").read_text().splitlines()
    # Five runs of 1 ms make a sample; each side first has three single runs.
    once = ["forward 1"] * 3 + ["forward 5"] * 2 + ["both 1"] * 3 + ["both 5"] * 2
    assert asked[:10] == [f"vector 4 16 2 8 8 bfloat16  {line}" for line in once]
    assert asked[-10:] == [f"stickbreaking 2 32 2 8 8 bfloat16 shy keys {line}" for line in once]


def test_a_peer_that_is_absent_or_dies_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted(tmp_path, monkeypatch, ["linear"], ["linear", "delta", "gated_delta"])
    rows = list(peers.compare(forms.Sizes((8,), (16,), 16, 2, 16, 64), 1, sys.executable))[2:]
    message = {row.name.split("/over ")[1]: row.facts["refused"] for row in rows[:2]}
    assert message == {"linear/refused": {"peer": "no module of linear"}}
    measured, died, *others = rows[2:]
    assert measured.name == "peers/T16/delta_rule decay=none-K8/forward/over delta"
    assert measured.value == pytest.approx(0.5)
    assert died.name == "peers/T16/delta_rule decay=none-K8/both/over delta/refused"
    assert died.facts["refused"] == {"peer": "out of memory"}
    assert [row.value for row in others] == pytest.approx([0.5, 0.5])
    assert [json.loads(json.dumps(row.to_mapping()))["value"] for row in rows[:2]] == [None] * 2


def test_our_kernel_that_does_not_compile_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted(tmp_path, monkeypatch, [], ["linear"])

    def fails(_: Any, __: Any, which: str, ___: Any) -> timing.Timer:
        if which == "forward":
            raise ValueError("a pass failed\nand much more")
        return lambda runs: 4e-3 * runs

    monkeypatch.setattr(forms, "timer", fails)
    refused, measured = list(
        peers.compare(forms.Sizes((8,), (16,), 16, 2, 16, 64), 1, sys.executable)
    )[2:]
    assert refused.name.endswith("/forward/over linear/refused")
    assert refused.facts["refused"] == {"ours": "a pass failed"}
    assert measured.value == pytest.approx(2.0)


def test_if_no_peer_runs_the_reasons_are_printed_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted(tmp_path, monkeypatch, ["linear", "delta"], ["linear", "delta"])
    with pytest.raises(UserError) as message:
        list(peers.compare(SIZES, 1, sys.executable))
    assert str(message.value).endswith("no peer runs: no module of linear | no module of delta")


def test_a_process_without_output_ends_with_its_status() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with peer.started(command) as process:
        for _ in range(2):
            with pytest.raises(peer.PeerError, match="status 3"):
                process.ask("forward", 1)


def test_the_process_names_a_missing_package() -> None:
    """None of the packages it needs is in this environment."""
    command = [sys.executable, "-S", str(peers.SCRIPT), "vector", *"12345", "bfloat16", ""]
    with (
        peer.started(command) as process,
        pytest.raises(peer.PeerError, match="no module torch; pip install torch"),
    ):
        process.describe()


def test_every_peer_can_be_run() -> None:
    assert set(peers.OURS) == set(peer_process.PEERS)


def test_peers_need_a_gpu() -> None:
    options = Options(base=get_config().to_dict(), pairs=1, precision="bfloat16")
    with pytest.raises(UserError, match="needs an NVIDIA GPU, but JAX's backend is cpu"):
        list(peers.run(options))
