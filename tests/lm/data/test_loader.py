from __future__ import annotations

import dataclasses
import hashlib
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lm.config import DataConfig, SourceConfig, UserError
from lm.data import loader
from lm.data.batch import Batch, Share, stack
from lm.data.growth import Batches
from lm.data.packing import concat
from lm.data.prepare import Prepared, prepare
from lm.data.splits import is_valid
from lm.data.store import Store

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
Pair = tuple[int, int, int, int]  # source, place of the input, input, target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def prepared(config: DataConfig, folder: Path) -> Prepared:
    return prepare(config, folder, progress=False)


def take(
    prepared: Prepared, config: DataConfig, steps: int, begin: int = 0, **changes: Any
) -> list[Batch]:
    options: dict[str, Any] = {"seed": 0} | changes
    size = Batches(options.pop("batch_size", config.batch_size))
    with loader.create(prepared, config, batches=size, **options) as batches:
        batches.set_state({"next_step": begin})
        return list(itertools.islice(batches, steps))


def equal(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(np.array_equal(x, y) for one, two in pairs for x, y in zip(one, two, strict=True))


def pairs_of(batches: Iterable[Batch]) -> Counter[tuple[int, int]]:
    """Multiset of the real (input, target) pairs."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        real = batch.loss_weights > 0
        found.update(zip(batch.tokens[real].tolist(), batch.targets[real].tolist(), strict=True))
    return found


def pairs_in(store: Store) -> Counter[tuple[int, int]]:
    """The same multiset from the files: every two neighbors inside a document."""
    found: Counter[tuple[int, int]] = Counter()
    for a, b in itertools.pairwise(store.offsets.tolist()):
        found.update(itertools.pairwise(store.tokens[a:b].tolist()))
    return found


def steps_per_epoch(prepared: Prepared, config: DataConfig) -> int:
    rows = -(-int(prepared.stores["text"]["train"].lengths.sum()) // config.context_length)
    assert rows % config.batch_size == 0, rows
    return rows // config.batch_size


def test_rows_of_a_golden_example() -> None:
    """Documents of 7, 3 and 9 pairs in rows of 5; positions restart in every row."""
    tokens = np.array([*range(10, 18), *range(20, 24), *range(30, 40)], np.uint16)
    offsets = np.array([0, 8, 12, 22])
    store = Store(Path(), cast(Any, tokens), offsets, {})
    plan = concat(store.lengths, 5, np.arange(3))
    rows = [loader.window(store, plan, row, 5, 3) for row in range(4)]

    def show(field: str) -> str:
        return "|".join("".join(map(str, getattr(row, field))) for row in rows)

    assert show("segment_ids") == "11111|11222|11111|11110"
    assert show("positions") == "01234|01012|01234|01230"
    assert show("source_ids") == "33333|33333|33333|33333"
    weights = "".join(str(int(w)) for row in rows for w in row.loss_weights)
    assert weights == "1" * 19 + "0"
    assert [row.tokens.tolist() for row in rows] == [
        [10, 11, 12, 13, 14], [15, 16, 20, 21, 22], [30, 31, 32, 33, 34], [35, 36, 37, 38, 0],
    ]  # fmt: skip
    assert [row.targets.tolist() for row in rows] == [
        [11, 12, 13, 14, 15], [16, 17, 21, 22, 23], [31, 32, 33, 34, 35], [36, 37, 38, 39, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_hold_pieces_of_documents_and_then_padding(
    config: DataConfig, prepared: Prepared, packing: str
) -> None:
    config = dataclasses.replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    end = prepared.tokenizer.end_of_text
    for batch in take(prepared, config, 40):
        assert [field.dtype for field in batch] == [np.int32] * 5 + [np.float32]
        assert all(field.shape == (4, 16) for field in batch)
        assert not np.any((batch.tokens == end) & (batch.loss_weights > 0))
        np.testing.assert_array_equal(batch.loss_weights, batch.segment_ids > 0)
        for row in range(4):
            segments, positions = batch.segment_ids[row], batch.positions[row]
            real = segments[segments > 0]
            assert np.all(segments[len(real) :] == 0)  # padding is only at the end of a row
            assert np.all(np.isin(np.diff(real), (0, 1)))
            assert real[0] == 1
            for segment in range(1, real[-1] + 1):
                inside = segments == segment
                np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                tokens, targets = batch.tokens[row][inside], batch.targets[row][inside]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])  # they are one document
                assert not np.any(targets[:-1] == end)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("context_length", [7, 16, 64])
def test_an_epoch_is_every_pair_once(
    config: DataConfig, prepared: Prepared, packing: str, context_length: int
) -> None:
    config = dataclasses.replace(config, packing=packing, context_length=context_length)  # pyright: ignore[reportArgumentType]
    store = prepared.stores["text"]["train"]
    rows = loader.Packer(store.lengths, context_length, config.packing, (0,)).num_rows
    for epoch in range(2):
        batches = take(prepared, config, rows, begin=epoch * rows, batch_size=1)
        assert pairs_of(batches) == pairs_in(store)
        assert sum(batch.loss_weights.sum() for batch in batches) == store.lengths.sum()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_epochs_and_seeds_differ(config: DataConfig, prepared: Prepared, packing: str) -> None:
    config = dataclasses.replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    store = prepared.stores["text"]["train"]
    rows = loader.Packer(store.lengths, 16, config.packing, (0,)).num_rows
    streams = {
        (seed, epoch): take(prepared, config, rows, rows * epoch, seed=seed, batch_size=1)
        for seed, epoch in itertools.product((0, 1), (0, 1))
    }
    # Seed 0 in epoch 1 and seed 1 in epoch 0 differ too.
    for a, b in itertools.combinations(streams.values(), 2):
        assert not equal(a, b)
        same = sum(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))
        assert same < rows / 4


def test_resume_is_exact(config: DataConfig, prepared: Prepared) -> None:
    store = prepared.stores["text"]["train"]
    rows = loader.Packer(store.lengths, 16, "concat", (0,)).num_rows
    epoch = -(-rows // 4)
    whole = take(prepared, config, 2 * epoch + 5)
    for k in (0, 1, epoch // 2, epoch - 1, epoch, epoch + 1, 2 * epoch):
        with loader.create(prepared, config, seed=0, batches=Batches(4)) as batches:
            for _ in range(k):
                next(batches)
            state = batches.state()
            assert state == {"next_step": k}  # prefetched batches do not count
        with loader.create(prepared, config, seed=0, batches=Batches(4)) as batches:
            next(batches)
            batches.set_state(state)
            assert equal(itertools.islice(batches, 5), whole[k : k + 5])


CHILD = """
import sys
from pathlib import Path
from lm.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.growth import NO_WARMUP, Batches
from lm.data import loader
from lm.data.prepare import prepare
source = SourceConfig(path=sys.argv[1], text_key="text", weight=1.0, valid_fraction=0.3,
                      token_dtype="", max_tokens=0)
tokenizer = TokenizerConfig(kind="bytes", path="", vocab_size=512,
                            pattern="gpt2", end_of_text="", bos="")
config = DataConfig(tokenizer=tokenizer, sources={"text": source}, context_length=16, batch_size=4,
                    packing="concat", batch_warmup=NO_WARMUP)
prepared = prepare(config, Path(sys.argv[2]), progress=False)
batches = loader.create(prepared, config, seed=0, batches=Batches(4))
batches.set_state({"next_step": 37})
for _ in range(25):
    print(next(batches).tokens.tolist())
"""


def test_resume_is_exact_in_a_new_process(
    config: DataConfig, prepared: Prepared, folder: Path
) -> None:
    """The process does not close the loader; it still ends, and prints no warning."""
    command = [sys.executable, "-W", "error", "-c", CHILD, config.sources["text"].path, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    expected = [str(batch.tokens.tolist()) for batch in take(prepared, config, 25, begin=37)]
    assert result.stdout.splitlines() == expected


@pytest.fixture
def mixed(tmp_path: Path, make_config: MakeConfig, make_source: MakeSource) -> DataConfig:
    """Three sources of different sizes and document lengths; their bytes tell them apart."""
    rng = np.random.default_rng(0)
    sources = {}
    for name, letter, count, weight in (
        ("a", "a", 7, 0.7),
        ("b", "b", 90, 0.3),
        ("c", "c", 5, 0.0),
    ):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / f"{name}/{i}.txt").write_text(letter * int(rng.integers(5, 60)))
        path = tmp_path / f"{name}/*.txt"
        sources[name] = make_source(path, weight=weight, valid_fraction=0.0)
    sources["c"] = dataclasses.replace(sources["c"], valid_fraction=1.0)
    return make_config(sources)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mixture_has_its_shares_of_tokens(mixed: DataConfig, folder: Path, packing: str) -> None:
    """Weights are shares of tokens and not of rows: best fit pads the sources differently. A source
    of weight 0 is left out.
    """
    mixed = dataclasses.replace(mixed, packing=packing)  # pyright: ignore[reportArgumentType]
    prepared = prepare(mixed, folder, progress=False)
    counts = np.zeros(3)
    for batch in take(prepared, mixed, 500, batch_size=16):
        counts += np.bincount(batch.source_ids.ravel(), batch.loss_weights.ravel(), minlength=3)
        real = (batch.loss_weights > 0) & (batch.tokens < 256)
        np.testing.assert_array_equal(batch.tokens[real] - ord("a"), batch.source_ids[real])
    np.testing.assert_allclose(counts / counts.sum(), [0.7, 0.3, 0.0], atol=1e-3)
    assert list(loader.validation_rows(prepared, mixed, 1000)) == ["c"]


@pytest.mark.parametrize("weights", [(1.7e308, 1e308), (5e-324, 5e-324), (1e308, 5e-324)])
def test_extreme_weights_are_handled(
    mixed: DataConfig, folder: Path, weights: tuple[float, float]
) -> None:
    pairs = zip(("a", "b"), weights, strict=True)
    changed = {name: dataclasses.replace(mixed.sources[name], weight=w) for name, w in pairs}
    mixed = dataclasses.replace(mixed, sources=changed)
    (batch,) = take(prepare(mixed, folder, progress=False), mixed, 1, batch_size=16)
    assert set(np.unique(batch.source_ids)) == ({0, 1} if weights[1] / weights[0] > 0 else {0})


def test_a_corpus_below_one_row_repeats(
    tmp_path: Path, folder: Path, make_config: MakeConfig, make_source: MakeSource
) -> None:
    (tmp_path / "one.txt").write_text("abc")
    config = make_config({"text": make_source(tmp_path / "one.txt", valid_fraction=0.0)})
    prepared = prepare(config, folder, progress=False)
    for batch in take(prepared, config, 3):
        assert batch.tokens[:, :3].tolist() == [[97, 98, 99]] * 4
        assert batch.targets[:, :3].tolist() == [[98, 99, 256]] * 4
        assert batch.loss_weights.sum() == 12


def test_validation_is_every_held_out_pair_in_order(config: DataConfig, prepared: Prepared) -> None:
    store = prepared.stores["text"]["valid"]
    sets = loader.validation_rows(prepared, config, 10**9)
    assert list(sets) == ["text"]
    rows = sets["text"]
    assert pairs_of([stack([row]) for row in rows]) == pairs_in(store)
    flat = np.concatenate([row.tokens[row.loss_weights > 0] for row in rows])
    np.testing.assert_array_equal(flat, store.tokens[np.flatnonzero(store.tokens[:] != 256)])
    assert len(rows) == len(list(rows)) == -(-int(store.lengths.sum()) // 16)
    assert all(field.shape == (16,) for row in rows for field in row)
    assert equal(list(rows), list(loader.validation_rows(prepared, config, 10**9)["text"]))


def test_validation_knows_its_documents(config: DataConfig, prepared: Prepared) -> None:
    store = prepared.stores["text"]["valid"]
    rows = loader.validation_rows(prepared, config, 10**9)["text"]
    for i, row in enumerate(rows):
        documents = rows.documents(i)
        np.testing.assert_array_equal(documents >= 0, row.segment_ids > 0)
        used = documents >= 0
        place = store.offsets[documents[used]] + _places(rows, i)[used]
        np.testing.assert_array_equal(store.tokens[place], row.tokens[used])


def _places(rows: loader.ValidationRows, i: int) -> np.ndarray:
    """The position in its document of each place of row i, from the starts of the plan's pieces."""
    plan, row = rows.plan, rows.rows[i]
    pieces = range(plan.row_ptr[row], plan.row_ptr[row + 1])
    found = np.concatenate([plan.start[p] + np.arange(plan.length[p]) for p in pieces])
    return np.pad(found, (0, 16 - len(found)))


def test_validation_limit(config: DataConfig, prepared: Prepared) -> None:
    some = loader.validation_rows(prepared, config, 100)["text"]
    assert len(some) == 6  # of 16
    assert sum(row.loss_weights.sum() for row in some) <= 100
    least = loader.validation_rows(prepared, config, 1)["text"]
    assert least[0].loss_weights.sum() == 16
    with pytest.raises(IndexError):
        least[1]


def test_identity(config: DataConfig, prepared: Prepared, mixed: DataConfig, folder: Path) -> None:
    def identity(config: DataConfig, prepared: Prepared, **changes: Any) -> dict[str, object]:
        options: dict[str, Any] = {"seed": 0} | changes
        size = Batches(options.pop("batch_size", 4))
        with loader.create(prepared, config, batches=size, **options) as batches:
            return batches.identity

    first = identity(config, prepared)
    loader.check_identity(first, identity(config, prepared))
    loader.check_identity(first, identity(config, prepared, share=Share((1,), 2)))
    cases = {
        "batch_size was 4, is 8": identity(config, prepared, batch_size=8),
        "seed was 0, is 1": identity(config, prepared, seed=1),
        "context_length was 16, is 32": identity(
            dataclasses.replace(config, context_length=32), prepared
        ),
        "packing was concat, is best_fit": identity(
            dataclasses.replace(config, packing="best_fit"), prepared
        ),
        "sources.a.tokens_sha256 was None": identity(mixed, prepare(mixed, folder, progress=False)),
    }
    for words, changed in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            loader.check_identity(first, changed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("packing", "golden"), [("concat", "ca12a1ac7417e7c5"), ("best_fit", "98be81bebe679f23")]
)
def test_stream_does_not_change_between_versions(
    config: DataConfig, prepared: Prepared, packing: str, golden: str
) -> None:
    """A run must resume under a newer version; a change of stream must raise packing.VERSION."""
    config = dataclasses.replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    digest = hashlib.sha256()
    for batch in take(prepared, config, 100):
        for field in batch:
            digest.update(field.tobytes())
    assert digest.hexdigest()[:16] == golden


def test_changed_validation_documents_are_warned_of(
    tmp_path: Path,
    folder: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning is logged and the run goes on, as the training data is the same. No
    warning is logged for a set that only one identity has.
    """
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    config = make_config({"text": make_source(tmp_path / "*.txt")})

    def identity() -> dict[str, object]:
        return loader.identity(prepare(config, folder, progress=False), config, 0, Batches(4))

    before = identity()
    name = next(f"{i}.txt" for i in range(9) if is_valid(f"{i}.txt", 0.3))
    (tmp_path / name).write_text("another")
    after = identity()
    loader.check_identity(before, after | {"validation": {"other": "0"}})
    assert not caplog.messages
    loader.check_identity(before, after)
    (line,) = caplog.messages
    assert "the validation documents of data.sources.text changed since the checkpoint" in line
    name = next(f"{i}.txt" for i in range(9) if not is_valid(f"{i}.txt", 0.3))
    (tmp_path / name).write_text("another")
    with pytest.raises(UserError, match="tokens_sha256 was"):
        loader.check_identity(before, identity())


def test_a_stream_in_another_order_is_refused(mixed: DataConfig, folder: Path) -> None:
    """The mixture's checkpoint is from before the order had a version number. The order of a single
    source has never changed.
    """
    now = loader.identity(prepare(mixed, folder, progress=False), mixed, 0, Batches(4))
    before = {key: value for key, value in now.items() if key != "mixture_version"}
    with pytest.raises(UserError, match=r"mixture_version was 1, is 2\); go on with that version"):
        loader.check_identity(before, now)
    alone = dataclasses.replace(mixed, sources={"a": mixed.sources["a"]})
    assert "mixture_version" not in loader.identity(
        prepare(alone, folder, progress=False), alone, 0, Batches(4)
    )
