"""The study of mixers: equal sizes, nothing trained twice, mistakes before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.base import get_config
from lm import train
from lm.config import UserError
from lm.studies import compare
from lm.studies.compare import Study
from tests.lm import tiny

SMALL = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "ffn_dim": 640,
}


def values(**changes: Any) -> dict[str, Any]:
    run: Any = get_config().to_dict()
    run["model"] |= SMALL
    run["data"] |= {"context_length": 32, "batch_size": 8}
    run["data"]["tokenizer"] |= {"kind": "bytes", "vocab_size": tiny.VOCAB}
    run["schedule"]["warmup"] = "0 steps"
    run["run"]["length"] = "2 steps"
    run["evaluate"]["max_tokens"] = 128
    run["log"]["samples"] = ()
    study = {"run": run, "patterns": ("softmax", "retnet"), "seeds": (0, 1), "timing_rounds": 1}
    return study | changes


def test_sizes_are_made_equal_by_the_feed_forward_width() -> None:
    study = compare.create(values(patterns=("softmax", "retnet", "gla", "softmax,gated_deltanet")))
    widths = compare.equal_widths(study)
    assert widths["softmax"] == 640
    sizes = {}
    for pattern, width in widths.items():
        assert width % compare.GRAIN == 0
        sizes[pattern] = compare.parameters(compare.build(study, pattern, width))
    target = sizes["softmax"]
    assert target == 2 * (4 * 32 * 32 + 3 * 32 * 640 + 2 * 32) + 32
    assert all(abs(size - target) <= 0.01 * target for size in sizes.values()), sizes


def test_a_mixer_too_large_is_told_before_training(tmp_path: Path) -> None:
    mapping = values()
    mapping["run"]["model"]["ffn_dim"] = 8
    with pytest.raises(UserError, match=r"'retnet' has .* set a larger run\.model\.ffn_dim"):
        compare.run(compare.create(mapping), tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": ()}, r"config\.patterns is empty"),
        ({"seeds": ()}, r"config\.seeds is empty"),
        ({"seed": (1,)}, "seed"),
        ({"patterns": ("softmax", "retnett")}, "did you mean 'retnet'"),
        ({"timing_rounds": 0}, "timing_rounds=0"),
    ],
)
def test_mistakes_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compare.create(values(**changes))
    assert "\n" not in str(caught.value)


def test_runs_are_trained_once_and_put_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for training and timing: what is tested is what is asked of them."""
    asked: list[str] = []

    def pretend(config: Any, options: train.Options) -> train.Outcome:
        asked.append(options.workdir.name)
        folder = options.workdir
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("")
        (folder / "config.json").write_text(json.dumps(compare.to_mapping(config)))
        record = {"step": 2, "tokens": 128, "eval/stdlib/bpb": 2.0 + config.seed}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return train.Outcome(config.run_steps, True, {}, [], folder / "report.html")

    monkeypatch.setattr(train, "run", pretend)
    monkeypatch.setattr(compare, "time_steps", lambda builds, _: dict.fromkeys(builds, 0.5))
    monkeypatch.setattr(compare, "is_finished", lambda folder, _: (folder / "report.html").exists())
    study: Study = compare.create(values())
    rows = compare.run(study, tmp_path, tmp_path)
    assert asked == ["softmax-0", "retnet-0", "softmax-1", "retnet-1"]
    assert rows is not None
    assert [row.pattern for row in rows] == ["softmax", "retnet"]
    assert rows[0].bits == [2.0, 3.0]
    assert rows[0].tokens_per_second == 512
    # Two layers of k and v, segment ids and a length; and the model's next position.
    assert rows[0].state_bytes == 2 * (32 * (2 * 32 * 4 + 4) + 4) + 4
    again = compare.run(study, tmp_path, tmp_path)
    assert again == rows
    assert len(asked) == 4, "nothing is trained twice"
    compare.write(rows, {"commit": "0"}, tmp_path)
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert np.allclose([row["bits"] for row in saved["rows"]], [[2, 3], [2, 3]])
    assert "| softmax | 2.5000 | 2.0000, 3.0000 |" in (tmp_path / "compare.md").read_text()
