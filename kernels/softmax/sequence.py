"""Softmax attention over a split time axis: every rank gathers all keys and values."""

from kernels.primitives import gathered_keys

STRATEGIES = (gathered_keys.GATHER,)
