"""Do eight devices that share rows of 16,384 tokens train as one device does?

Command: espalier train --config=long_rows:DATA --workdir=DIR/one
         JAX_NUM_CPU_DEVICES=8 espalier train --config=long_rows:DATA
             --config.mesh.sequence=8 --workdir=DIR/eight
         espalier same_curve DIR/one DIR/eight --out=long_rows.json
Cost:    20 steps of one row, 0.9 M parameters; about 10 minutes a run on two CPU cores.
Expected: the losses of every step agree up to rounding; README.md holds a measured pair.

DATA is a folder with novels/train.jsonl.gz and novels/valid.jsonl.gz, books longer than a row. The
four layers use all kinds of strategy: two gather keys and values, two gather states, and the short
convolutions exchange a halo.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(data: str) -> ConfigDict:
    """`data`: the folder of the data."""
    config = base.get_config()
    config.model.update(
        {"width": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    )
    config.model.ffn_dim = 176
    config.model.pattern = "gated_deltanet,softmax,gla,stickbreaking"
    config.model.remat = "full"
    config.mesh.data = 1
    config.mup.base_width = 64.0
    config.mup.residual_multiplier = 0.7
    config.data.sources = {
        "novels": base.source(f"{data}/novels/train.jsonl.gz", weight=1.0, valid_fraction=0.0),
        "heldout": base.source(f"{data}/novels/valid.jsonl.gz", weight=0.0, valid_fraction=1.0),
    }
    config.data.context_length = 16384
    config.data.batch_size = 1
    config.run.length = "20 steps"
    config.schedule.warmup = "5 steps"
    config.log.samples = ()
    config.evaluate.every = "20 steps"
    config.evaluate.max_tokens = 32768
    return config
