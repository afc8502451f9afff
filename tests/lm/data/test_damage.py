"""Every file of prepared data is damaged in every way. Reading it then raises a one-line error, or
returns what was there before the damage.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import DataConfig, SourceConfig, TokenizerConfig, UserError
from lm.data import loader
from lm.data.growth import Batches
from lm.data.prepare import prepare

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
MakeCorpus = Callable[..., Path]
Read = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Room:
    """Prepared data of two sources and a trained tokenizer, and what an undamaged read returns."""

    config: DataConfig
    data_dir: Path
    whole: Read

    def files(self) -> list[Path]:
        found = [p.relative_to(self.data_dir) for p in self.data_dir.rglob("*") if p.is_file()]
        return sorted(path for path in found if path.suffix != ".lock")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    from tests.lm.data.conftest import data_config, source, write_corpus

    folder = tmp_path_factory.mktemp("room")
    paths = [write_corpus(folder / name, 12, repeat) for name, repeat in (("a", 30), ("b", 3))]
    (paths[0] / "bad.txt").write_bytes(b"\xff")
    sources = {path.name: source(path / "*.txt") for path in paths}
    tokenizer = TokenizerConfig(
        kind="bpe", path="", vocab_size=270, pattern="gpt2", end_of_text="", bos=""
    )
    config = data_config(sources, tokenizer=tokenizer)
    return Room(config, folder / "data", read(config, folder / "data"))


def read(config: DataConfig, data_dir: Path) -> Read:
    """Everything that a run and an evaluation read from prepared data."""
    prepared = prepare(config, data_dir, progress=False)
    found = {"tokenizer": prepared.tokenizer.sha256.encode()}
    for name, splits in prepared.stores.items():
        found[f"{name} left out"] = str(prepared.left_out[name]).encode()
        for split, store in splits.items():
            found[f"{name} {split}"] = store.tokens[:].tobytes() + store.offsets.tobytes()
            found[f"{name} {split} meta"] = repr(sorted(store.meta.items())).encode()
    return found


def outcome(room: Room, damage: Callable[[Path], object], folder: Path) -> str:
    """ "refused" in one line, "same" as before, "accepted", or the text of a longer error."""
    copy = shutil.copytree(room.data_dir, folder / "data")
    try:
        damage(copy)
        return "same" if read(room.config, copy) == room.whole else "accepted"
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"{error}"
    finally:
        shutil.rmtree(copy)


def flipped(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def truncated(path: Path, keep: int) -> None:
    os.truncate(path, keep)


def swapped(one: Path, other: Path) -> None:
    third = one.with_name("third")
    one.rename(third)
    other.rename(one)
    third.rename(other)


def made_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def kinds(file: Path, size: int, flips: int) -> dict[str, Callable[[Path], object]]:
    """Damages by name. No flip and no cut hits the last byte alone: a text file may lack its final
    newline.
    """
    rng = random.Random(str(file))
    found: dict[str, Callable[[Path], object]] = {
        "deleted": lambda d: (d / file).unlink(),
        "a folder": lambda d: made_folder(d / file),
        "lengthened": lambda d: (d / file).write_bytes((d / file).read_bytes() + b"\0\0"),
    }
    for keep in (0, size // 2, size - 2)[-flips:]:
        found[f"cut to {keep}"] = lambda d, k=keep: truncated(d / file, k)
    for _ in range(flips):
        place, bit = rng.randrange(size - 1), rng.randrange(8)
        found[f"bit {bit} of {place}"] = lambda d, p=place, b=bit: flipped(d / file, p, b)
    return found


def assert_refused(room: Room, folder: Path, flips: int) -> None:
    for file in room.files():
        for name, damage in kinds(file, (room.data_dir / file).stat().st_size, flips).items():
            assert outcome(room, damage, folder) == "refused", (file, name)


def assert_swaps_refused(room: Room, folder: Path, pairs: list[tuple[Path, Path]]) -> None:
    for one, other in pairs:
        both = [room.data_dir / path for path in (one, other)]
        is_equal = all(p.is_file() for p in both) and both[0].read_bytes() == both[1].read_bytes()
        found = outcome(room, lambda d, a=one, b=other: swapped(d / a, d / b), folder)
        assert found == ("same" if is_equal else "refused"), (one, other)


def test_every_damage_of_every_file_is_refused(room: Room, tmp_path: Path) -> None:
    assert_refused(room, tmp_path, 1)


def test_swapped_namesakes_and_folders_are_refused(room: Room, tmp_path: Path) -> None:
    pairs = list(itertools.combinations(room.files(), 2))
    folders = sorted({folder for file in room.files() for folder in file.parents} - {Path()})
    of_folders = itertools.combinations(folders, 2)
    assert_swaps_refused(room, tmp_path, [x for x in pairs if x[0].name == x[1].name])
    assert_swaps_refused(room, tmp_path, [x for x in of_folders if not x[1].is_relative_to(x[0])])


@pytest.mark.slow
def test_many_flips_and_cuts_of_every_file_are_refused(room: Room, tmp_path: Path) -> None:
    assert_refused(room, tmp_path, 150)


@pytest.mark.slow
def test_every_swap_of_two_files_is_refused(room: Room, tmp_path: Path) -> None:
    assert_swaps_refused(room, tmp_path, list(itertools.combinations(room.files(), 2)))


def test_a_folder_that_is_deleted_is_prepared_again(room: Room, tmp_path: Path) -> None:
    """The error messages advise deleting it."""
    for folder in sorted({Path(file.parts[0]) for file in room.files()}):
        assert outcome(room, lambda d, f=folder: shutil.rmtree(d / f), tmp_path) == "same"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_reading_rewritten_tokens_is_refused(
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    make_corpus: MakeCorpus,
    split: str,
) -> None:
    """Every id changes and the size does not: the error comes from the thread that reads ahead."""
    config = make_config({"text": make_source(make_corpus(tmp_path / "c") / "*.txt")})
    folder = prepare(config, tmp_path / "data", progress=False).stores["text"][split].folder
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(bytes(255 - x for x in content))
    prepared = prepare(config, tmp_path / "data", progress=False)  # nothing is read yet
    words = r"tokens\.bin: digest of bytes 0 on is .* and prepare again"
    with (
        loader.create(prepared, config, seed=0, batches=Batches(4)) as batches,
        pytest.raises(UserError, match=words),
    ):
        next(
            batches
            if split == "train"
            else iter(loader.validation_rows(prepared, config, 99)["text"])
        )
