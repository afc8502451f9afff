"""Sequence-mixing mathematics as pure functions on arrays; `kernels.dispatch` is the way in."""
