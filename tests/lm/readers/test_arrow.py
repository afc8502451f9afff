from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm.config import UserError
from tests.lm.readers.reading import read

arrow: Any = pytest.importorskip("pyarrow")
ipc: Any = pytest.importorskip("pyarrow.ipc")


def write(path: Path, columns: dict[str, Any], *, is_file: bool = False, rows: int = 2) -> Path:
    table = arrow.table(columns)
    with (ipc.new_file if is_file else ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("is_file", [True, False])
def test_both_formats_and_several_batches_are_read(tmp_path: Path, is_file: bool) -> None:
    columns = {"body": ["one", None, "três", "four", "five"], "id": [7, 8, 9, 10, 11]}
    path = write(tmp_path / "x.arrow", columns, is_file=is_file)
    assert read(path, text_key="body") == (
        [("7", "one"), ("9", "três"), ("10", "four"), ("11", "five")],
        {"empty": 1},
    )
    with pytest.raises(UserError, match="did you mean 'body'"):
        read(path, text_key="bdoy")


def test_text_is_read_in_every_form(tmp_path: Path) -> None:
    """Strings and bytes, their dictionaries and views are read; text that is not UTF-8 is
    counted.
    """
    texts = arrow.array(["a", None, "b", "a"])
    views = arrow.array(["a", "b"]).cast(arrow.string_view())
    binary = texts.cast(arrow.binary())
    columns = [
        texts,
        texts.cast(arrow.large_string()),
        texts.cast(arrow.string_view()),
        texts.dictionary_encode(),
        arrow.DictionaryArray.from_arrays(arrow.array([0, None, 1, 0]), views),
        binary,
        binary.cast(arrow.binary_view()),
        binary.dictionary_encode(),
    ]
    for column in columns:
        path = write(tmp_path / "x.arrow", {"text": column}, is_file=True, rows=4)
        found, left_out = read(path)
        assert [text for _, text in found] == ["a", "b", "a"], column.type
        assert left_out == {"empty": 1}
    path = write(tmp_path / "x.arrow", {"text": arrow.array([b"caf\xe9", b"a"])})
    assert read(path)[1] == {"undecodable": 1}
    for column in (arrow.array([1.5]), arrow.array([["a"]])):
        with pytest.raises(UserError, match="it must hold strings"):
            read(write(tmp_path / "x.arrow", {"text": column}))


def saved(folder: Path, texts: list[str]) -> Path:
    """Writes a folder as `Dataset.save_to_disk` of datasets 5.2 does: two shards and their list."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (texts[:2], texts[2:]), strict=True):
        write(folder / name, {"text": part})
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_folder_in_the_layout_of_datasets_is_read(tmp_path: Path) -> None:
    """The files that state.json lists are read, and no others."""
    folder = saved(tmp_path / "data", ["one", "two", "three"])
    write(folder / "cache-1.arrow", {"text": ["no"]})
    for path in (folder, f"{folder}/"):
        found, left_out = read(path)
        assert [text for _, text in found] == ["one", "two", "three"]
        assert not left_out
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot read .*state.json: there is no '_data_files'; "):
        read(folder)


def test_a_folder_of_several_data_sets_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "all/train", ["one"])
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    words = f"holds several data sets; set path to {tmp_path}/all/train or {tmp_path}/all/test"
    with pytest.raises(UserError, match=words):
        read(tmp_path / "all")
    assert read(tmp_path / "all/train")[0] == [("data-00000-of-00002.arrow:1", "one")]


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(9)]
    # With a fingerprint given, datasets hashes no data; dill cannot hash it with pyarrow 26.
    made = datasets.Dataset(arrow.table({"text": texts}), fingerprint="made")
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert [text for _, text in read(tmp_path / "one")[0]] == texts
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "all"))
    assert [text for _, text in read(tmp_path / "all/train")[0]] == texts
