"""Do activations keep their size under muP when a model gets wider, and not without muP?

Command: espalier coord_check --config=coord_check[:OPTIMIZER]
             --mixer=PATTERN --widths=64,128,256,512 --workdir=DIR
         OPTIMIZER is adamw, lion, muon, lamb or adafactor.
Cost:    20 to 40 seconds of one core for each mixer, parametrization and width, most of it
         compilation.
Expected: README.md beside this file holds the tables and figures of measured runs.

The protocol: ten steps at a constant rate without warmup; two seeds (five for the five mixers of
mixers.json); the standard library's sources as bytes, rows of 32 tokens, batches of 8; heads of 16;
two layers. It is a small version of the guide by Cerebras and EleutherAI (widths 256 to 4096, heads
of 64, five seeds, rate 1e-2, init 0.02, AdamW with betas 0.9 and 0.95, decay 0.1, clip 1).

Two choices were made after results had been seen. The rate 4e-3 and the init 0.05 at base width 64
replace the guide's; they come from an earlier trial of this check, whose numbers are lost. Logits
count only in the second half of the steps, since they fall at first, as they must if the readout
does not start at zero. Judging the change of the logits since init instead (Tensor Programs V,
arXiv 2203.03466, fig. 5) was tried and dropped: with 256 tokens a batch it also falls after the
first steps, and then flattens as the logits do. Multipliers of embedding and branches are 1, so
that the two parametrizations differ only through the width.
"""

from ml_collections import ConfigDict

from experiments import base

# Peak rates. For lamb and adafactor, whose steps are relative, a rate is a share of the matrix.
RATES = {"adamw": 4e-3, "lion": 1e-3, "muon": 4e-3, "lamb": 1e-2, "adafactor": 1e-2}


def get_config(arg: str = "adamw") -> ConfigDict:
    """`arg`: an optimizer."""
    if arg not in RATES:
        raise ValueError(f"there is no rate for {arg!r}; optimizers: {', '.join(RATES)}")
    config = base.get_config()
    config.model.update({"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4})
    config.model.update({"head_dim": 16, "ffn_dim": 128})
    config.model.pattern = "softmax"
    # The state of mamba2 would be far wider than these heads.
    config.model.layers = {"mamba2": {"mixer": "mamba2", "state_dim": 16}}
    config.mup.update({"base_width": 64.0, "init_std": 0.05})
    config.mup.update({"embedding_multiplier": 1.0, "residual_multiplier": 1.0})
    config.data.tokenizer.update({"kind": "bytes", "vocab_size": 257})
    config.data.update({"context_length": 32, "batch_size": 8})
    config.schedule = {
        "family": "constant",
        "peak_learning_rate": RATES[arg],
        "warmup": "0 steps",
    }
    if arg != "adamw":
        config.optimizer = {"family": arg}
    config.log.samples = ()
    return config
