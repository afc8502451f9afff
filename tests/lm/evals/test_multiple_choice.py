"""Where requests are cut, how planted models score, and files that are refused."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals import Items, create
from lm.evals.multiple_choice import MultipleChoice
from tests.lm.evals import asked, planted

GIVEN = planted.given(64)


def task(path: str, **options: Any) -> MultipleChoice:
    found = create({"multiple_choice": {"path": path, **options}}, "tasks")["multiple_choice"]
    assert isinstance(found, MultipleChoice)
    return found


def gold_rows(items: Items) -> list[int]:
    """The rows of the right answers, where there are no bare rows."""
    starts = np.cumsum([0, *(len(choice.chars) for choice in items.about)])
    return [start + choice.gold for start, choice in zip(starts, items.about, strict=False)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_continuation_is_scored(tmp_path: Path, kind: str, name: str) -> None:
    cases = [  # context, continuation, what is given, what is scored
        ("The pass key", " is", "The pass key", " is"),
        ("The sky is \n ", "blue é", "The sky is", " \n blue é"),
        ("", "12 34", "1", "2 34"),
        ("  ", "12 34", " ", " 12 34"),
    ]
    lines = [
        asked.request(i, idx, context, continuation + "." * idx, 0)
        for i, (context, continuation, _, _) in enumerate(cases)
        for idx in range(2)
    ]
    path = asked.write(tmp_path / name, lines)
    tokenizer = planted.tokenizer(kind)
    items = task(path).items(planted.given(64, kind))
    assert len(items.rows) == 8
    for (context, _, given, scored), row in zip(cases, items.rows[::2], strict=True):
        ids = planted.ids(row)
        if context.strip():
            assert tokenizer.decode(planted.answer(row)) == scored
        else:  # the first token is given, whichever it is
            assert len(planted.answer(row)) == len(ids) - 1
        assert tokenizer.decode(ids) == given + scored
        assert row.positions.tolist() == list(range(len(ids) - 1))
    if kind == "bytes":
        assert items.about[1].num_bytes == len(" \n blue é".encode())
        assert items.about[1].chars.tolist() == [len("blue é"), len("blue é.")]


def test_planted_models(tmp_path: Path) -> None:
    path = asked.write(tmp_path / "a.jsonl", asked.questions(300, choices=(4, 5, 3)))
    chance = (1 / 4 + 1 / 5 + 1 / 3) / 3
    for normalization in ("per_char", "none"):
        question = task(path, normalization=normalization)
        items = question.items(GIVEN)
        right = question.numbers(items, asked.favorite(items, gold_rows(items)))
        for name in ("accuracy", "accuracy_sum"):
            assert right[name].value == right[name].high == 1
            assert right[name].num == 300
            assert right[name].chance == pytest.approx(chance)
            assert not right[name].is_at_chance
        flat = question.numbers(items, asked.constant(items.rows))
        error = math.sqrt(chance * (1 - chance) / 300)
        assert abs(flat["accuracy_sum"].value - chance) < 3 * error  # the shortest answer wins
        assert flat["accuracy"].is_at_chance
        # All choices tie, up to rounding.
        if normalization == "per_char":
            assert flat["accuracy"].value == pytest.approx(chance)
        wrong = [row - choice.gold + (choice.gold + 1) % len(choice.chars)
                 for row, choice in zip(gold_rows(items), items.about, strict=True)]  # fmt: skip
        assert question.numbers(items, asked.favorite(items, wrong))["accuracy"].value == 0
    uniform = question.numbers(items, planted.uniform(items.rows, 256))
    assert uniform["bpb"].value == pytest.approx(8, abs=1e-6)
    assert uniform["bpb"].low == pytest.approx(uniform["bpb"].high)
    sizes = [choice.num_bytes for choice in items.about]
    assert uniform["gold_logprob"].value == pytest.approx(-math.log(256) * np.mean(sizes))


def test_normalizations_by_hand(tmp_path: Path) -> None:
    """The choices have 2, 4 and 3 characters; they cost 4, 5 and 6 nats, and 5, 5.5 and 9 nats
    without the question.
    """
    answers, bare = [" a", " abc", " ab"], [5.0, 5.5, 9.0]
    lines = [asked.request(7, i, "Q:", answer, 0) for i, answer in enumerate(answers)]
    lines += [asked.request(asked.BARE + 7, i, "Answer:", x, 0) for i, x in enumerate(answers)]
    want = {"none": 0, "per_char": 1, "pmi": 2}
    for label in range(3):
        path = asked.write(tmp_path / f"{label}.jsonl", [{**x, "label": label} for x in lines])
        for normalization, best in want.items():
            question = task(path, normalization=normalization)
            items = question.items(GIVEN)
            assert len(items.rows) == (6 if normalization == "pmi" else 3)
            nats = [4.0, 5.0, 6.0, *bare][: len(items.rows)]
            scored = asked.totals(items.rows, nats)
            found = question.numbers(items, scored)
            assert found["accuracy"].value == (label == best)
            assert found["accuracy_sum"].value == (label == 0)
            assert found["gold_logprob"].value == pytest.approx(-(4 + label))
            sizes = [2, 4, 3]
            assert found["bpb"].value == pytest.approx((4 + label) / math.log(2) / sizes[label])


def test_labels_and_order_do_not_touch_the_scores(tmp_path: Path) -> None:
    lines = asked.questions(20, bare=True)
    moved = [{**line, "label": (line["label"] + 1) % 4} for line in lines]
    shuffled = [moved[i] for i in np.random.default_rng(0).permutation(len(moved))]
    one = task(asked.write(tmp_path / "a.jsonl", lines), normalization="pmi").items(GIVEN)
    two = task(asked.write(tmp_path / "b.jsonl", moved), normalization="pmi").items(GIVEN)
    for a, b in zip(one.rows, two.rows, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert [(x.gold + 1) % 4 for x in one.about] == [x.gold for x in two.about]
    three = task(asked.write(tmp_path / "c.jsonl", shuffled), normalization="pmi").items(GIVEN)
    texts = lambda items: sorted(
        (planted.ids(row).tolist() for row in items.rows), key=lambda ids: tuple(ids)
    )
    assert texts(three) == texts(one)
    first = [planted.ids(row).tolist() for row in three.rows[:4]]
    at = [planted.ids(row).tolist() for row in one.rows].index(first[0])
    assert first == [planted.ids(row).tolist() for row in one.rows[at : at + 4]]  # by idx


def test_piqa(tmp_path: Path) -> None:
    goals = [{"goal": f"goal {i}", "sol1": "one", "sol2": "the other"} for i in range(5)]
    path = asked.write(tmp_path / "valid.jsonl", goals)
    labels = tmp_path / "labels.lst"
    labels.write_text("0\n1\n1\n0\n1\n")
    question = task(path, labels=str(labels), max_items=3, normalization="pmi")
    items = question.items(GIVEN)
    assert [choice.gold for choice in items.about] == [0, 1, 0]  # of documents 0, 1, 3
    decode = planted.tokenizer("bytes").decode
    texts = [decode(planted.ids(row)) for row in items.rows]
    assert texts[4:8] == [
        "Question: goal 1\nAnswer: one",
        "Question: goal 1\nAnswer: the other",
        "Answer: one",
        "Answer: the other",
    ]
    assert [decode(planted.answer(row)) for row in items.rows[4:6]] == [" one", " the other"]
    right = asked.favorite(items, [4 * i + choice.gold for i, choice in enumerate(items.about)])
    assert question.numbers(items, right)["accuracy"].value == 1
    assert question.numbers(items, right)["accuracy"].chance == 0.5
    with pytest.raises(UserError, match=r"valid.jsonl:1 is PIQA; set labels"):
        task(path).items(GIVEN)
    with pytest.raises(UserError, match=r"cannot read labels='/absent': No such file"):
        task(path, labels="/absent").items(GIVEN)
    labels.write_text("0\n1\n1\n0\n")
    with pytest.raises(UserError, match=r"labels.lst has 4 labels for 5 lines"):
        task(path, labels=str(labels)).items(GIVEN)
    labels.write_text("0\n1\n2\n0\n1")
    with pytest.raises(UserError, match=r"labels.lst:3: '2' is not a label of PIQA"):
        task(path, labels=str(labels)).items(GIVEN)
    other = asked.write(tmp_path / "requests.jsonl", asked.questions(1))
    with pytest.raises(UserError, match=r"requests.jsonl has its own; leave labels empty"):
        task(other, labels=str(labels)).items(GIVEN)
    with pytest.raises(UserError, match=r"is for one file and path=.* matches 2"):
        task(str(tmp_path / "*.jsonl"), labels=str(labels)).items(GIVEN)


def test_too_long(tmp_path: Path) -> None:
    lines = [asked.request(0, i, "x" * 50, " " + "y" * (19 + i), 0) for i in range(2)]
    path = asked.write(tmp_path / "a.jsonl", lines)
    assert len(task(path, max_len=70).items(planted.given(32)).rows[1].tokens) == 70
    message = r"a.jsonl:2 has 70 tokens, the limit is 69; set max_len, or overlong=\"left\""
    with pytest.raises(UserError, match=message):
        task(path, max_len=69).items(GIVEN)
    with pytest.raises(UserError, match=r"a.jsonl:1 has 69 tokens, the limit is 64"):
        task(path).items(GIVEN)
    items = task(path, max_len=30, overlong="left").items(GIVEN)
    decode = planted.tokenizer("bytes").decode
    for row, size in zip(items.rows, (20, 21), strict=True):
        assert len(row.tokens) == 30  # lm-evaluation-harness: (context + continuation)[-31:]
        assert decode(planted.ids(row)) == "x" * (31 - size) + " " + "y" * (size - 1)
        assert decode(planted.answer(row)) == " " + "y" * (size - 1)
    assert len(task(path, max_len=21, overlong="left").items(GIVEN).rows[1].tokens) == 21
    with pytest.raises(UserError, match=r"a.jsonl:2, continuation has 21 tokens, the limit is 20"):
        task(path, max_len=20, overlong="left").items(GIVEN)


def test_documents_are_evenly_spread(tmp_path: Path) -> None:
    lines = asked.questions(10)
    for part, name in ((lines[:20], "a.jsonl"), (lines[20:], "b.jsonl")):
        asked.write(tmp_path / name, part)
    items = task(str(tmp_path / "*.jsonl"), max_items=4).items(GIVEN)
    texts = [line["request"]["context"] + line["request"]["continuation"] for line in lines]
    decode = planted.tokenizer("bytes").decode
    chosen = [texts.index(decode(planted.ids(row))) for row in items.rows[::4]]
    assert chosen == [0, 8, 20, 28]


def line(**changes: Any) -> dict[str, Any]:
    return asked.request(0, 0, "c", " d", 0) | changes


# File name, content, message.
CUT = gzip.compress(b'{"a": 1}', mtime=0)[:-9]
WRONG = [
    ("a.jsonl", b"", "a.jsonl is empty"),
    ("a.jsonl", b"\n \n", "a.jsonl is empty"),
    ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz: Not a gzipped file"),
    ("a.jsonl.gz", CUT, "cannot read .*a.jsonl.gz: Compressed file"),
    ("a.json", b"{}", "a.json is not one of \\*.jsonl"),
    ("a.jsonl", b'{"a": ', "a.jsonl:1 is not JSON"),
    ("a.jsonl", b"\n[1]\n", "a.jsonl:2 is a list; a line must be an object"),
    ("a.jsonl", b'\xff{"a": 1}', "a.jsonl:1 is not JSON"),
    ("a.jsonl", b"[" * 90_000, "a.jsonl:1 is not JSON"),
    ("a.jsonl", b"\xef\xbb\xbf" * 2, "a.jsonl:1 is not JSON"),
    ("a[0].jsonl", b"1\n", "a\\[0\\].jsonl:1 is a int; a line must be an object"),
    ("a.jsonl", b'{"text": "x"}', "a.jsonl:1 has keys text; known: doc_id, request or goal, sol1"),
    ("a.jsonl", [line(), {"doc_id": 0, "idx": 1}], "a.jsonl:2 has no key 'request'; known"),
    ("a.jsonl", [line(), line(idx="1")], "a.jsonl:2: 'idx' is a str; it must be an integer"),
    ("a.jsonl", [line(), line(idx=1, request=[])], "a.jsonl:2: 'request' is a list"),
    ("a.jsonl", [line(), line(idx=1, request={"context": ""})], "no key 'continuation'"),
    ("a.jsonl", [line(), line(idx=1, request={"context": "\ud800", "continuation": "x"})],
     "a.jsonl:2: 'context' holds a lone surrogate"),
    ("a.jsonl", [line(), line()], "a.jsonl:2: idx=0 is also at .*a.jsonl:1"),
    ("a.jsonl", [line(label=2), line(idx=1, label=2)], r"label=2 is not one of idx \[0, 1\]: no"),
    ("a.jsonl", [line(), line(idx=1, label=1)], "a.jsonl:1: label=0 and 1 is not one of idx"),
    ("a.jsonl", [line(label=None), line(idx=1, label=None)], "label=None is not one of idx"),
    ("a.jsonl", [line(label=True), line(idx=1, label=True)], "label=True is not one of idx"),
    ("a.jsonl", [line()], "a.jsonl:1 has one choice; gold_bpb is the task"),
    ("a.jsonl", [line(), line(idx=1), line(doc_id=asked.BARE + 3)], "there is no doc_id=3"),
    ("a.jsonl", [line(), line(idx=1), line(doc_id=asked.BARE)], r"a.jsonl:3 has idx \[0\]"),
    ("a.jsonl", [line(), line(idx=1, request={"context": "x", "continuation": ""})],
     "a.jsonl:2: the continuation needs a token"),
    ("a.jsonl", [line(), line(idx=1, request={"context": "", "continuation": "x"})],
     "a.jsonl:2: the continuation needs a token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        asked.write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        task(str(tmp_path / name)).items(GIVEN)
    assert "\n" not in str(error.value)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    path = asked.write(tmp_path / "a.jsonl", asked.questions(2))
    with pytest.raises(UserError, match=r"a.jsonl:1: normalization=pmi needs doc_id \+ 1,000,000"):
        task(path, normalization="pmi").items(GIVEN)
    with pytest.raises(UserError, match=r"path='/absent/x.jsonl' matches no file"):
        task("/absent/x.jsonl").items(GIVEN)
    with pytest.raises(UserError, match="is not one of"):
        task(str(tmp_path)).items(GIVEN)
    table: dict[str, dict[str, Any]] = {
        "path is empty": {},
        "max_items=-1 must be >= 0": {"path": "x", "max_items": -1},
        "max_len=-1 must be >= 0": {"path": "x", "max_len": -1},
        "is not one of refuse, left": {"path": "x", "overlong": "right"},
        "is not one of per_char, none, pmi": {"path": "x", "normalization": "bytes"},
    }
    for words, options in table.items():
        with pytest.raises(UserError, match=words):
            create({"multiple_choice": options}, "tasks")


def test_the_real_files_are_read() -> None:
    """Every line of the real sets is read, where they are present."""
    folder = Path(__file__).resolve().parents[4] / "shared" / "data"
    if not (folder / "requests").is_dir():
        pytest.skip(f"no files of requests: {folder} is absent")
    for name, documents, chance in (
        ("hellaswag_rc_5shot", 1000, 0.25),
        ("csqa_rc_0shot", 1221, 0.2),
        ("arc_easy_rc_5shot", 570, 0.25),
    ):
        path = str(folder / "requests" / f"{name}.jsonl.gz")
        question = task(path, max_items=documents, max_len=4096)
        items = question.items(GIVEN)
        found = question.numbers(items, asked.constant(items.rows))
        assert found["accuracy"].num == documents
        assert found["accuracy"].chance == pytest.approx(chance, abs=2e-3)
        assert json.dumps(found["accuracy"].to_mapping())
