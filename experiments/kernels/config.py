"""Do kernels train the same model as the chunked forms, and how much faster?

Command: espalier compare --config=kernels:gpu,DATA --workdir=DIR
         presets smoke, gpu, tpu; every mixer runs twice, with the device's kernel and chunked
Cost:    gpu, tpu: 10 runs of 20 million tokens, 110 M parameters (not yet measured); smoke: minutes
         on two CPU cores, where both runs of a mixer use the same form.
Expected: equal loss curves within the noise of bfloat16; tokens per second, MFU and peak memory on
         the page of the comparison.

Without DATA the text is the standard library's own sources; DATA is a folder with
enwiki/{train_*,valid}.jsonl.gz.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base

MIXERS = ("softmax", "stickbreaking", "gla", "deltanet", "gated_deltanet")
LARGE = {
    "model": {"width": 768, "num_layers": 12, "num_heads": 12, "head_dim": 64, "ffn_dim": 2048},
    "vocab_size": 32768,
    "context_length": 2048,
    "batch_size": 16,
    "length": "20000000 tokens",
    "max_tokens": 1048576,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "model": {"width": 64, "num_layers": 2, "num_heads": 2, "head_dim": 32, "ffn_dim": 128},
        "vocab_size": 512,
        "context_length": 64,
        "batch_size": 4,
        "length": "4096 tokens",
        "max_tokens": 1024,
        "forms": {"softmax": "auto", "others": "auto"},
    },
    # Kernels by name, since auto takes a kernel only where a measurement shows that it wins.
    "gpu": LARGE | {"forms": {"softmax": "jax_nn", "others": "triton_gpu"}},
    "tpu": LARGE | {"forms": {"softmax": "pallas_tpu", "others": "pallas_tpu"}},
}


def _layers(forms: dict[str, str]) -> dict[str, dict[str, str]]:
    """The two layers of every mixer, by label: with chunked, and with the kernel."""
    layers: dict[str, dict[str, str]] = {}
    for mixer in MIXERS:
        layers[f"{mixer}-chunked"] = {"mixer": mixer, "form": "chunked"}
        form = forms.get(mixer, forms["others"])
        layers[f"{mixer}-kernel"] = {"mixer": mixer, "form": form}
    return layers


def get_config(arg: str = "smoke") -> ConfigDict:
    """`arg`: a preset, or a preset and the folder of the data, "gpu,DATA"."""
    name, _, data = arg.partition(",")
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; presets: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    run = base.get_config()
    run.model.update(preset["model"] | {"num_kv_heads": preset["model"]["num_heads"]})
    run.model.precision = "bfloat16"
    layers = _layers(preset["forms"])
    run.model.layers = layers
    # 1.4 / sqrt(num_layers), MiniCPM's rule (arXiv 2404.06395).
    run.mup.residual_multiplier = round(1.4 / preset["model"]["num_layers"] ** 0.5, 3)
    if data:
        run.data.sources = base.enwiki(data)
    run.data.tokenizer.vocab_size = preset["vocab_size"]
    run.data.context_length = preset["context_length"]
    run.data.batch_size = preset["batch_size"]
    run.run.length = preset["length"]
    run.schedule.warmup = "10 percent"
    run.log.samples = ()
    run.evaluate.every = "50 percent"
    run.evaluate.max_tokens = preset["max_tokens"]
    return ConfigDict(
        {
            "question": "Do the kernels train the same model, and how much faster?",
            "run": run,
            "patterns": tuple(layers),
            "variants": {},
            "primary": (),  # one seed: enough to compare curves and speed, not for a verdict
            "seeds": (0,),
            "tuned_on": (),
            "tasks": {"position": {}},
            "recall": {},
            "timing_rounds": 3,
            "decode_contexts": (),
        }
    )
