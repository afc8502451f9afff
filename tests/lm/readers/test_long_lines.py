"""Long lines are read like short ones, in bounded memory."""

from __future__ import annotations

import functools
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lm.readers import _long_lines as long_lines


@pytest.mark.parametrize("seed", range(4))
def test_long_lines_are_read_as_short_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escapes, surrogate pairs and letters of several bytes lie across the cuts and beside them."""
    monkeypatch.setattr(long_lines, "_PIECE", 11)
    monkeypatch.setattr(long_lines, "LONG_STRING", 8)
    rng = random.Random(seed)
    letters = ["a", "é", "日", "🎉", '"', "\\", "\n", "\u2028", "/", "\\u0041", "}"]
    for ascii_only in (True, False):
        text = "".join(rng.choices(letters, k=300))
        record = {"x": [text, {"text": "no"}], "text": text, "long key " * 3: 1, "id": "short"}
        line = json.dumps(record, ensure_ascii=ascii_only).encode()
        assert long_lines.loads(line, "text") == record
        monkeypatch.setattr(long_lines, "LONG_LINE", 8)
        found = long_lines.loads(line, "text")
        assert bytes(found["text"]) == text.encode()
        assert found["id"] == "short"
        monkeypatch.undo()
        monkeypatch.setattr(long_lines, "_PIECE", 11)
        monkeypatch.setattr(long_lines, "LONG_STRING", 8)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "aaaaaaaaaaaa\\u12"}', ValueError),
        (b'{"text": "aaaaaaaaaaaa\\uxyzw"}', ValueError),
        (b'{"text": "aaaaaaaaaaaa\\q"}', ValueError),
        (b'{"text": "aaaaaaaaaaaa\n"}', ValueError),
        (b'{"text": "aaaaaaaaaaaaaaa', ValueError),
        (b'{"text": "aaaaaaaaaaaa\\ud83d"}', UnicodeError),
        (b'{"text": "aaaa\\ud83daaaaaaaaaa"}', UnicodeError),
        (b'{"text": "aaaaaaaaaaaa\xff"}', UnicodeError),
        (b'{"text": "aaaaaaaaaaaaaaaaaa\xe6\x97"}', UnicodeError),
        (b"[" * 100_000, RecursionError),
    ],
)
def test_damaged_long_lines_raise(
    line: bytes, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_PIECE": 16, "LONG_STRING": 8, "LONG_LINE": 8}.items():
        monkeypatch.setattr(long_lines, name, value)
    with pytest.raises(kind):
        long_lines.loads(line, "text")


LARGE = """
import resource, sys
from pathlib import Path
from lm.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.growth import NO_WARMUP
from lm.data.prepare import prepare
source = SourceConfig(path=sys.argv[1], text_key="text", weight=1.0, valid_fraction=0.0,
                      token_dtype="", max_tokens=0)
tokenizer = TokenizerConfig(kind="bytes", path="", vocab_size=257,
                            pattern="gpt2", end_of_text="", bos="")
config = DataConfig(tokenizer=tokenizer, sources={"s": source}, context_length=16, batch_size=4,
                    packing="concat", batch_warmup=NO_WARMUP)
store = prepare(config, Path(sys.argv[2]), progress=False).stores["s"]["train"]
print(store.meta["bytes"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.gz"])
def test_a_document_of_300_megabytes_takes_less_than_one_gigabyte(
    tmp_path: Path, name: str
) -> None:
    """The text has letters that a Python string keeps in four bytes each."""
    part = "the quick brown fox 🎉 jumps over été and 日本 " * 20_000
    times = 300_000_000 // len(part.encode())
    begin, middle, end = ("", part, "")
    if "jsonl" in name:
        begin, middle, end = '{"text": "', json.dumps(part)[1:-1], '"}'
        times = 300_000_000 // len(middle)
    open_file = functools.partial(gzip.open, compresslevel=1) if "gz" in name else open
    with open_file(tmp_path / name, "wb") as file:
        for text in (begin, *[middle] * times, end):
            file.write(text.encode())
    command = [sys.executable, "-c", LARGE, str(tmp_path / name), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_bytes, peak = map(int, done.stdout.split())
    assert num_bytes == times * len(part.encode())
    assert peak < 1 << 30
