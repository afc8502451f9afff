"""A plan, and the ranking of a search, as plain text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm.parallel import mesh as mesh_lib
from lm.plan import Plan, traffic
from lm.plan.traffic import Flow


def text(plan: Plan) -> str:
    """The whole plan for a terminal."""
    parts = [
        _head(plan),
        _parameters(plan),
        _forms(plan),
        _memory(plan),
        _flows(plan),
        *([_splits(plan)] if plan.splits else []),
        _times(plan),
        _schedule(plan),
        _tail(plan),
    ]
    return "\n\n".join(parts) + "\n"


def rows(lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart; the first is left-aligned, the others right-aligned."""
    cells = [list(line) for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def size(number: float | None) -> str:
    """Bytes, in binary units.

    >>> size(17179869184), size(None)
    ('16.00 GiB', '-')
    """
    if number is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def duration(seconds: float) -> str:
    """
    >>> duration(0.0123), duration(75.0), duration(7300.0)
    ('12.3 ms', '75.0 s', '2.0 h')
    """
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _head(plan: Plan) -> str:
    target, config = plan.target, plan.config
    mesh = ", ".join(mesh_lib.words(plan.mesh, vars(config.mesh)))
    return "\n".join(
        [
            f"target    {target.name}: {target.chips} chips, {target.devices} devices on "
            f"{target.hosts} hosts, topology {target.topology}",
            f"mesh      {mesh or 'one device'}; remat {config.model.remat}, accumulation "
            f"{config.run.accumulation}",
            f"step      {plan.tokens_per_step:,} tokens ({config.data.batch_size:,} rows of "
            f"{config.data.context_length:,}), {plan.flops_per_step:.3g} FLOPs",
            f"run       {config.run_steps:,} steps, {config.run_tokens:,} tokens",
        ]
    )


def _parameters(plan: Plan) -> str:
    lines = []
    for title, counts in plan.parameters.items():
        shares = [f"{name} {number:,}" for name, number in counts.items()]
        lines.append(f"parameters {title}: {', '.join(shares)}")
    return "\n".join(lines)


def _forms(plan: Plan) -> str:
    lines = [("layers", "op", "form", "")]
    for form in plan.forms:
        why = f"substituted: {form.substituted}" if form.substituted else form.reason
        lines.append((f"{form.layers} x {form.label}", form.op, form.form, why))
    return rows(lines)


def _memory(plan: Plan) -> str:
    needs, program = plan.memory, plan.program
    known = program if program is not None and not program.refusal else None
    work = needs.gradients + needs.activations + needs.working
    lines = [
        ("bytes of a device", "formula", "compiled"),
        ("parameters", size(needs.parameters), ""),
        ("optimizer state", size(needs.optimizer), ""),
        ("= state", size(needs.state), size(known.state if known else None)),
        ("batch", size(needs.batch), size(known.batch if known else None)),
        ("gradients", size(needs.gradients), ""),
        ("activations", size(needs.activations), ""),
        ("working", size(needs.working), ""),
        ("= temporaries", size(work), size(known.temporaries if known else None)),
        ("program", "", size(known.code if known else None)),
        ("total", size(needs.total), size(program.total if program else None)),
        ("in host memory", size(needs.host), size(known.host if known else None)),
    ]
    chip = plan.target.chip
    budget = f"{size(chip.usable_bytes)} usable of {size(chip.hbm_bytes)}"
    verdicts = {
        True: f"fits: {budget}",
        False: f"DOES NOT FIT: {budget}",
        None: "memory of the target is not known",
    }
    unsupported = program is not None and program.is_unsupported
    parts = [rows(lines), "REFUSED by the compiler" if unsupported else verdicts[plan.fits]]
    if program is not None and program.refusal:
        parts.append(f"the compiler: {program.refusal[:300]}")
    if program is not None and program.substituted:
        parts.append(f"substituted: {program.substituted}")
    if plan.remedy:
        flags = " ".join(f"--config.{key}={value}" for key, value in plan.remedy.items())
        parts.append(f"change: {flags}")
        parts.append(_mended(plan))
    return "\n".join(parts)


def _mended(plan: Plan) -> str:
    found, budget = plan.mended, size(plan.target.chip.usable_bytes)
    if found is None:
        return "not compiled with that" if plan.program is None else "that saves most, not enough"
    verdict = "does not fit" if found.refusal or (found.total or 0) > _budget(plan) else "fits"
    return f"compiled with that: {size(found.total)} of {budget} usable, {verdict}"


def _budget(plan: Plan) -> int:
    return plan.target.chip.usable_bytes or 0


def _flows(plan: Plan) -> str:
    program = plan.program
    has_program = program is not None and not program.refusal
    compiled = {(f.kind, f.axes): f.bytes for f in program.flows} if program else {}
    formula = {(f.kind, f.axes): f.bytes for f in plan.flows}
    keys = sorted(
        {**formula, **compiled}, key=lambda k: -max(formula.get(k, 0), compiled.get(k, 0))
    )
    lines = [("sent by a device per step", "formula", "compiled")]
    for kind, axes in keys:
        key = (kind, axes)
        if max(formula.get(key, 0), compiled.get(key, 0)) < 1024:
            continue
        name = f"{kind} over {'*'.join(axes) or 'other groups'}"
        found = size(compiled.get(key, 0)) if has_program else "-"
        lines.append((name, size(formula.get(key, 0)), found))
    total = size(_sum(program.flows)) if program and has_program else "-"
    lines.append(("total", size(_sum(plan.flows)), total))
    return rows(lines)


def _splits(plan: Plan) -> str:
    """The bytes that strategies declare, and those of the same kinds in the compiled program."""
    names = ("along the split time axis", "op", "strategy", "forward", "again", "backward")
    lines: list[tuple[str, ...]] = [(*names, "formula", "compiled")]
    for split in plan.splits:
        parts = (split.forward, split.again, split.backward, split.bytes)
        name = f"{split.layers} x {split.label}"
        lines.append((name, split.op, split.strategy, *map(size, parts), ""))
    known = plan.program if plan.program is not None and not plan.program.refusal else None
    found = traffic.of_strategies(plan.splits, known.flows) if known else None
    total = [sum(getattr(x, key) for x in plan.splits) for key in (*names[3:], "bytes")]
    lines.append(("total", "", "", *map(size, (*total, found))))
    return rows(lines)


def _sum(flows: Iterable[Flow]) -> float:
    return sum(flow.bytes for flow in flows)


def _times(plan: Plan) -> str:
    found = plan.times
    if found is None:
        return "time: not modelled, the target has no published rates"
    bound = "compute" if found.compute >= found.memory else "memory"
    if found.network > max(found.compute, found.memory):
        bound = "network"
    return (
        f"modelled, not measured: step {duration(found.step)} = max(compute "
        f"{duration(found.compute)}, memory {duration(found.memory)}) + network "
        f"{duration(found.network)}, bound by {bound}; {found.tokens_per_second:,.0f} tokens/s, "
        f"MFU at most {100 * found.mfu:.0f} %, run "
        f"{duration(plan.config.run_tokens / found.tokens_per_second)}"
    )


def _schedule(plan: Plan) -> str:
    roles = list(plan.schedule[0].rates)
    lines = [("learning rate", "tokens", *roles)]
    for row in plan.schedule:
        lines.append((row.at, f"{row.tokens:,.0f}", *(f"{row.rates[r]:.3g}" for r in roles)))
    return rows(lines)


def _tail(plan: Plan) -> str:
    saving = plan.saving
    often = f"{duration(saving.interval_seconds)}"
    if saving.interval_steps is not None:
        often = f'--config.checkpoint.every="{saving.interval_steps} steps" ({often})'
    return (
        f"checkpoint  {size(saving.bytes)}, {duration(saving.seconds)} at 1 GB/s a host; "
        f"one every {often}\nlaunch      {plan.launch}"
    )
