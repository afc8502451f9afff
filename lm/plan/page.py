"""Written plans (plan.json) side by side, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config import UserError
from lm.parallel import mesh as mesh_lib
from lm.plan import traffic
from lm.plan.table import duration, size
from lm.plan.time_axis import Split
from lm.plan.traffic import Flow

Written = Mapping[str, Any]


def page(paths: Sequence[Path]) -> str:
    """A table of the plans; and for each what was proposed and substituted, and how to start it.

    Raises:
      UserError: a file is not a plan.
    """
    plans = {path.stem: _read(path) for path in paths}
    parts = [_table(plans), *(_notes(name, plan) for name, plan in plans.items())]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Written:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plan, dict) or "target" not in plan or "memory" not in plan:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name files that espalier plan wrote") from None
    except ValueError:
        raise UserError(f"{path} is not a plan; name files that espalier plan wrote") from None
    return plan


COLUMNS = "plan|target|mesh|parameters|state|temporaries|total|usable|fits|sent per step|step|MFU"


def _table(plans: Mapping[str, Written]) -> str:
    columns = COLUMNS.split("|")
    rows = [tuple(columns), ("---",) * len(columns)]
    for name, plan in plans.items():
        needs, program, times = plan["memory"], plan["program"] or {}, plan["times"]
        work = needs["gradients"] + needs["activations"] + needs["working"]
        rows.append(
            (
                name,
                plan["target"]["name"],
                _mesh(plan),
                f"{plan['parameters']['by role']['total'] / 1e9:.2f} B",
                _both(needs["state"], program.get("state")),
                _both(work, program.get("temporaries")),
                _both(needs["total"], program.get("total")),
                size(plan["target"]["chip"]["usable_bytes"]),
                {True: "yes", False: "no", None: "-"}[plan["fits"]],
                _both(_sent(plan["flows"]), _sent(program.get("flows", ()))),
                duration(times["step"]) if times else "-",
                f"{100 * times['mfu']:.0f} %" if times else "-",
            )
        )
    head = (
        "Bytes of a device: by formula / by the compiler. Time of a step and MFU are modelled, not "
        "measured."
    )
    return head + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mesh(plan: Written) -> str:
    config = plan["config"]
    accumulation = config["run"]["accumulation"]
    words = [*mesh_lib.words(plan["mesh"], config["mesh"]), f"remat {config['model']['remat']}"]
    return ", ".join(words + ([f"accumulation {accumulation}"] if accumulation > 1 else []))


def _both(formula: float, compiled: float | None) -> str:
    return f"{size(formula)} / {size(compiled)}" if compiled else f"{size(formula)} / -"


def _sent(flows: Sequence[Written]) -> float:
    return sum(flow["bytes"] for flow in flows)


def _splits(splits: Sequence[Written], program: Written) -> str:
    """One sentence on what the ops send along a split time axis."""
    known = [Split(**split) for split in splits]
    parts = [
        f"{size(x.forward)}, again {size(x.again)}, backward {size(x.backward)} for {x.op} of "
        f"{x.label} by {x.strategy}"
        for x in known
    ]
    flows = [Flow(x["kind"], tuple(x["axes"]), x["bytes"]) for x in program.get("flows", ())]
    total, found = sum(x.bytes for x in known), traffic.of_strategies(known, flows)
    sent = f"Along the split time axis a device sends {_both(total, found)} per step; by formula"
    return f"{sent} forward {'; '.join(parts)}."


def _notes(name: str, plan: Written) -> str:
    lines = [f"## {name}", "", "```", plan["launch"], "```"]
    substituted = [f"{f['label']}: {f['form']} ({f['substituted']})" for f in plan["forms"]]
    if any(form["substituted"] for form in plan["forms"]):
        lines += ["", f"Substituted: {'; '.join(substituted)}."]
    if splits := plan.get("splits"):
        lines += ["", _splits(splits, plan["program"] or {})]
    if plan["program"] and plan["program"]["refusal"]:
        lines += ["", f"The compiler: {plan['program']['refusal']}"]
    if "explained" in plan:
        lines += ["", "```", plan["explained"].rstrip(), "```"]
    if plan["remedy"]:
        flags = " ".join(f"--config.{key}={value}" for key, value in plan["remedy"].items())
        mended = plan["mended"]
        found = "not shown to fit"
        if mended and not mended["refusal"]:
            usable = size(plan["target"]["chip"]["usable_bytes"])
            found = f"compiled with it, a device holds {size(mended['total'])} of {usable}"
        lines += ["", f"Proposed: `{flags}`; {found}."]
    return "\n".join(lines)
