"""Training as a user sees it: what a run folder holds, and that a run ends with the same bits after
it was stopped, extended, branched or damaged.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm import metrics
from lm.config import TokenizerConfig, UserError, from_mapping, to_mapping
from lm.data import prepare, tokenizers
from lm.run import checkpoint, formats
from tests.lm import lab as lab_lib
from tests.lm.lab import (
    DECAY_START,
    STEPS,
    Lab,
    assert_equal_runs,
    copy,
    files,
    meta,
    records,
    sources,
)

LONGER = {"run.length": f"{2 * STEPS} steps"}


def refused(lab: Lab, workdir: Path, changes: dict[str, Any] | None = None, **hooks: Any) -> str:
    """The one-line error that the run ends with."""
    with pytest.raises(UserError) as caught:
        lab.run(workdir, changes, **hooks)
    line = str(caught.value)
    assert "\n" not in line
    return line


def send(signum: int, at: int) -> Callable[[int, Any], None]:
    """A hook that sends the process a signal at call number `at`."""

    def hook(call: int, args: Any) -> None:
        if call == at:
            os.kill(os.getpid(), signum)

    return hook


def spoil(at: Callable[[int], bool], weight: float) -> Callable[[int, Any], Any]:
    """A hook that sets the token weights of a batch to +weight and -weight in turn."""

    def hook(call: int, args: Any) -> Any:
        state, batch, *rest = args
        if not at(call):
            return args
        signs = np.resize(np.array([1.0, -1.0], np.float32), batch.loss_weights.shape)
        weights = jax.device_put(weight * signs, batch.loss_weights.sharding)
        return state, batch._replace(loss_weights=weights), *rest

    return hook


def test_a_finished_folder(lab: Lab, tmp_path: Path) -> None:
    """This run is `lab.whole` with samples and a report, which change no other bit."""
    changes = {"log.samples": ("the ", "return")}
    outcome = lab.run(tmp_path, changes, is_page_written=True)
    assert (outcome.step, outcome.finished, outcome.report) == (
        STEPS,
        True,
        tmp_path / "report.html",
    )
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        *(".lock", "config.json", "run.json", "params.txt", "tokenizer.json", "metrics.jsonl"),
        *(
            "samples.jsonl",
            "report.html",
            "report_figures",
            "tensorboard",
            "checkpoints",
            ".made_by",
        ),
    }
    written = json.loads((tmp_path / "config.json").read_text())
    assert formats.read(written, "config.json") == lab.config(changes)
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["run_tokens"] == STEPS * 4 * 32
    assert [layer["form"] for layer in about["layers"]] == ["chunked"] * 2
    assert about["parameters"]["total"] == sum(
        x for k, x in about["parameters"].items() if k != "total"
    )
    assert about["flops_per_token"] > 6 * about["parameters"]["hidden"]
    assert len(about["data"]["sources"]["text"]["tokens_sha256"]) == 64
    assert about["data"]["validation"].keys() == {"text", "held"}
    assert about["data"]["left_out"] == {}
    assert f"{about['parameters']['total']:,}" in (tmp_path / "params.txt").read_text()
    assert checkpoint.steps(tmp_path) == [3, 6, 9, 12]
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == outcome.samples
    assert [(x["kind"], x["prompt"]) for x in lines] == [
        (kind, prompt) for kind in ("greedy", "sampled") for prompt in ("the ", "return")
    ]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert_equal_runs(tmp_path, lab.whole)


def test_records_of_a_run(lab: Lab) -> None:
    lines = metrics.read(lab.whole)
    assert [(line["step"], line["tokens"]) for line in lines] == [
        (n, n * 4 * 32) for n in range(1, STEPS + 1)
    ]
    evaluated = [line["step"] for line in lines if "eval/text/bpb" in line]
    assert evaluated == [line["step"] for line in lines if "eval/held/loss" in line] == [6, 12]
    for line in lines:
        assert {"train/loss", "train/bpb", "optim/grad_norm", "lr/hidden"} <= line.keys()
        assert line["optim/skipped_total"] == 0
    assert lines[-1]["eval/text/bpb"] < lines[5]["eval/text/bpb"] < lines[0]["train/bpb"]
    assert lines[3]["time/tokens_per_second"] > 0
    assert any((lab.whole / "tensorboard").iterdir())


def test_every_step_takes_time(lab: Lab, tmp_path: Path) -> None:
    """Every record but the first has a time, however often the run evaluates and saves."""
    often = {"checkpoint.every": "2 steps", "evaluate.every": "1 steps", "evaluate.max_tokens": 64}
    lab.run(tmp_path, often)
    seconds = [line.get("time/step_seconds") for line in metrics.read(tmp_path)]
    assert seconds[0] is None
    assert None not in seconds[1:]
    seconds = [line.get("time/step_seconds") for line in metrics.read(lab.whole)]
    # The host waits at a save, so steps 5 and 6, 8 and 9, ... are timed together.
    assert seconds[4::3] == seconds[5::3]


def test_resume_after_the_end_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    workdir = copy(lab.whole, tmp_path / "run")
    before = files(workdir)
    outcome = lab.run(workdir)
    assert (outcome.step, outcome.finished) == (STEPS, True)
    assert outcome.evaluation.keys() == {"text", "held"}
    after = files(workdir)
    about = [json.loads(x.pop("run.json")) for x in (before, after)]
    own = {"started": "", "sha256": ""}
    assert about[0] | own == about[1] | own
    lock = before.pop(".lock"), after.pop(".lock")
    assert lock[0] == lock[1], "one process ran both"
    new = after.keys() - before.keys()
    assert all(name.startswith("tensorboard") for name in new)
    assert {name: after[name] for name in before} == before


def test_planned_for_twice_the_length(lab: Lab, tmp_path: Path) -> None:
    """Both runs agree in every bit until the shorter one decays. There it can be lengthened."""
    assert meta(lab.whole, DECAY_START) == meta(lab.longer, DECAY_START)
    assert records(lab.whole)[:DECAY_START] == records(lab.longer)[:DECAY_START]
    assert meta(lab.whole, STEPS).digest != meta(lab.longer, STEPS).digest
    workdir = copy(lab.whole, tmp_path / "run", last=DECAY_START)
    assert lab.run(workdir, LONGER).step == 2 * STEPS
    assert_equal_runs(workdir, lab.longer)
    assert json.loads((workdir / "config.json").read_text())["run"]["length"] == "24 steps"


def test_a_shorter_length_than_was_trained_is_refused(lab: Lab, tmp_path: Path) -> None:
    workdir = copy(lab.whole, tmp_path / "run")
    line = refused(lab, workdir, {"run.length": "10 steps"})
    assert "run.length ends at step 10" in line
    assert "is at step 12 already" in line
    assert records(workdir) == records(lab.whole)


@pytest.mark.parametrize(
    ("signum", "at"), [(signal.SIGTERM, 4), (signal.SIGINT, 9), (signal.SIGHUP, 10)]
)
def test_a_signal_saves_and_stops(lab: Lab, tmp_path: Path, signum: int, at: int) -> None:
    taken = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = [signal.getsignal(s) for s in taken]
    outcome = lab.run(tmp_path, step=send(signum, at))
    assert (outcome.step, outcome.finished, outcome.samples) == (at + 1, False, [])
    assert checkpoint.steps(tmp_path)[-1] == at + 1
    assert [signal.getsignal(s) for s in taken] == handlers
    assert lab.run(tmp_path).finished
    assert_equal_runs(tmp_path, lab.whole)


# Two sets have two batches each: calls 0 to 3 of `score` are the first evaluation, 4 to 7 the last.
@pytest.mark.parametrize(("at", "stopped"), [(0, 6), (2, 6), (4, 12), (7, 12)])
def test_a_signal_during_an_evaluation(lab: Lab, tmp_path: Path, at: int, stopped: int) -> None:
    outcome = lab.run(tmp_path, score=send(signal.SIGTERM, at))
    assert (outcome.step, outcome.finished) == (stopped, False)
    assert lab.run(tmp_path).finished
    assert_equal_runs(tmp_path, lab.whole)


def test_a_record_every_five_steps(lab: Lab, tmp_path: Path) -> None:
    """An evaluated step is recorded too, even if a signal cuts its evaluation short."""
    changes = {"log.every": "5 steps", "evaluate.every": "1 steps", "checkpoint.every": "5 steps"}
    lab.run(tmp_path / "all", changes)
    assert [x["step"] for x in records(tmp_path / "all")] == list(range(1, STEPS + 1))
    assert not lab.run(tmp_path / "cut", changes, score=send(signal.SIGTERM, 9)).finished
    lab.run(tmp_path / "cut", changes)
    assert_equal_runs(tmp_path / "cut", tmp_path / "all")
    lab.run(tmp_path / "few", {"log.every": "5 steps"})
    assert [x["step"] for x in records(tmp_path / "few")] == [5, 6, 10, 12]


def test_durations_in_any_unit(lab: Lab, tmp_path: Path) -> None:
    """The run of `lab.whole`. A length in tokens is rounded up to whole steps."""
    changes = {
        "run.length": "1500 tokens",
        "evaluate.every": "50 percent",
        "checkpoint.every": "384 tokens",
    }
    lab.run(tmp_path, changes)
    assert checkpoint.steps(tmp_path) == [3, 6, 9, 12]
    assert_equal_runs(tmp_path, lab.whole)


def test_evaluations_keep_to_their_share(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A short run has time for the last evaluation only, also if it was stopped and resumed."""
    changes = {"evaluate.every": "50 percent", "evaluate.share": 0.05}
    lab.run(tmp_path / "all", changes)
    found = metrics.read(tmp_path / "all")
    assert [x["step"] for x in found if "eval/text/bpb" in x] == [STEPS]
    assert "set evaluate.share=0 for all of them" in caplog.text
    assert not lab.run(tmp_path / "cut", changes, step=send(signal.SIGTERM, 7)).finished
    lab.run(tmp_path / "cut", changes)
    assert_equal_runs(tmp_path / "cut", tmp_path / "all")


def test_a_run_without_validation_sets(lab: Lab, tmp_path: Path) -> None:
    """It trains. A task that needs a validation set is refused before the first step."""
    text = sources(lab.root / "corpus")["text"] | {"valid_fraction": 0.0}
    changes: dict[str, Any] = {"data.sources": {"text": text}}
    outcome = lab.run(tmp_path / "plain", changes)
    assert (outcome.finished, outcome.evaluation) == (True, {})
    changes |= {"evaluate.tasks": {"position": {}}}
    with pytest.raises(UserError, match="task position: no source of data has a valid_fraction"):
        lab.run(tmp_path / "asked", changes)
    assert not records(tmp_path / "asked")


def test_keep_last_and_keep_every(lab: Lab, tmp_path: Path) -> None:
    changes = {
        "checkpoint.every": "2 steps",
        "checkpoint.keep_last": 2,
        "checkpoint.keep_every": "4 steps",
    }
    lab.run(tmp_path, changes)
    assert checkpoint.steps(tmp_path) == [4, 8, DECAY_START, 10, 12]


def decay_from(path: Path) -> dict[str, Any]:
    return LONGER | {"decay_from": str(path)}


def test_a_decay_branches_from_a_trunk(lab: Lab, tmp_path: Path) -> None:
    """A branch equals the run that was planned to decay there. Once the branch has saved, its trunk
    may be deleted.
    """
    trunk = copy(lab.longer, tmp_path / "trunk", last=DECAY_START)
    changes = decay_from(trunk)
    stopped = lab.run(tmp_path / "branch", changes, step=send(signal.SIGTERM, 0))
    assert (stopped.step, stopped.finished) == (DECAY_START + 1, False)
    shutil.rmtree(trunk)
    outcome = lab.run(tmp_path / "branch", changes)
    assert (outcome.step, outcome.finished) == (STEPS, True)
    whole = meta(lab.whole)
    assert meta(tmp_path / "branch") == whole._replace(decay_start=DECAY_START * 4 * 32.0)
    assert records(tmp_path / "branch") == records(lab.whole)[DECAY_START:]
    loaded = checkpoint.load(tmp_path / "branch")
    assert loaded.build.schedule.phases.decay_start == DECAY_START * 4 * 32


def test_a_decay_from_one_checkpoint_of_many(lab: Lab, tmp_path: Path) -> None:
    """A branch that died before its first save starts again from the trunk."""
    path = lab.longer / "checkpoints" / str(DECAY_START)
    lab.run(tmp_path, decay_from(path))
    shutil.rmtree(tmp_path / "checkpoints")
    assert lab.run(tmp_path, decay_from(path)).step == STEPS
    assert meta(tmp_path).digest == meta(lab.whole).digest


def test_init_from_takes_only_the_weights(lab: Lab, tmp_path: Path) -> None:
    first: list[Any] = []

    def hook(call: int, args: Any) -> None:
        if call == 0:
            first.append(jax.device_get(args[0]))
            os.kill(os.getpid(), signal.SIGTERM)

    lab.run(tmp_path, {"init_from": str(lab.whole), "seed": 5}, step=hook)
    params = jax.device_get(checkpoint.load(lab.whole).params)
    jax.tree.map(np.testing.assert_array_equal, first[0].params, params)
    assert first[0].step == 0
    assert all(not np.any(x) for x in jax.tree.leaves(first[0].opt_state))
    assert records(tmp_path)[0]["tokens"] == 4 * 32


def test_origins_that_do_not_fit(lab: Lab, tmp_path: Path) -> None:
    line = refused(lab, tmp_path / "a", {"init_from": str(lab.whole), "model.width": 64})
    assert "has embed/table [384, 32], the model of this config has [384, 64]" in line
    assert "set config.model to the checkpoint's" in line
    line = refused(lab, tmp_path / "b", {"init_from": str(tmp_path / "absent")})
    assert "is neither a run with checkpoints nor a checkpoint" in line
    trunk = lab.longer / "checkpoints" / str(DECAY_START)
    line = refused(lab, tmp_path / "c", decay_from(trunk) | {"data.batch_size": 8})
    assert "batch_size was 4, is 8" in line
    assert not list(tmp_path.iterdir())  # a refused run leaves no folder
    (tmp_path / "mine").mkdir()
    refused(lab, tmp_path / "mine", {"init_from": str(lab.whole), "model.width": 64})
    assert (tmp_path / "mine").is_dir()


def test_another_tokenizer_is_refused(lab: Lab, tmp_path: Path) -> None:
    other = tokenizers.create(
        TokenizerConfig(
            kind="bpe", path="", vocab_size=257, pattern="gpt2", end_of_text="", bos=""
        ),
        ["a b c"],
    )
    workdir = copy(lab.whole, tmp_path / "run")
    other.save(workdir / "tokenizer.json")
    assert "tokenizer.json has sha256" in refused(lab, workdir)
    line = refused(lab, tmp_path / "new", {"init_from": str(workdir)})
    assert "another tokenizer (kind tokenizers" in line
    assert "data.tokenizer.kind='bytes'" in line
    (workdir / "tokenizer.json").write_text("{")
    assert "is not a saved tokenizer" in refused(lab, workdir)


def test_a_bad_step_is_skipped_and_counted(lab: Lab, tmp_path: Path) -> None:
    """Bad are a loss that is NaN, and a gradient far above the running mean, once there is one."""
    lab.run(tmp_path, LONGER, step=spoil(lambda call: call == 4, np.nan))
    lines = records(tmp_path)
    assert [x["optim/skipped_total"] for x in lines] == [0] * 4 + [1] * 20
    assert np.isnan(lines[4]["train/loss"])
    assert lines[4]["update_norm/hidden"] == 0.0
    assert lines[4]["param_norm/hidden"] == lines[3]["param_norm/hidden"]
    assert np.isfinite(lines[-1]["train/loss"])

    lab.run(tmp_path / "spike", LONGER, step=spoil(lambda call: call == 22, 1e5))
    lines = records(tmp_path / "spike")
    assert [x["optim/skipped_total"] for x in lines[20:]] == [0, 0, 1, 1]
    assert lines[22]["optim/grad_norm"] > 20 * lines[21]["optim/grad_norm"]
    assert lines[22]["update_norm/hidden"] == 0.0


def test_too_many_bad_steps_stop_the_run(lab: Lab, tmp_path: Path) -> None:
    changes = {"optimizer.max_skipped": 3}
    line = refused(lab, tmp_path, changes, step=spoil(lambda call: call >= 6, np.nan))
    assert line.startswith("stopped at step 9: optimizer.max_skipped=3 steps in a row")
    assert "lower schedule.peak_learning_rate" in line
    assert [x["step"] for x in records(tmp_path)] == list(range(1, 10))
    lab.run(tmp_path, changes)
    assert meta(tmp_path) == meta(lab.whole), "what was saved before is sound"


def test_damaged_data_are_refused_in_one_line(lab: Lab, tmp_path: Path) -> None:
    """A new run reads all data once. A resumed one checks only their size."""
    data = tmp_path / "data"
    prepare.prepare(lab.config().data, data, progress=False)
    (path,) = data.glob("text-*/train/tokens.bin")
    tokens = bytearray(path.read_bytes())
    tokens[100] ^= 1
    path.write_bytes(tokens)
    line = refused(lab, tmp_path / "run", data_dir=data)
    assert "train/tokens.bin: digest of bytes" in line
    path.write_bytes(tokens[:-2])
    workdir = copy(lab.whole, tmp_path / "old", last=DECAY_START)
    assert "size in bytes" in refused(lab, workdir, data_dir=data)
    assert "prepare again" in line
    assert not (tmp_path / "run" / "run.json").exists()
    missing = {"data.sources": {"a": lab_lib.sources(tmp_path / "absent")["text"]}}
    assert "matches no file" in refused(lab, tmp_path / "run", missing)


def test_a_profile(lab: Lab, tmp_path: Path) -> None:
    """Even if fewer steps are left than a profile usually waits for."""
    workdir = copy(lab.whole, tmp_path / "run", last=DECAY_START)
    lab.run(workdir, profile_steps=2)
    assert any(p.stat().st_size > 1000 for p in (workdir / "profile").rglob("*.xplane.pb"))
    assert_equal_runs(workdir, lab.whole)


def test_configurations_round_trip(lab: Lab) -> None:
    config = lab.config({"schedule.warmup": "0.123456789012 percent"})
    assert from_mapping(json.loads(json.dumps(to_mapping(config)))) == config
