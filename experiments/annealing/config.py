"""Can the loss of a schedule be predicted before training? One model under three schedules.

Command: espalier train --config=annealing:SCHEDULE[,PEAK]
             --workdir=DIR/SCHEDULE
         SCHEDULE is constant, cosine or wsd; PEAK is 0.01 by default. Model, data, batch, seed and
         length stay the same.
Then:    espalier predict_loss DIR/constant DIR/cosine --key=eval/stdlib/loss
             --held_out=DIR/wsd
Cost:    2,000 steps of 2,048 tokens, 0.2 M parameters; 23 minutes a run on two cores, shared with
         five other trainings.
Expected: README.md holds a prediction and the measured loss.
"""

from ml_collections import ConfigDict

from experiments import base

SCHEDULES = {
    "constant": {"family": "constant"},
    "cosine": {"family": "cosine"},
    "wsd": {"family": "wsd", "decay": "20 percent"},
}


def get_config(arg: str) -> ConfigDict:
    """The base configuration made small; `arg` is SCHEDULE or SCHEDULE,PEAK."""
    name, _, peak = arg.partition(",")
    if name not in SCHEDULES:
        raise ValueError(f"name one of {', '.join(SCHEDULES)}, not {name!r}")
    config = base.get_config()
    config.model.update(
        {"width": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    )
    config.model.ffn_dim = 176
    config.model.pattern = "softmax"
    config.mup.residual_multiplier = 1.0
    config.data.tokenizer.vocab_size = 1024
    config.data.update({"context_length": 128, "batch_size": 16})
    config.schedule = SCHEDULES[name] | {"warmup": "100 steps"}
    config.schedule.peak_learning_rate = float(peak or 0.01)
    config.run.length = "2000 steps"
    config.evaluate.every = "20 steps"
    config.log.samples = ()
    config.checkpoint.every = "50 percent"
    return config
