"""Which strategy splits the time axis of an op."""

from typing import NamedTuple

from kernels import spelling
from kernels.contract import Dims, Op, Options, Strategy


class Way(NamedTuple):
    """A strategy that can split the time axis, and why it was taken."""

    strategy: str
    reason: str


def choose(op: Op, strategy: str, dims: Dims, options: Options, ranks: int) -> tuple[Strategy, str]:
    """The strategy that is named, or of those that take the problem ("auto") the one that sends
    least, forward and backward; and why.

    Raises:
      ValueError: an unknown strategy, or none that takes the problem.
    """
    if op.sequence:
        names = (*(one.name for one in op.sequence), "auto")
        spelling.check(f"strategy of {op.name}", strategy, names)
    sizes: dict[str, float] = {}
    refused: list[str] = []
    for one in op.sequence:
        if strategy in (one.name, "auto"):
            reason = one.unsupported(dims, options, ranks)
            if reason is None:
                sizes[one.name] = sum(one.sent(op, dims, options, 2, ranks))
            else:
                refused.append(f"{one.name}: {reason}")
    if not sizes:
        why = "; ".join(refused) or "it has no strategy for that (no sequence.py)"
        raise ValueError(f"{op.name} cannot split T over {ranks} ranks: {why}")
    least = min(sizes, key=lambda name: sizes[name])
    found = next(one for one in op.sequence if one.name == least)
    if strategy != "auto":
        return found, "named by the user"
    told = ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in sizes.items())
    return found, "; ".join([f"a rank sends in bfloat16 {told}", *refused])
