"""Minimal pairs: first tokens, baselines and archives."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals import Given, create
from lm.evals.blimp import Blimp
from tests.lm.evals import asked, planted

PAIRS = {  # paradigm -> phenomenon, (good, bad)
    "anaphor": ("agreement", [("She saw herself.", "She saw himself."), ("A b.", "A bc.")]),
    "number": ("agreement", [("The cats sit.", "The cats sits."), ("Dogs run.", "Dogs runs.")]),
    "question": (
        "islands",
        [("Who ran?", "Whom ran?"), ("Zoe sat.", "Ann sat."), ("Ha b.", "Ha c.")],
    ),
}


def lines(name: str) -> list[dict[str, Any]]:
    phenomenon, pairs = PAIRS[name]
    return [
        {"sentence_good": good, "sentence_bad": bad, "linguistics_term": phenomenon}
        for good, bad in pairs
    ]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    place = tmp_path / "blimp"
    (place / "data").mkdir(parents=True)
    for name in PAIRS:
        asked.write(place / "data" / f"{name}.jsonl", lines(name))
    asked.write(place / "models_summary.jsonl", [{"UID": "anaphor", "ngram": 0.4}])
    return str(place)


@pytest.fixture
def archive(folder: str, tmp_path: Path) -> str:
    path = tmp_path / "blimp.tar.gz"
    with tarfile.open(path, "w:gz") as found:
        found.add(folder, arcname="blimp")
    return str(path)


def given(text: str = "She saw herself. Dogs run. Ann sat. ", kind: str = "bytes") -> Given:
    """A run whose training text is known."""
    found = planted.given(64, kind)
    ids = np.append(found.tokenizer.encode(text * 20), found.tokenizer.end_of_text)
    stores: Any = {name: {"train": SimpleNamespace(tokens=ids)} for name in found.data.sources}
    prepared: Any = SimpleNamespace(stores=stores)
    return found._replace(prepared=prepared)


def test_a_folder_and_an_archive_are_read_alike(folder: str, archive: str) -> None:
    """The smallest paradigm has two pairs, so each gives two; the summary is not a paradigm."""
    one, two = (Blimp(path=path).items(given()) for path in (folder, archive))
    decode = planted.tokenizer("bytes").decode
    texts = [[decode(planted.ids(row)) for row in items.rows] for items in (one, two)]
    assert texts[0] == texts[1]
    chosen = [*PAIRS["anaphor"][1], *PAIRS["number"][1], *PAIRS["question"][1][:2]]
    assert texts[0] == [sentence for pair in chosen for sentence in pair]
    for row in one.rows:
        assert row.weights.tolist() == [1.0] * (len(row.tokens))
    assert one.about.phenomenon.tolist() == ["agreement"] * 4 + ["islands"] * 2
    few = Blimp(path=archive, max_items=1).items(given())
    assert [decode(planted.ids(row)) for row in few.rows[::2]] == [pair[0] for pair in chosen[::2]]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_planted_models(folder: str, kind: str) -> None:
    question = Blimp(path=folder)
    items = question.items(given(kind=kind))
    good = question.numbers(items, asked.favorite(items, range(0, 12, 2)))
    assert {good[name].value for name in good if name.startswith("accuracy")} == {1.0}
    assert (good["accuracy"].num, good["accuracy/agreement"].num, good["accuracy/islands"].num) == (
        6,
        4,
        2,
    )
    assert good["accuracy"].chance == 0.5
    bad = question.numbers(items, asked.favorite(items, range(1, 12, 2)))
    assert bad["accuracy"].value == 0
    assert bad["over_bigram"].value == pytest.approx(-bad["baseline_bigram"].value)
    assert bad["over_bigram"].is_at_chance


def test_a_model_that_knows_nothing_counts_tokens(folder: str) -> None:
    """Under a constant loss the shorter sentence wins, which is the length baseline; ties count
    half.
    """
    question = Blimp(path=folder)
    items = question.items(given())
    flat = question.numbers(items, asked.constant(items.rows))
    # herself and himself are equally long; A b. and 3 others are shorter; Zoe and Ann are alike.
    assert flat["baseline_length"].value == pytest.approx((0.5 + 1 + 1 + 1 + 1 + 0.5) / 6)
    assert flat["accuracy/agreement"].value == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    same = question.numbers(items, planted.uniform(items.rows, 256))
    assert same["accuracy"].value == flat["accuracy"].value


def test_the_first_token_is_scored_by_unigrams(folder: str) -> None:
    """To a constant model, Zoe and Ann differ in the first token alone. The name that is more
    frequent in the training text wins.
    """
    for text, credit in (("Zoe sat. Z", 1.0), ("Ann sat. A", 0.0), ("nothing of it", 0.5)):
        items = Blimp(path=folder).items(given(text))
        found = Blimp(path=folder).numbers(items, asked.constant(items.rows))
        assert found["accuracy/islands"].value == (1.0 + credit) / 2  # Who before Whom: shorter


def test_baselines_are_of_the_training_tokens(folder: str) -> None:
    """The training text spells the good sentences or the bad ones; its letter pairs differ."""
    for side, wins in ((0, 1.0), (1, 0.0)):
        pairs = [*PAIRS["anaphor"][1][:1], *PAIRS["number"][1]]
        text = " ".join(pair[side] for pair in pairs) + " "
        items = Blimp(path=folder).items(given(text))
        scores = items.about.baselines["bigram"]
        assert (scores[0, 0] > scores[0, 1]) == wins
    question = Blimp(path=folder, ngram_tokens=4)
    few = question.items(given("Anything. "))
    counted = Blimp(path=folder).items(given("Anyt")).about.baselines["unigram"]
    assert few.about.baselines["unigram"].shape == counted.shape == (6, 2)
    assert not np.array_equal(few.about.baselines["unigram"], counted)


def test_refusals(folder: str, archive: str, tmp_path: Path) -> None:
    table: dict[str, dict[str, Any]] = {
        "path is empty": {},
        "ngram_tokens=0 must be > 0": {"path": "x", "ngram_tokens": 0},
        "max_items=-1": {"path": "x", "max_items": -1},
    }
    for words, options in table.items():
        with pytest.raises(UserError, match=words):
            create({"blimp": options}, "tasks")
    with pytest.raises(UserError, match=r"cannot read path='/absent.tar.gz': .*No such file"):
        Blimp(path="/absent.tar.gz").items(given())
    Path(archive).write_bytes(Path(archive).read_bytes()[:300])
    with pytest.raises(UserError, match=r"cannot read path=.*blimp.tar.gz"):
        Blimp(path=archive).items(given())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none' holds no .jsonl file"):
        Blimp(path=str(tmp_path / "none")).items(given())
    broken = Path(folder) / "data" / "number.jsonl"
    kept = broken.read_text()
    for content, message in {
        kept + "{": "number.jsonl:3 is not JSON",
        "": "number.jsonl is empty",
        kept.replace(
            "sentence_bad", "bad"
        ): "number.jsonl:1 has no key 'sentence_bad'; did you mean",
        kept.replace("Dogs run.", "D"): "number.jsonl:2: sentence_good has 1 tokens",
        kept.replace("Dogs run.", "D" * 90): "sentence_good has 89 tokens, the limit is 64",
    }.items():
        broken.write_text(content)
        with pytest.raises(UserError, match=message):
            Blimp(path=folder).items(given())
    broken.write_text(kept)


def test_an_archive_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    data = json.dumps(lines("number")[0]).encode() + b"\nno JSON"
    with tarfile.open(path, "w") as found:
        member = tarfile.TarInfo("number.jsonl")
        member.size = len(data)
        found.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"a.tar:number.jsonl:2 is not JSON"):
        Blimp(path=str(path)).items(given())
