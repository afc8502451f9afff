"""Plain values become a configuration and back. Every mistake is one line that says what to set."""

import copy
import json
from typing import Any

import pytest

from experiments import base, quickstart
from experiments.kernels import config as kernels_experiment
from lm import config as config_lib
from lm.config import Duration, UserError, convert, from_mapping, to_mapping


def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The base configuration with dotted keys set; a value DELETE removes the key."""
    mapping = base.get_config().to_dict()
    for key, value in (changes or {}).items():
        *groups, leaf = key.split(".")
        node = mapping
        for group in groups:
            node = node[group]
        if value is DELETE:
            del node[leaf]
        else:
            node[leaf] = value
    return mapping


DELETE = object()
SOURCE = {"path": "*.txt", "text_key": "text", "weight": 1.0, "valid_fraction": 0.1}


def test_experiments_convert() -> None:
    assert from_mapping(values()).tokens_per_step == 8 * 512
    small = from_mapping(quickstart.get_config("softmax,stickbreaking").to_dict())
    assert (small.tokens_per_step, small.model.pattern) == (4 * 512, "softmax,stickbreaking")


def test_presets_of_kernels_convert() -> None:
    """The presets have about 110 million parameters, and use each mixer in its chunked form and in
    the kernel of the preset's device.
    """
    wanted = {
        "smoke": ["auto"] * 5,
        "gpu": ["jax_nn", *["triton_gpu"] * 4],
        "tpu": ["pallas_tpu"] * 5,
    }
    assert wanted.keys() == kernels_experiment.PRESETS.keys()
    for preset, kernels in wanted.items():
        study = kernels_experiment.get_config(f"{preset},data").to_dict()
        run = from_mapping(study["run"])
        forms = [run.model.layers[label]["form"] for label in study["patterns"]]
        assert forms == [form for kernel in kernels for form in ("chunked", kernel)]


def test_groups_fit_into_an_experiment() -> None:
    config: Any = base.get_config()
    config.model.pattern = ((5, ("stickbreaking",)), (1, ("softmax",)))
    assert from_mapping(config.to_dict()).model.pattern[1] == (1, ("softmax",))
    other: Any = base.get_config()
    assert other.model.pattern == "stickbreaking"


def test_empty_prompt_is_refused_before_training() -> None:
    config: Any = base.get_config()
    config.log.samples = ("",)
    with pytest.raises(UserError, match="empty prompt"):
        from_mapping(config.to_dict())


def test_json_and_back() -> None:
    changes = {
        "model.layers": {"a": {"mixer": "softmax", "window": 5}},
        "model.pattern": ((2, ("a",)), (4, "stickbreaking")),
        "run.length": "1234567890 tokens",
        "schedule.decay": "12.5 percent",
    }
    config = from_mapping(values(changes))
    again = from_mapping(json.loads(json.dumps(to_mapping(config))))
    assert again == config
    assert again.run_tokens == -(-1234567890 // 4096) * 4096
    assert again.model.layers["a"]["window"] == 5


def test_the_result_is_frozen() -> None:
    mapping = values({"model.layers": {"a": {"mixer": "softmax"}}})
    config = from_mapping(mapping)
    mapping["model"]["layers"]["a"]["mixer"] = "other"
    assert config.model.layers["a"]["mixer"] == "softmax"
    with pytest.raises(TypeError):
        config.model.layers["b"] = {}  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("3 steps", 300.0), ("1e6 tokens", 1e6), ("10 percent", 500.0), ("0 steps", 0.0)],
)
def test_durations(text: str, tokens: float) -> None:
    duration = Duration.parse(text, "here")
    assert duration.tokens(run_tokens=5000, tokens_per_step=100) == tokens
    assert Duration.parse(str(duration), "here") == duration


@pytest.mark.parametrize(
    "text", ["3", "3 epochs", "x steps", "-1 steps", "nan steps", "inf tokens"]
)
def test_bad_durations(text: str) -> None:
    with pytest.raises(UserError, match="here="):
        Duration.parse(text, "here")


def test_durations_in_steps_round_and_zero_is_never() -> None:
    config = from_mapping(values({"run.length": "10 steps", "schedule.warmup": "0 steps"}))
    assert config.run_tokens == 10 * 4096
    steps = {d: config.steps(Duration.parse(d, "")) for d in ("1 tokens", "25 percent", "0 steps")}
    assert steps == {"1 tokens": 1, "25 percent": 2, "0 steps": 0}


def test_differences_are_flat() -> None:
    old, new = values(), values({"model.width": 128, "data.sources.more": SOURCE})
    found = config_lib.difference(old, new)
    assert found["model.width"] == (256, 128)
    assert found["data.sources.more.weight"] == (None, 1.0)
    assert len(found) == 1 + len(SOURCE)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"model.widht": 3}, "unknown key config.model.widht; did you mean 'width'?"),
    ({"zzz": 3}, "unknown key config.zzz; known: checkpoint, data"),
    ({"model.width": DELETE}, "missing key config.model.width"),
    ({"model.width": 2.5}, "config.model.width=2.5 is a float; set a int"),
    ({"model.width": True}, "config.model.width=True is a bool; set a int"),
    ({"model.width": "64"}, "config.model.width='64' is a str; set a int"),
    ({"model.width": 0}, "model.width=0 must be positive"),
    ({"model": 3}, "config.model=3 is a int"),
    ({"model.tied_embeddings": 1}, "is a int; set a bool"),
    ({"model.precision": "fp16"}, "'fp16' is not one of float32, bfloat16, bfloat16_operands"),
    ({"model.remat": "some"}, "not one of none, full, dots, named"),
    ({"model.num_kv_heads": 3}, "num_heads=4 is not a multiple of model.num_kv_heads=3"),
    ({"schedule.family": "zigzag"}, "config.schedule: unknown schedule 'zigzag'; known: constant"),
    ({"schedule": {"family": "wsd", "a": 4.0}}, "unknown option config.schedule.a; known"),
    ({"schedule": 3}, "config.schedule=3: name a schedule, {'family': NAME, ...}"),
    ({"model.mlp": {"family": "swiglu", "ffn": 3}}, "unknown option config.model.mlp.ffn"),
    ({"model.layers": {"a": 3}}, "config.model.layers.a=3 is a int"),
    ({"seed": -1}, "seed=-1 must lie in [0, 2^31)"),
    ({"loss.z_loss": -0.1}, "loss.z_loss=-0.1 must be >= 0"),
    ({"loss.z_loss": float("nan")}, "config.loss.z_loss=nan must be finite"),
    ({"optimizer.beta2": 1.0}, "optimizer.beta2=1.0 must lie in [0, 1)"),
    ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm=0.0 must be positive"),
    ({"run.accumulation": 3}, "data.batch_size=8 is not a multiple of run.accumulation=3"),
    ({"run.length": "50 percent"}, "run.length=50 percent must be a positive number of"),
    ({"run.length": 100}, "config.run.length=100 is a int; set a str"),
    ({"evaluate.every": "3"}, "config.evaluate.every='3' is not a duration"),
    ({"init_from": "a", "decay_from": "b"}, "exclude each other"),
    ({"schedule.b": 0.5}, "Power needs a > 0 and b < 0"),
    ({"schedule.final_ratio": 2.0}, "schedule.final_ratio=2.0 must lie in [0, 1]"),
    ({"schedule.decay": "95 percent"}, "shorten them or lengthen the run"),
    ({"decay_from": "x", "schedule.decay": "0 steps"}, "set a decay > 0"),
    ({"mup.parametrization": "standard"}, "mup.embedding_multiplier=12.0 with"),
    (
        {"mup.parametrization": "completep"},
        "needs the depth at which its rates are stated; set mup",
    ),
    (
        {"mup.base_depth": 4},
        "and mup.parametrization='mup'; set mup.base_depth=0",
    ),
    ({"mup.base_depth": -1}, "mup.base_depth=-1 must be >= 0"),
    ({"mup.alpha": 0.75}, "mup.alpha=0.75 is only used by completep, and mup.par"),
    ({"mup.alpha": 0.4}, "mup.alpha=0.4 must lie in [0.5, 1]; set mup.alpha=1.0"),
    (
        {"optimizer": {"family": "lamb", "weight_decay_mode": "independent"}},
        "weight_decay_mode='independent' says how much a step shrinks",
    ),
    ({"mesh.data": -1, "mesh.fsdp": -1}, "one may be -1 (all that is left); set mesh."),
    ({"mesh.tensor": 0}, "one may be -1 (all that is left); set mesh.tensor=1"),
    ({"mesh.replicate": "H"}, "config.mesh.replicate='H' is a str"),
    ({"mesh.replicate": [3]}, "config.mesh.replicate[0]=3 is a int; set a str"),
    ({"data.sources": {"s": SOURCE | {"weight": 0.0}}}, "no source with weight > 0"),
    ({"data.sources.s": SOURCE | {"weight": -1.0}}, "data.sources.s.weight=-1.0 must be >= 0"),
    ({"data.sources.s": SOURCE | {"valid_fraction": 1.5}}, "must lie in [0, 1]"),
    ({"data.sources.s": SOURCE | {"valid_fraction": 1.0}}, "nothing is left to train on"),
    ({"data.sources.s": {"path": "x"}}, "missing key config.data.sources.s.text_key"),
    ({"data.tokenizer.kind": "json"}, "data.tokenizer.kind='json' needs data.tokenizer.path"),
    ({"data.tokenizer.path": "x"}, "reads no file; set path to ''"),
    ({"data.tokenizer.vocab_size": 100}, "vocab_size=100 must be >= 257"),
    ({"log.samples": "def "}, "config.log.samples='def ' is a str"),
    ({"log.samples": ["ab\udcff"]}, "config.log.samples[0] is not UTF-8 at place 2"),
    ({"log.sample_tokens": 1 << 30}, "sample_tokens=1073741824 tokens must be at most 2^20"),
    ({"schedule.a": 1e308}, "config.schedule.a=1e+308 must be 0, or from 1.2e-38 to 3.4e38"),
    ({"data.batch_size": 10**12}, "config.data.batch_size=1000000000000 must be below 2^31"),
    ({"data.batch_size": 1 << 23}, "are 4294967296 tokens a step, which must be below 2^31"),
    ({"run.length": "1e13 tokens"}, "run.length=1e+13 tokens is 2441406250 steps, which must be"),
    ({"model.width": 1 << 63}, "config.model.width=9223372036854775808 must be below 2^31"),
    ({"model.width": 1 << 30, "model.ffn_dim": 1 << 20}, "model.num_layers=6 are 6.8e+15 weights"),
    (
        {"model.num_layers": (1 << 31) - 1},
        "ffn_dim=704 in model.num_layers=2147483647 are 3.9e+14 w",
    ),
    (
        {"model.head_dim": 1 << 22, "model.width": 1 << 19},
        "head_dim=16777216 in model.num_layers=6 are 5.3",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_mapping(values(changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 220


def test_an_integer_serves_as_a_float_and_nothing_else_converts() -> None:
    assert from_mapping(values({"loss.z_loss": 0})).loss.z_loss == 0.0
    assert isinstance(from_mapping(values({"loss.z_loss": 0})).loss.z_loss, float)
    assert convert(tuple[str, ...], ["a"], "x") == ("a",)
    with pytest.raises(UserError, match="x='1' is a str; set a float"):
        convert(float, "1", "x")


def test_values_are_not_changed_by_conversion() -> None:
    mapping = values()
    before = copy.deepcopy(mapping)
    from_mapping(mapping)
    assert mapping == before
