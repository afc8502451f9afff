"""launch.prepare as a process: its table, and mistakes as one line with exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text("été <|endoftext|> " * (i + 1))
    (folder / "empty.txt").write_text("")
    return folder


def run(corpus: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    data = "--config.data"
    command = [
        *(sys.executable, "-W", "error", "-m", "launch.prepare", "--config=base"),
        f"{data}.sources.stdlib.path={corpus}/*.txt",
        f"{data}.sources.stdlib.valid_fraction=0.3",
        f"{data}.tokenizer.kind=bytes",
        f"{data}.tokenizer.vocab_size=257",
        f"--data_dir={tmp_path / 'data'}",
        *flags,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_table_is_printed_and_damage_is_found(corpus: Path, tmp_path: Path) -> None:
    first = run(corpus, tmp_path)
    assert first.returncode == 0
    message = f"data.sources.stdlib: 12 documents; left out: 1 empty (first {corpus}/empty.txt)\n"
    assert first.stderr.endswith(message)
    assert first.stderr.startswith("data.sources.stdlib: 2 of 12 documents are held out, ")
    assert first.stderr.count("\n") == 2
    lines = first.stdout.splitlines()
    assert lines[0].split() == [
        "source",
        "split",
        "documents",
        "tokens",
        "bytes",
        "bytes/token",
        "folder",
    ]
    rows = [line.split() for line in lines[1:3]]
    assert [row[:2] for row in rows] == [["stdlib", "train"], ["stdlib", "valid"]]
    assert sum(int(row[2]) for row in rows) == 12
    num_bytes = sum(int(row[4].replace(",", "")) for row in rows)
    assert num_bytes == sum(path.stat().st_size for path in corpus.iterdir())
    assert sum(int(row[3].replace(",", "")) for row in rows) == num_bytes + 12
    assert rows[0][5] == "1.00"
    second = run(corpus, tmp_path, "--verify")
    assert second.stdout == first.stdout.replace("files below", "files verified below")
    tokens = next((tmp_path / "data").glob("stdlib-*/train/tokens.bin"))
    content = bytearray(tokens.read_bytes())
    content[0] ^= 1
    tokens.write_bytes(content)
    damaged = run(corpus, tmp_path, "--verify")
    assert damaged.returncode == 2
    assert damaged.stderr.startswith(f"error: {tokens}: digest of bytes 0 on is ")
    assert damaged.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.data.sources.stdlib.path=/nowhere/*.txt", "matches no file"),
        ("--config.data.tokenizer.kind=json", "needs data.tokenizer.path"),
        ("--verfy", "did you mean --verify?"),
        ("--data_dir=/dev/null/x", "set --data_dir"),
    ],
)
def test_mistakes(corpus: Path, tmp_path: Path, flag: str, words: str) -> None:
    result = run(corpus, tmp_path, flag)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
