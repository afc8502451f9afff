"""The report shows what a run folder holds, whichever file is missing, and loads nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm import metrics, report
from lm.config import UserError
from lm.report import figures as figures_lib
from lm.report import folder, page
from lm.run import formats

CONFIG = {
    "format": formats.FORMAT,
    "seed": 0,
    "model": {"width": 128, "pattern": "stickbreaking"},
    "data": {"sources": {"stdlib": {"path": "<stdlib>"}}},
}
FACTS = {
    "versions": {"jax": "0.11.2"},
    "commit": "abc123",
    "devices": ["TFRT_CPU_0"],
    "device_kind": "cpu",
    "layers": [
        {"layer": i, "mixer": "stickbreaking", "form": "chunked", "reason": "cpu has no other"}
        for i in range(3)
    ],
    "parameters": {"hidden": 900, "vector": 100, "total": 1000},
    "flops_per_token": 6000.0,
    "started": "2026-01-01T10:00:00+00:00",
    "tokenizer": {"kind": "bpe", "vocab_size": 4096},
    "data": {"left_out": {"stdlib": {"undecodable": 3, "broken link": 1}, "b": {"empty": 1200}}},
    "command": ["espalier", "train", "--config=x.py", "--config.model.width=128", "--workdir=a b"],
}


def record(step: int, evaluated: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step,
        "tokens": 4096 * step,
        "train/loss": 8.3 / step**0.2,
        "train/bpb": 6.0 / step**0.2,
        "optim/grad_norm": 1.0 + math.sin(step) / 2,
        "optim/skipped_total": float(step >= 7),
        "lr/hidden": 0.01,
        "lr/input": 0.02,
        "update_norm/hidden": 0.1 * (1 - 1 / step),  # 0 at step 1
        "param_norm/hidden": 10.0,
        "time/step_seconds": 0.5,
        "time/tokens_per_second": 8192.0,
    }
    if evaluated:
        values |= {"eval/stdlib/loss": 8.0 / step**0.2, "eval/stdlib/bpb": 5.0 / step**0.2}
    return values


def make(workdir: Path, steps: int = 40, every: int = 10) -> Path:
    workdir.mkdir(parents=True)
    with metrics.Writer(workdir) as writer:
        for step in range(1, steps + 1):
            writer.write(record(step, evaluated=step % every == 0))
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    (workdir / "run.json").write_text(json.dumps(FACTS))
    samples = [
        {"step": steps, "kind": kind, "prompt": "def ", "text": "f(x):\n  return x < 1 </pre>"}
        for kind in ("greedy", "sampled")
    ]
    (workdir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return workdir


class Tags(HTMLParser):
    """Collects elements and checks that they nest."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def read(path: Path) -> tuple[str, Tags]:
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return text, tags


def figures(text: str) -> list[str]:
    return re.findall(r"<figcaption><h3>(.*?)</h3>", text)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = make(tmp_path_factory.mktemp("report") / "run")
    return report.write([workdir], workdir / "report.html")


def test_a_run(run_page: Path) -> None:
    workdir = run_page.parent
    assert run_page == (workdir / "report.html").resolve()
    text, tags = read(run_page)
    bits = 5.0 / 40**0.2
    for shown in (f"{bits:.4f}", "164 k", "1.00 k", "20.0 s", "stickbreaking", "abc123", "0 – 2"):
        assert shown in text
    assert figures(text) == [
        "Bits per byte",
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Update norm",
        "Parameter norm",
        "Throughput",
    ]
    # The wide figure has a narrow form for phones.
    assert len([tag for tag, _ in tags.seen if tag == "svg"]) == 8
    drawn = sorted(path.name for path in (workdir / "report_figures").iterdir())
    assert drawn == sorted(f"{name.lower().replace(' ', '_')}.svg" for name in figures(text))
    for name in drawn:
        assert (workdir / "report_figures" / name).read_text().startswith("<svg xmlns")
    assert "return x &lt; 1 &lt;/pre&gt;" in text
    assert "&lt;stdlib&gt;" in text
    assert "espalier train --config=x.py --config.model.width=128 &#x27;--workdir=a b&#x27;" in text
    assert list(workdir.glob(".*")) == []


ODD = "<b0>&\"'|!"


def odd(value: Any) -> Any:
    """The value, with markup in every key and every string."""
    if isinstance(value, dict):
        return {f"{ODD}{key}": odd(item) for key, item in value.items()}
    if isinstance(value, list):
        return [odd(item) for item in value]
    return f"{ODD}{value}" if isinstance(value, str) else value


@pytest.mark.parametrize("several", [False, True])
def test_keys_and_values_are_text(tmp_path: Path, several: bool) -> None:
    """Strings of every file of a run are shown as text: none becomes markup or a mark."""
    for name in ("<b0>a", "<b0>b") if several else ("<b0>a",):
        workdir = make(tmp_path / name, steps=10, every=5)
        with metrics.Writer(workdir) as writer:
            found = record(11) | {f"eval/{ODD}/bpb": 1.0, f"lr/{ODD}": 1.0, f"task/{ODD}": 1.0}
            writer.write(found | {"optim/skipped_total": 2.0})
        layers = [{"layer": 0, "mixer": ODD, ODD: ODD}]
        facts = {**FACTS, **odd(FACTS), "device_kind": ODD, "layers": layers, "started": ODD}
        facts["parameters"] = {ODD: 900, "total": 1000}
        (workdir / "run.json").write_text(json.dumps(facts))
        (workdir / "config.json").write_text(json.dumps({"format": 2, **odd(CONFIG)}))
        sample = {"step": 11, "kind": ODD, "prompt": ODD, "text": ODD}
        (workdir / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    folders = sorted(path for path in tmp_path.iterdir())
    defaults = {ODD: 1}
    text, tags = read(report.write(folders, tmp_path / "page.html", defaults))
    assert "b0" not in {tag for tag, _ in tags.seen}
    assert text.count("&lt;b0&gt;") > 20
    assert (' class="changed"' in text) == (not several)  # the runs have equal keys


def test_nothing_comes_from_a_network(run_page: Path) -> None:
    text, tags = read(run_page)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in tags.seen}
    links = [v for _, attributes in tags.seen for k, v in attributes.items() if k.endswith("href")]
    assert all(link and link.startswith("#") for link in links)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_same_run_same_page(tmp_path: Path, run_page: Path) -> None:
    again = report.write([run_page.parent], tmp_path / "again.html")
    assert again.read_bytes() == run_page.read_bytes()


def test_skipped_steps_are_shown(run_page: Path) -> None:
    text, _ = read(run_page)
    assert "Skipped steps" in text
    assert "at 7<" in text


def test_what_was_left_out_is_shown(run_page: Path) -> None:
    text, _ = read(run_page)
    assert "Left out of the data" in text
    assert "1,204" in text
    assert "of stdlib, b: 3 undecodable, 1 broken link, 1,200 empty" in text


@pytest.mark.parametrize(("reason", "is_shown"), [("empty", False), ("undecodable", True)])
def test_only_lost_text_has_a_card(reason: str, is_shown: bool, tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text()) | {"data": {"left_out": {"a": {reason: 3}}}}
    (run / "run.json").write_text(json.dumps(facts))
    text, _ = read(report.write([run], tmp_path / "report.html"))
    assert ('<div class="card warn"><div class="name">Left out of the data' in text) == is_shown


@pytest.mark.parametrize("norm", [math.nan, math.inf, 7.5, None])
@pytest.mark.parametrize("steps", [12, 40, 1500])
def test_every_skipped_step_has_a_mark(norm: float | None, steps: int, tmp_path: Path) -> None:
    """At the step's norm, or at the upper edge if the norm is missing or not finite."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    skipped = {3, 9, 10}
    with metrics.Writer(workdir) as writer:
        for step in range(1, steps + 1):
            values = record(step) | {"optim/skipped_total": float(sum(n <= step for n in skipped))}
            if step in skipped:
                values["optim/grad_norm"] = norm
            writer.write({key: value for key, value in values.items() if value is not None})
    (run,) = folder.load([workdir])
    norms = next(curve for curve in figures_lib.CURVES if curve.title == "Gradient norm")
    with figures_lib.canvas("Gradient norm", False) as (axes, finish):
        figures_lib._skipped(axes, run, "red")
        at_norm = [point for line in axes.lines for point in np.asarray(line.get_xydata())]
        at_edge = [point for found in axes.collections for point in np.asarray(found.get_offsets())]
        finish()
    wanted = sorted(4096.0 * step for step in skipped)
    assert sorted(x for x, _ in [*at_norm, *at_edge]) == wanted
    assert len(at_norm) == (3 if norm == 7.5 else 0)
    assert "nan" not in figures_lib._draw(norms, [run])


def marked(text: str) -> set[str]:
    return set(re.findall(r'<tr class="changed"><th>(.*?)</th>', text))


def test_configuration_marks_the_command_line(run_page: Path) -> None:
    text, _ = read(run_page)
    assert marked(text) == {"model.width"}


def test_configuration_marks_differences_from_defaults(tmp_path: Path) -> None:
    defaults = {**CONFIG, "seed": 1}
    del defaults["format"]
    workdir = make(tmp_path / "run", steps=0)
    text, _ = read(report.write([workdir], tmp_path / "report.html", defaults))
    assert marked(text) == {"seed"}


def test_several_runs(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", steps=20)
    (b / "config.json").write_text(json.dumps({**CONFIG, "seed": 3}))
    text, _ = read(report.write([a, b], tmp_path / "report.html"))
    assert marked(text) == {"seed"}
    assert 'class="best"' not in text, "one saw twice the tokens"
    with metrics.Writer(b) as writer:
        writer.write(record(40))
    text, _ = read(report.write([a, b], tmp_path / "report.html"))
    best, worst = 5.0 / 40**0.2, 5.0 / 20**0.2
    assert f'<span class="best">{best:.4f}</span>' in text
    assert f"<span>{worst:.4f}</span>" in text
    assert len(figures(text)) == 7
    colors = re.findall(r'style="background:(#\w+)"></span><span>(a|b)</', text)
    assert colors[:2] == colors[2:] == list(zip(figures_lib.PALETTE, "ab", strict=False))
    assert ">a</text>" not in text, "the page names its runs once, above the figures"
    for path in (tmp_path / "report_figures").iterdir():
        assert re.findall(r">(a|b)</text>", path.read_text()) == ["a", "b"]
    loss = (tmp_path / "report_figures" / "loss.svg").read_text()
    assert re.findall(r">(training|validation stdlib)</text>", loss)


def test_a_table_of_many_columns_names_them_in_every_cell() -> None:
    """A phone shows each row as a block, without the head of the table."""
    head = ("run", "a", "b & c", "d")
    assert '<td data-head="b &amp; c">2</td>' in page.table([["x", 1, 2, 3]], head)
    assert "data-head" not in page.table([["x", 1]], head[:2])


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    runs = folder.load([make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == ["x/run", "y/run"]


@pytest.mark.parametrize("missing", ["config.json", "run.json", "samples.jsonl", metrics.FILE])
def test_a_missing_piece(tmp_path: Path, missing: str) -> None:
    workdir = make(tmp_path / "run", steps=0)
    (workdir / missing).unlink()
    text, _ = read(report.write([workdir], tmp_path / "report.html"))
    assert "No records yet" in text
    assert ("greedy" in text) == (missing != "samples.jsonl")
    assert ("All 4 keys" in text) == (missing != "config.json")
    assert ("abc123" in text) == (missing != "run.json")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_just_begun(tmp_path: Path, steps: int) -> None:
    text, _ = read(report.write([make(tmp_path / "run", steps)], tmp_path / "report.html"))
    assert "no evaluation yet" in text
    assert "Bits per byte" in figures(text)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    workdir = make(tmp_path / "run")
    with metrics.Writer(workdir) as writer:
        for step in range(41, 45):
            nan = dict.fromkeys(("train/loss", "train/bpb", "optim/grad_norm"), math.nan)
            writer.write(record(step) | nan)
    (workdir / "config.json").unlink()
    other = make(tmp_path / "other", steps=50)
    text, _ = read(report.write([workdir], tmp_path / "report.html"))
    assert len(figures(text)) == 7
    assert text.count("not finite</span>") == 3  # both losses, and the note on skipped steps
    (run,) = folder.load([workdir])
    assert figures_lib._gaps(*run.series("train/loss")) == [(41 * 4096.0, 44 * 4096.0)]
    assert figures_lib._gaps(*run.series("lr/hidden")) == []
    with metrics.Writer(workdir) as writer:
        writer.write(record(50) | {"eval/stdlib/bpb": math.nan, "eval/stdlib/loss": math.nan})
    text, _ = read(report.write([workdir, other], tmp_path / "report.html"))
    assert re.findall('class="best">(.*?)<', text) == [f"{5.0 / 50**0.2:.4f}"]


def test_training_time_counts_unlogged_steps(tmp_path: Path) -> None:
    workdir = make(tmp_path / "run", steps=1)
    with metrics.Writer(workdir) as writer:
        for step in (10, 20):
            writer.write({"step": step, "tokens": step, "time/step_seconds": 2.0})
    (run,) = folder.load([workdir])
    assert run.training_seconds() == pytest.approx(0.5 + 9 * 2.0 + 10 * 2.0)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    lines = [json.dumps(record(step)) + "\n" for step in range(1, 5001)]
    (workdir / metrics.FILE).write_text("".join(lines))
    assert report.write([workdir], tmp_path / "report.html").stat().st_size < 600_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("config.json", "[]", "it holds a list, not an object"),
        ("samples.jsonl", "{\n{}\n", "samples.jsonl is damaged"),
        (metrics.FILE, "{\n{}\n", "metrics.jsonl:1 is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    workdir = make(tmp_path / "run", steps=0)
    (workdir / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        report.write([workdir], tmp_path / "report.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        report.write([tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(UserError, match="holds no run"):
        report.write([tmp_path], tmp_path / "report.html")


def test_amounts_and_durations() -> None:
    assert [page.amount(v) for v in (7.0, 1234.0, 1.5e6, 2e9)] == [
        "7",
        "1.23 k",
        "1.50 M",
        "2.00 G",
    ]
    assert page.amount(6000.0, "FLOP") == "6.00 kFLOP"
    assert [page.duration(s) for s in (5.25, 75, 7260)] == ["5.2 s", "1 min 15 s", "2 h 1 min"]
