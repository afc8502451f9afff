"""Does it work here? A stick-breaking model on the standard library's sources, in minutes.

Command: espalier train --config=quickstart[:PATTERN] --workdir=DIR
         PATTERN is a mixer or a cycle of them: softmax, or softmax,stickbreaking.
Cost:    one million tokens, 2.4 M parameters; <= 5 minutes on two idle CPU cores.
Expected: validation bits per byte < 1.85 (README.md holds a measured run).
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(arg: str = "") -> ConfigDict:
    """The base configuration made small; `arg` names the pattern of mixers."""
    config = base.get_config()
    config.model.update(
        {"width": 192, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 512}
    )
    if arg:
        config.model.pattern = arg
    # 1.4 / sqrt(num_layers), MiniCPM's rule (arXiv 2404.06395).
    config.mup.residual_multiplier = 0.7
    # The rate is stated for this width, and logits begin small (docs/first_run.md). The first loss
    # is 8.7. After 100 steps the loss is below that with base.py's constants, on two seeds.
    config.mup.update({"base_width": 192.0, "init_std": 0.0625, "embedding_multiplier": 6.0})
    config.data.batch_size = 4
    config.schedule.warmup = "50000 tokens"
    config.log.samples = ("def read(self, size=-1):\n", "class Queue:\n")
    config.log.sample_tokens = 96
    return config
