"""Which strategy splits the time axis of an op."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import DTypeLike

from kernels import spelling
from kernels.contract import Dims, Op, Options, Sent, Strategy
from kernels.primitives.time_shards import Shards


class Link(NamedTuple):
    """The time that a message takes to the next rank: `latency` seconds, plus its bytes divided by
    `bandwidth` bytes/s.
    """

    latency: float
    bandwidth: float

    def seconds(self, sent: Sent) -> float:
        """The time of the messages of both passes, if computation hides none of it."""
        return sent.hops * self.latency + (sent.forward + sent.backward) / self.bandwidth

    def describe(self, sent: Sent) -> str:
        """For example "0.5 MB in 12 us"; only the bytes if no latency is known."""
        size = f"{(sent.forward + sent.backward) / 1e6:.3g} MB"
        return f"{size} in {self.seconds(sent) * 1e6:.3g} us" if self.latency else size


# With this link the strategy that sends the fewest bytes wins, in any number of messages.
LEAST_BYTES = Link(0.0, 1.0)


class Problem(NamedTuple):
    """A call whose time axis is split. `dims` are those of one rank, except T, which is that of the
    whole row. `options` are complete.
    """

    dims: Dims
    options: Options
    dtype: DTypeLike
    shards: Shards


class Way(NamedTuple):
    """A strategy that can split the time axis, why it was taken, and what a rank sends."""

    strategy: str
    reason: str
    sent: Sent


def choose(op: Op, strategy: str, problem: Problem, link: Link) -> tuple[Strategy, Way]:
    """The named strategy, or with "auto" the one whose messages take the least time, among those
    that support the problem.

    Raises:
      ValueError: the strategy is unknown, none supports the problem, or the op is not causal.
    """
    dims, options, dtype, shards = problem
    if not op.is_causal(options):
        raise ValueError(
            f"{op.name} is not causal with these options and cannot split T; call it on whole rows"
        )
    check_name(op, strategy)
    ranks, itemsize = shards.count, jnp.dtype(dtype).itemsize
    found: dict[str, tuple[Strategy, Sent]] = {}
    refused: list[str] = []
    for one in op.sequence:
        if strategy not in (one.name, "auto"):
            continue
        reason = one.unsupported(dims, options, ranks)
        if shards.layout not in one.layouts:
            reason = f"its tokens must be {' or '.join(one.layouts)}, not {shards.layout}"
        if reason is None:
            found[one.name] = one, one.sent(op, dims, options, itemsize, ranks)
        else:
            refused.append(f"{one.name}: {reason}")
    if not found:
        why = "; ".join(refused) or "it has no strategy for that (no sequence.py)"
        raise ValueError(f"{op.name} cannot split T over {ranks} ranks: {why}")
    one, sent = min(found.values(), key=lambda pair: link.seconds(pair[1]))
    if strategy != "auto":
        return one, Way(one.name, "named by the user", sent)
    costs = ", ".join(f"{link.describe(x)} by {name}" for name, (_, x) in found.items())
    return one, Way(
        one.name, "; ".join([f"the least time: for a row a rank sends {costs}", *refused]), sent
    )


def check_name(op: Op, strategy: str) -> None:
    """Raises ValueError for a strategy that the op does not have."""
    names = (*(one.name for one in op.sequence), "auto")
    if op.sequence and strategy not in names:
        hint = spelling.nearest(strategy, names)
        raise ValueError(f"{op.name} has no strategy {strategy!r} for a split T; {hint}")
