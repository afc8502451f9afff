"""Stick-breaking attention over a split time axis: every rank gathers all keys and values, or
has all tokens of some heads."""

from kernels.primitives import gathered_keys, head_exchange

STRATEGIES = (gathered_keys.GATHER, head_exchange.ALL_TO_ALL)
