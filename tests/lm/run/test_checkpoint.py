"""Checkpoints are exact on any mesh; damage of any kind is detected, named and survived."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lm
from lm.config import UserError
from lm.data import prepare
from lm.evals import Given
from lm.evals.bits_per_byte import BitsPerByte
from lm.evaluation import evaluate
from lm.evaluation.scoring import Scorer
from lm.run import checkpoint
from lm.run.checkpoint import DamagedError
from lm.run.digest import digest
from lm.run.items import Meta
from lm.run.saver import Checkpointer
from lm.state import TrainState, count
from tests.lm import tiny
from tests.lm.lab import DECAY_START, STEPS, Lab, assert_equal_runs, copy, files, meta, records

IDENTITY = {"identity": {"seed": 0}}


def stored(folder: Path, step: int = STEPS) -> Path:
    return folder / checkpoint.FOLDER / str(step)


def largest(folder: Path) -> Path:
    """The file that holds the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    """Changes one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(item: Path, old: str, new: str) -> None:
    """Replaces a value by another valid one."""
    text = (item / "metadata").read_text()
    assert old in text
    (item / "metadata").write_text(text.replace(old, new, 1))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a truncated array file": lambda path: truncate(largest(path / "state")),
    "a flipped bit": lambda path: flip(largest(path / "state")),
    "no meta": lambda path: shutil.rmtree(path / "meta"),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "an empty file": lambda path: (path / "meta" / "metadata").write_text(""),
    "an empty object": lambda path: (path / "loader" / "metadata").write_text("{}"),
    "a flipped bit of the loader": lambda path: flip(path / "loader" / "metadata"),
    "another seed": lambda path: edited(path / "config", '"seed": 0', '"seed": 1'),
    "another step": lambda path: edited(path / "meta", '"tokens": 1536', '"tokens": 1537'),
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(d, marks=[pytest.mark.slow] if i in (1, 3, 5, 9) else [])
        for i, d in enumerate(DAMAGES)
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    lab: Lab, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = copy(lab.whole, tmp_path / "run")
    DAMAGES[damage](stored(workdir))
    with caplog.at_level(logging.WARNING):
        assert lab.run(workdir).finished
    (line,) = [r.getMessage() for r in caplog.records if r.name == "lm.run.saver"]
    assert line.startswith(f"checkpoint {stored(workdir)} is damaged: ")
    assert line.endswith(f"moved to {workdir}/damaged/{STEPS}, going on from step {DECAY_START}")
    assert "\n" not in line
    assert (workdir / "damaged" / str(STEPS)).is_dir()
    assert_equal_runs(workdir, lab.whole)


def test_a_run_stops_if_all_checkpoints_are_damaged(lab: Lab, tmp_path: Path) -> None:
    """The error is one line and nothing is lost: the next launch says the same and does not start a
    new run.
    """
    workdir = copy(lab.whole, tmp_path / "run")
    for step in checkpoint.steps(workdir):
        flip(largest(stored(workdir, step) / "state"))
    before = files(workdir)
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint is damaged, the newest") as caught:
            lab.run(workdir)
        assert "\n" not in str(caught.value)
    assert files(workdir) == before


def created(changes: dict[str, Any] | None = None, devices: int = 1) -> tuple[Any, TrainState]:
    built = tiny.create(changes, devices)
    return built, tiny.state(built)


def at(state: TrainState, step: int) -> TrainState:
    """The state with its counters set to `step` steps of 96 tokens in 4 rows."""
    words = {"step": np.int32(step), "tokens": count(96 * step), "rows": count(4 * step)}
    placed = {k: jax.device_put(x, getattr(state, k).sharding) for k, x in words.items()}
    return state._replace(**placed)


def save(workdir: Path, built: Any, state: TrainState, step: int) -> None:
    with Checkpointer(workdir, built.config, built.keeps) as saver:
        saver.save(
            at(state, step), {"next_step": step} | IDENTITY, Meta(step, 96 * step, None, {}, {})
        )
        saver.wait()


def test_a_saved_state_is_restored(tmp_path: Path) -> None:
    built, state = created()
    save(tmp_path, built, state, 3)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()  # a killed process leaves it
    with Checkpointer(tmp_path, built.config, built.keeps) as saver:
        assert not (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").exists()
        assert saver.latest == 3
        restored = saver.restore_latest(built.abstract_state)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, at(state, 3))
    assert (restored.meta.step, restored.meta.tokens) == (3, 288)
    assert restored.loader == {"next_step": 3} | IDENTITY
    assert checkpoint.read_config(tmp_path / "checkpoints" / "3") == built.config
    with Checkpointer(tmp_path / "empty", built.config, built.keeps) as saver:
        assert saver.restore_latest(built.abstract_state) is None


FOUR_DEVICES = """
import sys
from pathlib import Path
import numpy as np
from tests.lm import tiny
from tests.lm.run.test_checkpoint import created, save
built, state = created({"mesh.data": 2, "mesh.fsdp": 2}, devices=4)
assert not state.params["embed"]["table"].sharding.is_fully_replicated
save(Path(sys.argv[1]), built, state, 3)
"""


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_is_restored_on_one(tmp_path: Path) -> None:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-c", FOUR_DEVICES, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3], env=env)
    alone, state = created()
    restored = checkpoint.restore(tmp_path / "checkpoints" / "3", alone.abstract_state).state
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    assert restored.params["embed"]["table"].sharding.device_set == {jax.devices()[0]}


def test_moments_in_host_memory_are_restored_anywhere(tmp_path: Path) -> None:
    """They are saved from host memory and restored to it, and to a run that keeps them on its
    device.
    """
    built, state = created({"optimizer.memory": "host", "mesh.data": 2, "mesh.zero1": True}, 2)
    save(tmp_path, built, state, 3)
    alone, _ = created()
    for target, memory in ((built, "pinned_host"), (alone, "device")):
        found = checkpoint.restore(tmp_path / "checkpoints" / "3", target.abstract_state).state
        jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
        moments = [x for x in jax.tree.leaves(found.opt_state) if x.ndim]
        assert {x.sharding.memory_kind for x in moments} == {memory}


def test_digest() -> None:
    """The digest depends on every bit and on every place."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal(100).astype(np.float32)

    def of(x: np.ndarray) -> dict[str, int]:
        return digest({"a": x, "b": np.int32(3)})

    base = of(array)
    assert base.keys() == {"a", "b"}
    swapped = array.copy()
    swapped[[3, 50]] = swapped[[50, 3]]
    assert of(swapped)["a"] != base["a"]
    for bit in range(32):
        bits = array.copy().view(np.uint32)
        bits[bit * 3] ^= np.uint32(1 << bit)
        assert of(bits.view(np.float32))["a"] != base["a"]
    assert of(array.copy()) == base


def test_locate(lab: Lab, tmp_path: Path) -> None:
    newest = lab.whole / "checkpoints" / "12"
    assert checkpoint.locate(lab.whole) == newest
    assert checkpoint.locate(lab.whole / "checkpoints") == newest
    assert checkpoint.locate(newest.with_name("3")) == newest.with_name("3")
    assert checkpoint.steps(lab.whole) == [3, 6, 9, 12]
    assert checkpoint.steps(tmp_path) == []
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="give WORKDIR or WORKDIR/checkpoints/STEP"):
            checkpoint.locate(path)
    with pytest.raises(
        UserError, match=r"/5 is not a checkpoint; .* has those of steps 3, 6, 9, 12"
    ):
        checkpoint.locate(newest.with_name("5"))


def test_a_notebook_loads_a_run(lab: Lab) -> None:
    """The model scores what training recorded, and the tokenizer decodes what it encodes."""
    loaded = lm.load(lab.whole)
    assert (loaded.step, loaded.config) == (STEPS, lab.config())
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("naïve")) == "naïve"
    prepared = prepare.prepare(loaded.config.data, lab.root / "data", progress=False)
    given = Given(loaded.tokenizer, prepared, loaded.config.data, 256)
    questions = evaluate.prepare({"": BitsPerByte()}, given)
    built = dataclasses.replace(loaded.build, score=next(iter(lab.builds.values())).score)
    numbers = evaluate.run(questions, Scorer(built, loaded.params))[""].numbers
    for name in ("text", "held"):
        assert numbers[f"bpb/{name}"].value == records(lab.whole)[-1][f"eval/{name}/bpb"]
    hidden, _ = loaded.model.apply(
        {"params": loaded.params}, *(np.ones((1, 3), np.int32) for _ in range(3))
    )
    assert hidden.shape == (1, 3, 32)
    assert lm.load(str(lab.whole / "checkpoints" / "3")).step == 3


def test_a_run_is_loaded_with_other_options(lab: Lab) -> None:
    """LM-Infinite on a plain RoPE model changes nothing within the window, and the
    function beyond.
    """
    tokens, ones = np.arange(30, dtype=np.int32)[None], np.ones((1, 30), np.int32)
    hidden = {}
    for window in (0, 30, 8):
        reach = {"window": window, "global_tokens": 2, "distance_ceiling": window}
        loaded = lm.load(lab.whole, {"softmax": reach} if window else None)
        run = tiny.jit(loaded.model.apply)
        hidden[window] = run({"params": loaded.params}, tokens, ones, np.cumsum(ones, axis=1) - 1)[
            0
        ]
    assert loaded.config.model.layers == {"softmax": reach}
    np.testing.assert_allclose(hidden[30], hidden[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden[8][:, :8], hidden[0][:, :8], rtol=1e-4, atol=1e-5)
    assert np.abs(hidden[8] - hidden[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"softmx": {"window": 8}}, "no layer of the model is labelled 'softmx'.*'softmax'"),
        ({"softmax": {"windw": 8}}, "unknown option model.layers.softmax.windw.*'window'"),
        ({"softmax": {"window": "wide"}}, "model.layers.softmax.window"),
        ({"softmax": {"global_tokens": 2}}, "global_tokens=2 needs a window"),
        ({"softmax": {"mixer": "stickbreaking"}}, "softmax.mixer is not an option of a mixer"),
        ({"softmax": {"sink": True}}, "mixer/sink not at all.*change only options without"),
        ({"softmax": {"num_kv_heads": 1}}, "mixer/key/kernel .*change only options without"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_a_run_are_refused(lab: Lab, layers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lm.load(lab.whole, layers)


def test_importing_lm_starts_nothing() -> None:
    code = "import sys, lm; assert lm.load and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(lab: Lab, small_disk: Path) -> None:
    """The error is one line. What was saved before is whole, partial files are deleted, and the run
    goes on when there is space.
    """
    workdir = small_disk / "run"
    with pytest.raises(UserError) as caught:
        lab.run(workdir, {"checkpoint.every": "1 steps"})
    line = str(caught.value)
    assert line.startswith(f"cannot save a checkpoint in {workdir}/checkpoints: No space left on")
    assert "\n" not in line
    assert checkpoint.steps(workdir)
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    lab.run(workdir, {"checkpoint.every": "1 steps"})
    assert meta(workdir) == meta(lab.whole)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the full disk above, where mounting is not permitted."""
    built, state = created()
    workdir = tmp_path / "run"
    with Checkpointer(workdir, built.config, built.keeps) as saver:

        def fail(*args: Any, **options: Any) -> None:
            (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(saver._manager, "save", fail)
        with pytest.raises(UserError, match="No space left on device; free some space and run"):
            saver.save(state, {"next_step": 3} | IDENTITY, Meta(3, 96, None, {}, {}))
    assert not list((workdir / "checkpoints").iterdir())


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        Checkpointer(tmp_path, tiny.config(), lambda step: False)


@pytest.mark.parametrize("damage", ["no state", "a flipped bit of the loader"])
def test_the_error_of_a_damaged_checkpoint_names_a_whole_one(
    lab: Lab, tmp_path: Path, damage: str
) -> None:
    """The error names the newest whole checkpoint, and it can be loaded. The checkpoint before the
    damaged one is damaged too.
    """
    workdir = copy(lab.whole, tmp_path / "run")
    DAMAGES[damage](stored(workdir))
    DAMAGES["a truncated array file"](stored(workdir, DECAY_START))
    abstract = next(iter(lab.builds.values())).abstract_state
    loads = [lambda: checkpoint.restore(stored(workdir), abstract)]
    loads += [lambda: lm.load(workdir)] if damage == "no state" else []  # it reads no loader
    for load in loads:
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value).startswith(f"checkpoint {stored(workdir)} is damaged: ")
        assert str(caught.value).endswith(f"; {stored(workdir, 6)} is whole: name that")
    assert lm.load(stored(workdir, 6)).step == 6
    for step in (3, 6):
        DAMAGES["no meta"](stored(workdir, step))
    with pytest.raises(UserError, match="no other is whole: restore a copy"):
        checkpoint.read_meta(stored(workdir, 6))


def test_a_checkpoint_without_digests_of_its_items(lab: Lab, tmp_path: Path) -> None:
    """Older versions wrote no digests. A checkpoint that lacks only some of them is damaged."""
    path = stored(copy(lab.whole, tmp_path / "run"))
    file = path / "meta" / "metadata"
    values = json.loads(file.read_text())
    del values["items"], values["records"]
    file.write_text(json.dumps(values))
    with pytest.raises(DamagedError, match="digest of meta is"):
        checkpoint.read_meta(path)
    del values["sha256"]
    file.write_text(json.dumps(values))
    assert checkpoint.read_meta(path).records is None
    assert checkpoint.read_config(path) == lab.config()


def test_a_half_deleted_checkpoint_is_removed(lab: Lab, tmp_path: Path) -> None:
    """A run is killed after it commits a checkpoint and before it has deleted the one it
    replaces.
    """
    workdir = copy(lab.whole, tmp_path / "run")
    shutil.rmtree(stored(workdir, 3) / "state")  # the deletion had begun
    lab.run(workdir, {"checkpoint.keep_last": 1})
    assert checkpoint.steps(workdir) == [DECAY_START, STEPS]
