"""Is mixer A better than mixer B, at what length, at what cost? One command, one page.

Command: espalier compare --config=compare:cpu,DATA --workdir=DIR
         presets smoke, minutes, cpu, gpu; flags can set any value, such as
         --config.patterns="('softmax','gla')", or --config.run.run.length="3e7 tokens" overnight
Cost:    on two CPU cores: smoke two minutes, minutes about ten (not yet measured), cpu about three
         hours; gpu about ten minutes on one H100 (not yet measured). The same command resumes.
Expected: README.md beside this file holds the page of a measured run.

Without DATA the text is the standard library's sources, and only tasks without files are used.
DATA is a folder with enwiki/{train_*,valid}.jsonl.gz, novels/valid.jsonl.gz, blimp/blimp.tar.gz,
lambada/lambada_test.jsonl.gz and requests/*.jsonl.gz.
"""

from ml_collections import ConfigDict

from experiments import base
from experiments.recall import config as recall_config

MIXERS = ("softmax", "stickbreaking", "gla", "deltanet", "gated_deltanet", "mamba2")

PRESETS = {
    "smoke": {
        "model": {"width": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "ffn_dim": 96},
        "length": "8192 tokens",
        "context_length": 64,
        "batch_size": 8,
        "patterns": ("softmax", "gla"),
        "seeds": (0, 1),
        "decode_contexts": (64, 256),
        "max_tokens": 4096,
        "items": 20,
    },
    # The fewest tokens and tasks that still end in a verdict: notebooks/compare.ipynb.
    "minutes": {
        "model": {"width": 128, "num_layers": 2, "num_heads": 4, "head_dim": 32, "ffn_dim": 352},
        "length": "400000 tokens",
        "context_length": 256,
        "batch_size": 8,
        "patterns": ("softmax", "stickbreaking"),
        "seeds": (0, 1, 2, 3),
        "decode_contexts": (256, 1024),
        "max_tokens": 65536,
        "items": 0,
    },
    "cpu": {
        "model": {"width": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32, "ffn_dim": 352},
        "length": "1500000 tokens",
        "context_length": 512,
        "batch_size": 4,
        "patterns": MIXERS,
        "seeds": (0, 1, 2, 3),
        "decode_contexts": (1024, 4096, 16384),
        "max_tokens": 131072,
        "items": 200,
    },
    "gpu": {
        "model": {"width": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, "ffn_dim": 1408},
        "length": "20000000 tokens",
        "context_length": 2048,
        "batch_size": 16,
        "patterns": MIXERS,
        "seeds": (0, 1, 2, 3),
        "decode_contexts": (1024, 4096, 16384),
        "max_tokens": 1048576,
        "items": 1000,
    },
}


def get_config(arg: str = "cpu") -> ConfigDict:
    """`arg`: a preset, or a preset and the folder of the data, "cpu,DATA"."""
    name, _, data = arg.partition(",")
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; presets: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    run = base.get_config()
    run.model.update(preset["model"] | {"num_kv_heads": preset["model"]["num_heads"]})
    # 1.4 / sqrt(num_layers), MiniCPM's rule (arXiv 2404.06395).
    run.mup.residual_multiplier = round(1.4 / preset["model"]["num_layers"] ** 0.5, 3)
    if data:
        run.data.sources = base.enwiki(data)
    if name == "smoke":
        run.data.tokenizer.update({"kind": "bytes", "vocab_size": 257})
        run.schedule.warmup = "1024 tokens"
    if name == "minutes":
        run.data.tokenizer.vocab_size = 2048
        run.schedule.warmup = "10 percent"
    if name == "gpu":
        run.model.precision = "bfloat16"
    run.data.context_length = context = preset["context_length"]
    run.data.batch_size = preset["batch_size"]
    run.run.length = preset["length"]
    run.log.samples = ()
    run.evaluate.every = "100 percent" if name == "minutes" else "50 percent"
    run.evaluate.max_tokens = preset["max_tokens"]
    return ConfigDict(
        {
            "question": "Which mixer is better, at what length, at what cost?",
            "run": run,
            "patterns": preset["patterns"],
            "variants": {},
            "primary": tuple(
                {"task": "bits_per_byte", "pattern": pattern, "against": preset["patterns"][0]}
                for pattern in preset["patterns"][1:]
            ),
            "seeds": preset["seeds"],
            "tuned_on": (),
            "tasks": tasks(data, context, preset["items"]),
            "recall": recall_config.get_config(name).to_dict() if name == "cpu" else {},
            "timing_rounds": 7,
            "decode_contexts": preset["decode_contexts"],
        }
    )


def tasks(data: str, context: int, items: int) -> dict[str, dict[str, object]]:
    """The tasks of every run, with `items` of each task that has items; 0: none of those tasks."""
    found: dict[str, dict[str, object]] = {"position": {}}
    if not items:
        return found
    found |= {"forgetting": {"max_items": items // 4, "segment": context // 8}}
    if context >= 256:  # a shorter context does not hold the prompt
        found |= {"passkey": {}}
    if not data:
        return found
    requests = f"{data}/requests"
    choice = {"task": "multiple_choice", "max_items": items // 4, "max_len": 4 * context}
    return found | {
        "length": {
            "path": f"{data}/novels/valid.jsonl.gz",
            "max_len": 4 * context,
            "shortest": context,
            "targets": context // 2,
        },
        "blimp": {"path": f"{data}/blimp/blimp.tar.gz", "max_items": max(10, items // 10)},
        "lambada": {"path": f"{data}/lambada/lambada_test.jsonl.gz", "max_items": items},
        "hellaswag": {**choice, "path": f"{requests}/hellaswag_rc_5shot.jsonl.gz"},
        "arc_easy": {**choice, "path": f"{requests}/arc_easy_rc_5shot.jsonl.gz"},
        "csqa": {**choice, "path": f"{requests}/csqa_rc_0shot.jsonl.gz"},
        "piqa": {
            **choice,
            "path": f"{data}/piqa/valid.jsonl",
            "labels": f"{data}/piqa/valid-labels.lst",
        },
        "gold_bpb": {
            "path": f"{requests}/codex_humaneval_gold_bpb_0shot.jsonl.gz",
            "max_items": items,
            "max_len": 4 * context,
        },
    }
