"""The letters of every shape in `kernels`: annotations, logical axes and einsum strings share them.

Einsum strings write the letters in lower case.
"""

from jaxtyping import Array

LEGEND = {
    "B": "batch: sequences per batch",
    "T": "time: positions of the inputs and outputs of this call",
    "S": "source: key positions when they differ from T (a cache)",
    "D": "model width",
    "H": "query heads",
    "G": "key/value heads; H is a multiple of G, query head h reads head h // (H // G)",
    "K": "width of a query or key head",
    "V": "width of a value head",
    "F": "feed-forward width",
    "E": "experts",
    "L": "layers",
    "R": "low rank",
    "C": "chunk length",
    "N": "number of chunks, or of modes of a diagonal recurrence",
    "W": "taps of a convolution along time",
}

type Inputs = dict[str, Array]
