"""Published hybrids as patterns: is a little attention among recurrent layers worth its state?

Command: espalier train --config=hybrids:NAME --workdir=DIR
Cost:    one million tokens, 6 to 8 M parameters; 10 to 20 minutes on two CPU cores.
Expected: not measured yet; in the papers, hybrids have a lower loss than their pure mixers of
         equal size.

NAME                  source                        layers
deltanet_window       arXiv 2406.06484, section 4   DeltaNet and sliding window, alternating
deltanet_global       the same                      DeltaNet; full attention as layers 2 and L/2 + 1
based                 arXiv 2402.18668, app. E      periods of 5: convolution, Taylor, window, two
                                                    convolutions
masformer             arXiv 2310.12442              sliding window; full attention in few layers.
                                                    Which ones is UNCONFIRMED: here the first and
                                                    every sixth after it
transnormer           arXiv 2210.10340              block attention in the early half, NormAttention
                                                    in the later half (the split is UNCONFIRMED)
gated_deltanet_h1     arXiv 2412.06464              gated DeltaNet, sliding window, alternating
gated_deltanet_h2     the same                      Mamba-2, gated DeltaNet, sliding window
"""

from ml_collections import ConfigDict

from experiments import base

WINDOW = {"mixer": "softmax", "window": 128}
BLOCK = {"mixer": "softmax", "block": 64, "position_encoding": "none"}


def patterns(depth: int) -> dict[str, tuple[str, ...]]:
    """The label of every layer of each hybrid at this depth."""
    period = ("base_conv", "based", "window", "base_conv", "base_conv")
    full = {1, depth // 2}  # the second layer, and the first of the later half
    return {
        "deltanet_window": ("deltanet", "window"),
        "deltanet_global": tuple("full" if i in full else "deltanet" for i in range(depth)),
        "based": period,
        "masformer": ("full", *["window"] * 5),
        "transnormer": ("block",) * (depth // 2) + ("transnormer",) * (depth - depth // 2),
        "gated_deltanet_h1": ("gated_deltanet", "window"),
        "gated_deltanet_h2": ("mamba2", "gated_deltanet", "window"),
    }


def get_config(arg: str = "deltanet_window") -> ConfigDict:
    """`arg` names the hybrid."""
    config = base.get_config()
    found = patterns(config.model.num_layers)
    if arg not in found:
        raise ValueError(f"no hybrid {arg!r}; one of {', '.join(found)}")
    config.model.layers = {"window": WINDOW, "full": {"mixer": "softmax"}, "block": BLOCK}
    config.model.pattern = found[arg]
    # 1.4 / sqrt(num_layers), MiniCPM's rule (arXiv 2404.06395).
    config.mup.residual_multiplier = 0.57
    return config
