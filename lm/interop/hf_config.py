"""Converts between config.json of transformers and our configuration. It covers the two families
that are our softmax pattern with SwiGLU: Llama, and Granite, which is Llama with four constants.

    Granite                    ours
    embedding_multiplier       mup.embedding_multiplier
    residual_multiplier        mup.residual_multiplier, of both branches
    attention_multiplier       the mixer's scale of q k itself, in place of head_dim^-1/2
    logits_scaling             width / mup.base_width: a divisor of the logits
    initializer_range          mup.init_std / sqrt(width / base_width), of hidden matrices

Llama is parametrization `standard`, where the four constants are 1, 1, head_dim^-1/2 and 1.

Every key of a config.json is read as transformers 5.24 reads it, or refused, or listed by
`ignored`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.build import Build
from lm.config import UserError
from lm.mixers.softmax import Softmax

LLAMA, GRANITE = "LlamaForCausalLM", "GraniteForCausalLM"
MODEL_TYPES = {LLAMA: "llama", GRANITE: "granite"}
SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
}
# Options of a layer. All other options of the mixer must have their defaults for transformers.
SHARED_OPTIONS = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "scale")
FREE_OPTIONS = ("form", *SHARED_OPTIONS)
FLAX_FIELDS = ("context", "width", "parent", "name")
LABEL = "softmax"
ORIGINAL = "original_max_position_embeddings"
# Kinds of stretched RoPE, and their numbers besides the factor, in the mixer's order.
ROPE_CUTS = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor", ORIGINAL)}
ROPE_KEYS = ("rope_scaling", "rope_parameters")  # the first that is set and not empty is read
LONGEST = "max_position_embeddings"
READ = (*SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", LONGEST)
READ += ("initializer_range", "vocab_size", "rope_theta", *ROPE_KEYS)
GRANITES = tuple(f"{x}_multiplier" for x in ("embedding", "attention", "residual"))
GRANITES += ("logits_scaling",)
# Keys that say how a model is stored, run or trained, but not what it computes. Ids of special
# tokens are checked against the tokenizer (lm/interop/importing.py).
OF_USE = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version"),
    *("_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
)
_OWN_WEIGHTS = "give the folder of plain weights"
_WITHIN = "the model is a part of another; give a folder of its own"
_ALL_TOKENS = "every layer here reads all tokens before; it cannot be read"
# Keys that change the function: their allowed values, and why other values cannot be read.
MAY_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "our layers have no biases, so it cannot be read"),
    "mlp_bias": ((False, None), "our layers have no biases, so it cannot be read"),
    "hidden_act": (("silu", "swish"), "our feed-forward is silu's alone"),
    "is_causal": ((True,), "tokens here never see later ones"),
    "is_encoder_decoder": ((False,), "there is no encoder here"),
    "sliding_window": ((None,), _ALL_TOKENS),
    "attention_chunk_size": ((None,), _ALL_TOKENS),
    "layer_types": ((None, []), _ALL_TOKENS),
    "kv_sharing_modes": ((None, []), _ALL_TOKENS),
    "per_layer_config": ((None, {}), "layers that differ cannot be read"),
    "quantization_config": ((None, {}), _OWN_WEIGHTS),
    "compression_config": ((None, {}), _OWN_WEIGHTS),
    "fusion_config": ((None, {}), _OWN_WEIGHTS),
    "transformers_weights": ((None,), "model.safetensors is read; rename the weights so"),
    **dict.fromkeys(("text_config", "text_encoder", "decoder", "generator"), ((None,), _WITHIN)),
}


def from_transformers(
    hf: Mapping[str, Any], base: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """`base`, a whole configuration as nested values, with the model, muP and vocabulary of a
    transformers config.json. The caller must set data.tokenizer.path.

    Raises:
      UserError: a key is missing, has a wrong type, or asks for something our layers cannot do.
    """
    family = architecture(hf, where)
    _check_supported(hf, where)
    model = {ours: number(hf, theirs, where, int) for theirs, ours in SIZES.items()}
    heads, width = model["num_heads"], model["width"]
    if family == LLAMA and width % heads:
        raise UserError(
            f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}, which "
            f"transformers demands of {LLAMA}; get the file again"
        )
    model["num_kv_heads"] = number(hf, "num_key_value_heads", where, int, heads)
    model["head_dim"] = number(hf, "head_dim", where, int, width // heads)
    model["norm_eps"] = number(hf, "rms_norm_eps", where, float)
    model["tied_embeddings"] = _flag(hf, "tie_word_embeddings", where)
    options: dict[str, Any] = {"mixer": "softmax", **_rope(hf, where)}
    std = number(hf, "initializer_range", where, float, 0.02)
    mup = {"parametrization": "standard", "base_width": float(width), "init_std": std}
    mup |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "base_depth": 0, "alpha": 1.0}
    if family == GRANITE:
        names = ("embedding_multiplier", "residual_multiplier")
        divisor = number(hf, "logits_scaling", where, float)
        mup |= {name: number(hf, name, where, float) for name in names}
        mup |= {"parametrization": "mup", "base_width": width / divisor}
        mup |= {"init_std": std * math.sqrt(divisor)}
        options["scale"] = number(hf, "attention_multiplier", where, float)
    values = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()
    }
    values["model"] |= model | {"layers": {LABEL: options}, "pattern": LABEL}
    values["mup"] |= mup
    longest = number(hf, "max_position_embeddings", where, int, values["data"]["context_length"])
    values["data"]["context_length"] = min(longest, values["data"]["context_length"])
    size = number(hf, "vocab_size", where, int)
    values["data"]["tokenizer"] = {"kind": "json", "path": "", "vocab_size": size}
    return values


def architecture(hf: Mapping[str, Any], where: Path) -> str:
    """The one class that a config.json names, which must be one that we can read.

    Raises:
      UserError: it names none, or another.
    """
    named = hf.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise UserError(f"{where}: architectures={named!r}; it must list one class")
    if named[0] not in [*MODEL_TYPES]:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{where}: architecture {named[0]!r} cannot be read; these can: {known}")
    return named[0]


def _check_supported(hf: Mapping[str, Any], where: Path) -> None:
    """Refuses keys that change the function and that our layers cannot represent."""
    for key, (allowed, reason) in MAY_BE.items():
        if key in hf and hf[key] not in allowed:
            value = " is set" if isinstance(hf[key], dict | list) else f"={json.dumps(hf[key])}"
            raise UserError(f"{where}: {key}{value}; {reason}")
    family = hf["architectures"][0]
    if (named := hf.get("model_type", MODEL_TYPES[family])) != MODEL_TYPES[family]:
        raise UserError(
            f"{where}: model_type={named!r} and architectures={[family]}, whose model_type is "
            f"{MODEL_TYPES[family]!r}; set the one that is wrong"
        )


def _rope_of(hf: Mapping[str, Any], where: Path) -> tuple[str, Mapping[str, Any]]:
    """The key whose RoPE is read, and its value."""
    key = next((key for key in ROPE_KEYS if hf.get(key)), ROPE_KEYS[-1])
    found = hf.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: {key}={found!r} is not an object; get the file again")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise UserError(f"{where}: {key} is one for each kind of layer; ours share one RoPE")
    return key, found


def _meant(hf: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The kind and the numbers of a RoPE, as stored. A `rope_theta` inside it takes precedence over
    the one beside it; for the original length it is the other way round.
    """
    values = {"rope_theta": hf.get("rope_theta", 1e4), ORIGINAL: hf.get(LONGEST, 2048), **found}
    if ORIGINAL in hf:
        values[ORIGINAL] = hf[ORIGINAL]
    kind = found.get("rope_type", found.get("type", "default"))
    names = ("factor", *ROPE_CUTS[kind]) if kind in [*ROPE_CUTS] else ()
    return {"rope_type": kind} | {name: values.get(name) for name in ("rope_theta", *names)}


def _rope(hf: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The mixer's options for RoPE."""
    _, found = _rope_of(hf, where)
    meant = _meant(hf, found)
    if (kind := meant.pop("rope_type")) not in ("default", *ROPE_CUTS):
        known = ", ".join(("default", *ROPE_CUTS))
        raise UserError(f"{where}: rope type {kind!r} cannot be read; these can: {known}")
    if found.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor is not 1; our RoPE turns whole heads")
    theta, *scaling = (number(meant, name, where, float) for name in meant)
    return {"rope_theta": theta} | ({"rope_scaling": tuple(scaling)} if scaling else {})


def ignored(hf: Mapping[str, Any], where: Path) -> list[str]:
    """Keys that are set but not read. Those inside a RoPE include its name. If another key is read
    instead, it is named too.
    """
    key, found = _rope_of(hf, where)
    meant = _meant(hf, found)
    inside = {*meant, "type", "partial_rotary_factor"}
    read = {*READ, *OF_USE, *MAY_BE, "partial_rotary_factor", *(meant.keys() & {ORIGINAL})}
    read |= {*GRANITES} if hf["architectures"] == [GRANITE] else set()
    read |= {"attention_dropout"} if hf.get("attention_dropout") == 0 else set()
    unread = [name for name, value in hf.items() if name not in read and value is not None]
    unread += [f"{key}.{name}" for name in found if name not in inside]
    other = next(x for x in ROPE_KEYS if x != key)
    if hf.get(other) and (not isinstance(hf[other], Mapping) or _meant(hf, hf[other]) != meant):
        unread.append(f"{other} ({key} is read)")
    if hf.get("rope_theta") not in (None, meant["rope_theta"]):
        unread.append(f"rope_theta ({key}.rope_theta is read)")
    if ORIGINAL in meant and found.get(ORIGINAL, meant[ORIGINAL]) != meant[ORIGINAL]:
        unread.append(f"{key}.{ORIGINAL} ({ORIGINAL} is read)")
    if found.get("type", meant["rope_type"]) != meant["rope_type"]:
        unread.append(f"{key}.type ({key}.rope_type is read)")
    return unread


def _scaling_of(scaling: tuple[float, ...]) -> dict[str, Any] | None:
    """The mixer's `rope_scaling` in transformers' terms; None if there is none."""
    if not scaling:
        return None
    kind = next(kind for kind, cuts in ROPE_CUTS.items() if len(cuts) == len(scaling) - 1)
    found: dict[str, Any] = {"rope_type": kind}
    found |= dict(zip(("factor", *ROPE_CUTS[kind]), scaling, strict=True))
    return {k: round(v) if k == ORIGINAL else v for k, v in found.items()}


def number(hf: Mapping[str, Any], key: str, where: Path, kind: type, default: Any = None) -> Any:
    """hf[key], which must be positive, and below 2^31 if an integer; `default` if absent or
    null.
    """
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where} lacks {key}; get the file again")
    is_number = isinstance(value, int | (float if kind is float else int))
    if not is_number or isinstance(value, bool) or not (value > 0 and math.isfinite(value)):
        raise UserError(f"{where}: {key}={value!r} is not a positive {kind.__name__}")
    if kind is int and value >= 1 << 31:
        raise UserError(f"{where}: {key}={value} must be below 2^31; get the file again")
    return kind(value)


def _flag(hf: Mapping[str, Any], key: str, where: Path) -> bool:
    """hf[key]; false if the key is absent or null."""
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key}={value!r} is neither true nor false")
    return bool(value)


def to_transformers(built: Build, max_position_embeddings: int) -> dict[str, Any]:
    """config.json for a model whose `obstacle` is None, without dtype and token ids."""
    m, mixer, multipliers = built.config.model, _mixers(built)[0], built.model.context.multipliers
    scale, divisor = float(mixer.op_options()["scale"]), float(f"{multipliers.width:.12g}")
    factors = (multipliers.embedding, multipliers.residual, divisor)
    is_plain_scale = math.isclose(scale, mixer.head_dim**-0.5, rel_tol=1e-9)
    family = LLAMA if factors == (1.0, 1.0, 1.0) and is_plain_scale else GRANITE
    scaling = _scaling_of(mixer.rope_scaling)
    rope = {"rope_theta": mixer.rope_theta, **(scaling or {"rope_type": "default"})}
    found = {
        "architectures": [family],
        "model_type": MODEL_TYPES[family],
        "vocab_size": built.config.data.tokenizer.vocab_size,
        **{theirs: getattr(m, ours) for theirs, ours in SIZES.items()},
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "rope_theta": mixer.rope_theta,  # older versions read this line and the next
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": m.tied_embeddings,
        "initializer_range": float(f"{multipliers.init_std('hidden'):.12g}"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
    }
    if family == GRANITE:
        found |= {"embedding_multiplier": multipliers.embedding, "attention_multiplier": scale}
        found |= {"residual_multiplier": multipliers.residual, "logits_scaling": divisor}
    return found


def obstacle(built: Build) -> str | None:
    """Why no class of transformers fits this model; None if Llama or Granite does."""
    for mixer in (mixers := _mixers(built)):
        kind = type(mixer).__name__
        if type(mixer) is not Softmax:
            return f"the mixer {kind} has no class there"
        for field in dataclasses.fields(mixer):
            value = getattr(mixer, field.name)
            if field.name not in (*FREE_OPTIONS, *FLAX_FIELDS) and value != field.default:
                return f"{kind} with {field.name}={value!r} has no class there"
    for name in SHARED_OPTIONS:
        values = list(dict.fromkeys(getattr(mixer, name) for mixer in mixers))
        if len(values) > 1:
            return f"layers differ in {name} ({values[0]} and {values[1]}), theirs cannot"
    if any(block.mlp is None for period in built.model.groups for block in period.blocks):
        return "a layer without a feed-forward has no class there"
    heads, width = mixers[0].num_heads, built.config.model.width
    return (
        None if width % heads == 0 else f"{width=} is not a multiple of {heads=}, which they demand"
    )


def _mixers(built: Build) -> list[Any]:
    """The mixer at each place of the pattern, without repeats."""
    return [block.mixer for period in built.model.groups for block in period.blocks]
