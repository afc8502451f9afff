"""Writes the tables of READMEs and guides from committed results.

    espalier numbers                              also rewrites docs/laws.md and docs/reference.md
    espalier numbers --workdir=runs/quickstart    first updates results/quickstart.json from a run

The text between `<!-- numbers: FILE -->` and `<!-- end -->` is generated from FILE, the result of a
command such as `espalier bench`; a test checks it. `FILE OP` shows only the kernels of OP.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from launch.benchmarks.tables import pictures, render
from lm.config import UserError

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- numbers: (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = ["README.md"] + [
    str(path.relative_to(ROOT))
    for pattern in ("docs/*.md", "experiments/*/README.md", "kernels/**/README.md")
    for path in sorted(ROOT.glob(pattern))
    if BLOCK.search(path.read_text(encoding="utf-8"))
]

_WORKDIR = flags.DEFINE_string("workdir", "", "a finished quickstart run to take the numbers from")


def main(argv: list[str]) -> None:
    from launch import reference
    from lm import files
    from lm.report import laws

    if not (ROOT / "README.md").is_file():
        raise UserError(f"{ROOT} is not a checkout; run this in the environment of one")
    if _WORKDIR.value:
        values = summary(Path(_WORKDIR.value).expanduser())
        files.replace(ROOT / "results" / "quickstart.json", json.dumps(values, indent=2) + "\n")
    pages = {"docs/laws.md": laws.markdown(), reference.PAGE: reference.page()} | pictures(ROOT)
    texts = {page: filled((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    for page, text in (pages | texts).items():
        (ROOT / page).write_text(text, encoding="utf-8")


def summary(workdir: Path) -> dict[str, Any]:
    """The contents of results/quickstart.json, from a run."""
    from lm.report import folder

    run = folder.load([workdir])[0]
    rates = run.series("time/tokens_per_second")[1]
    if len(rates) == 0:
        raise UserError(f"--workdir={workdir}: no record has a time; name a longer run")
    numbers = {f"validation bits per byte, {k}": f"{v:.3f}" for k, v in run.validation().items()}
    numbers["tokens trained on"] = f"{run.last('tokens'):,.0f}"
    numbers["parameters"] = f"{run.facts['parameters']['total']:,}"
    numbers["tokens per second, median"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    numbers["minutes in training steps"] = f"{(run.training_seconds() or 0) / 60:.1f}"
    kept = {key: run.facts[key] for key in ("commit", "cpu", "cores", "device_kind", "versions")}
    head = {"command": " ".join(["espalier train", *run.flags()])}
    return head | {"date": run.facts["started"]} | kept | {"numbers": numbers}


def filled(text: str) -> str:
    """`text` with every block regenerated from its file."""

    def block(found: re.Match[str]) -> str:
        head, file, op, end = found.groups(default="")
        return head + render(json.loads((ROOT / file).read_text()), op) + end

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    cli.run(main)
