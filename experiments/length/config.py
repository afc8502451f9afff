"""Does stick-breaking, trained at 512 tokens, read up to 8,192 where RoPE, ALiBi, windows do not?

Command: espalier compare --config=length:DATA --workdir=DIR
Cost:    4 mixers x 5 seeds x 2 million tokens, 0.8 M parameters; about two hours on two CPU
         cores; the same command resumes it.
Expected: README.md beside this file holds the verdict of a measured run.

DATA is a folder with novels/train.jsonl.gz and novels/valid.jsonl.gz: books, each far longer than
the longest window. RoPE is evaluated as trained, and in two ways that are known to keep it stable:
with a window as long as the training rows, and as LM-Infinite (arXiv 2308.16137), which adds the
first tokens and a ceiling on distances.
"""

from ml_collections import ConfigDict

from experiments import base

TRAINED = 512
LAYERS = {
    "rope": {"mixer": "softmax"},
    "alibi": {"mixer": "softmax", "position_encoding": "alibi"},
    "window": {"mixer": "softmax", "window": 256},
    "stickbreaking": {"mixer": "stickbreaking"},
}
INFINITE = {"window": TRAINED, "global_tokens": 8, "distance_ceiling": TRAINED}
# The claim: it reads beyond 512 tokens, as ALiBi does and RoPE does not, and learns as well.
PRIMARY = (
    {"task": "length", "pattern": "stickbreaking", "against": "rope"},
    {"task": "length", "pattern": "alibi", "against": "rope"},
    {"task": "length", "pattern": "rope read as LM-Infinite", "against": "rope"},
    {"task": "bits_per_byte", "pattern": "stickbreaking", "against": "rope"},
    {"task": "bits_per_byte", "pattern": "stickbreaking", "against": "alibi"},
)
VARIANTS = {
    "rope read in a window": {"of": "rope", "layers": {"rope": {"window": TRAINED}}},
    "rope read as LM-Infinite": {"of": "rope", "layers": {"rope": INFINITE}},
}


def get_config(data: str) -> ConfigDict:
    """`data`: the folder of the data."""
    run = base.get_config()
    run.model.update(
        {"width": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32}
    )
    run.model.ffn_dim = 352
    run.model.layers = LAYERS
    run.mup.residual_multiplier = 0.7
    run.data.sources = {
        "novels": base.source(f"{data}/novels/train.jsonl.gz", weight=1.0, valid_fraction=0.0),
        "heldout": base.source(f"{data}/novels/valid.jsonl.gz", weight=0.0, valid_fraction=1.0),
    }
    run.data.context_length = TRAINED
    run.data.batch_size = 4
    run.run.length = "2000000 tokens"
    run.log.samples = ()
    run.evaluate.every = "50 percent"
    run.evaluate.max_tokens = 131072
    length = {"path": f"{data}/novels/valid.jsonl.gz", "max_len": 8192, "shortest": TRAINED}
    return ConfigDict(
        {
            "question": "Trained at 512 tokens, which mixer reads on to 8,192?",
            "run": run,
            "patterns": tuple(LAYERS),
            "variants": VARIANTS,
            "primary": PRIMARY,
            "seeds": (0, 1, 2, 3, 4),
            "tuned_on": (),
            "tasks": {"length": {**length, "windows_per_document": 1}},
            "recall": {},
            "timing_rounds": 3,
            "decode_contexts": (),
        }
    )
