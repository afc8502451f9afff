"""A folder that cannot be read is an error of one line, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from safetensors.numpy import load_file, save_file

from launch import ends
from lm import build as build_lib
from lm.config import UserError
from lm.interop import folder, verify
from lm.run import checkpoint
from tests.lm.interop import runs

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders: tied, Granite and our own format in one file each, and tied in shards."""
    root = tmp_path_factory.mktemp("whole")
    sink = {"model.layers": {"softmax": {"sink": True}}}
    for name, changes in (("tied", runs.STANDARD), ("granite", {}), ("own", sink)):
        runs.create(root / f"run_{name}", changes | {"model.num_layers": 2})
        runs.exported(root / f"run_{name}", root / name)
    runs.exported(root / "run_tied", root / "shards", max_shard_size="20KB")
    return {name: root / name for name in ("tied", "granite", "own", "shards", "run_tied")}


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes keys of config.json; None removes a key."""

    def change(path: Path) -> None:
        values = json.loads((path / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (path / "config.json").write_text(json.dumps(kept))

    return change


def own(**changes: Any) -> Callable[[Path], None]:
    """Changes keys of our part of config.json."""

    def change(path: Path) -> None:
        values = json.loads((path / "config.json").read_text())
        values["espalier"] |= changes
        (path / "config.json").write_text(json.dumps(values))

    return change


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / folder.SINGLE)
        change(tensors)
        save_file(tensors, path / folder.SINGLE)

    return rewrite


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        values = json.loads((path / folder.INDEX).read_text())
        change(values["weight_map"])
        (path / folder.INDEX).write_text(json.dumps(values))

    return rewrite


def shard(path: Path, number: int = 1) -> Path:
    return sorted(path.glob("model-*.safetensors"))[number]


def pickled(path: Path) -> None:
    (path / folder.SINGLE).rename(path / "pytorch_model.bin")


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
HEAD = "lm_head.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no folder": ("tied", shutil.rmtree, "no such folder"),
    "no config": (
        "tied",
        lambda p: (p / "config.json").unlink(),
        "source has no config.json, so it is not a Hugging Face folder; name one",
    ),
    "no JSON": ("tied", lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
    "no class": ("tied", config(architectures=None), "architectures=None; it must list one"),
    "another class": (
        "tied",
        config(architectures=["MistralForCausalLM"]),
        "'MistralForCausalLM' cannot be read; these can: LlamaForCausalLM, GraniteForCausalLM",
    ),
    "no width": ("tied", config(hidden_size=None), "config.json lacks hidden_size"),
    "no vocabulary": ("tied", config(vocab_size=None), "config.json lacks vocab_size"),
    "a number in words": ("tied", config(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5' is not a posi"),
    "a negative number": ("tied", config(num_hidden_layers=-2), "num_hidden_layers=-2 is not"),
    "a divisor of zero": ("granite", config(logits_scaling=0.0), "logits_scaling=0.0 is not a pos"),
    "no multiplier": ("granite", config(residual_multiplier=None), "lacks residual_multiplier"),
    "heads": (
        "tied",
        config(num_key_value_heads=3),
        r"source/config.json: model.num_heads=4 is not a multiple of .*=3",
    ),
    "an odd head": ("tied", config(head_dim=7), "source/config.json: .* even K, got head_dim=7"),
    "no flag": ("tied", config(tie_word_embeddings="no"), "tie_word_embeddings='no' is neither"),
    "a huge number": ("tied", config(head_dim=1 << 40), "head_dim=1099511627776 must be below"),
    "a huge vocabulary": (
        "tied",
        config(vocab_size=2**31 - 2),
        r"\[257, 32\], its config.json says \[2147483646, 32\]",
    ),
    "own, a huge vocabulary": (
        "own",
        own(tokenizer={"kind": "bytes", "vocab_size": 10**12}),
        r"source/config.json: .*vocab_size=1000000000000 must be below 2\^31",
    ),
    "own, no tokenizer": (
        "own",
        own(tokenizer=5),
        "espalier.tokenizer=5 is not an object; get the",
    ),
    "own, no model": ("own", own(model=5), "source/config.json: espalier.model=5 is not an object"),
    "own, an unknown kind": (
        "own",
        own(tokenizer={"kind": [], "vocab_size": 257}),
        r"unknown tokenizer \[\]; known: bpe",
    ),
    "biases": ("tied", config(attention_bias=True), "attention_bias=true; our layers have no"),
    "biases within": ("granite", config(mlp_bias=True), "mlp_bias=true; our layers have no"),
    "activation": ("tied", config(hidden_act="gelu"), 'hidden_act="gelu"; our feed-forward is'),
    "quantized": ("tied", config(quantization_config={"bits": 4}), "quantization_config is set"),
    "rope": ("tied", config(rope_parameters=YARN), "rope type 'yarn' cannot be read; these can"),
    "older rope": (
        "tied",
        config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' cannot be read",
    ),
    "rope without its factor": (
        "tied",
        config(rope_parameters={"rope_type": "linear"}),
        "config.json lacks factor",
    ),
    "no tokenizer": ("tied", lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no byte-level tokenizer": (
        "tied",
        lambda p: (p / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'),
        "is not a json tokenizer",
    ),
    "a small vocabulary": ("tied", config(vocab_size=256), "has 257 ids, vocab_size=256 in"),
    "no weights": ("tied", lambda p: (p / folder.SINGLE).unlink(), "holds neither model.safetens"),
    "pickled weights": ("tied", pickled, "pytorch_model.bin and no safetensors; pickled weights a"),
    "cut short": ("tied", lambda p: cut(p / folder.SINGLE), "damaged or cut short"),
    "empty": ("tied", lambda p: (p / folder.SINGLE).write_bytes(b""), "damaged or cut short"),
    "garbage": ("tied", lambda p: (p / folder.SINGLE).write_bytes(b"{" * 99), "damaged or cut sh"),
    "a missing tensor": ("tied", weights(lambda t: t.pop(GATE)), f"lacks the tensor {GATE};"),
    "missing tensors": (
        "tied",
        config(num_hidden_layers=3),
        r"lacks the tensor model.layers.2.\w+.* and 8 more",
    ),
    "an unexpected tensor": (
        "tied",
        weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[GATE]})),
        "has the tensor model.layers.0.self_attn.q_proj.bias, which its config.json's",
    ),
    "a wrong shape": (
        "tied",
        weights(lambda t: t.update({GATE: t[GATE].T.copy()})),
        rf"{GATE} has shape \[32, 48\], its config.json says \[48, 32\]",
    ),
    "a wrong vocabulary": ("tied", config(vocab_size=300), r"\[257, 32\].* says \[300, 32\]"),
    "whole numbers": (
        "tied",
        weights(lambda t: t.update({GATE: t[GATE].astype(np.int8)})),
        f"{GATE} is stored as I8; this reads F32, F16, BF16",
    ),
    "a head that is not the embedding": (
        "tied",
        weights(lambda t: t.update({HEAD: 2 * t["model.embed_tokens.weight"]})),
        "tie_word_embeddings is true and lm_head.weight differs",
    ),
    "a missing head": ("tied", config(tie_word_embeddings=False), "lacks the tensor lm_head.weigh"),
    "a missing shard": ("shards", lambda p: shard(p).unlink(), "lacks the shard model-00002-of-"),
    "a cut shard": ("shards", lambda p: cut(shard(p)), "model-00002-of-.* damaged or cut short"),
    "no map": ("shards", lambda p: (p / folder.INDEX).write_text("{}"), "has no weight_map"),
    "a shard elsewhere": (
        "shards",
        index(lambda m: m.update({GATE: "../model.safetensors"})),
        "names '../model.safetensors', which is not a file beside it",
    ),
    "a tensor in no shard": (
        "shards",
        index(lambda m: m.update({"other": m[GATE]})),
        "no shard holds 'other'",
    ),
    "a tensor in another shard": (
        "shards",
        index(lambda m: m.update({GATE: next(f for f in m.values() if f != m[GATE])})),
        f"has '{GATE}' in model-.*, but it is in model-",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_refused(llama: dict[str, Path], tmp_path: Path, name: str) -> None:
    kind, damage, message = DAMAGES[name]
    source = tmp_path / "source"
    shutil.copytree(llama[kind], source)
    damage(source)
    with pytest.raises(UserError, match=message) as caught:
        runs.imported(source, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_harmless_differences_are_accepted(llama: dict[str, Path], tmp_path: Path) -> None:
    """A tied head that is saved, buffers of old versions and keys at their defaults do no harm."""
    source = tmp_path / "source"
    shutil.copytree(llama["tied"], source)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = lambda t: t.update({HEAD: t["model.embed_tokens.weight"], buffer: np.ones(4, "f4")})
    weights(more)(source)
    config(rope_parameters=None, rope_scaling=None, rope_theta=1e4, head_dim=None)(source)
    assert runs.imported(source, tmp_path / "run").notes == []
    given, got = (
        checkpoint.read_meta(checkpoint.locate(p)) for p in (llama["run_tied"], tmp_path / "run")
    )
    norm = "params/final_norm/scale"
    assert got.digest[norm] == given.digest[norm]


def test_an_existing_folder_is_not_overwritten(llama: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run exists; remove it or name a new folder"):
        runs.imported(llama["tied"], tmp_path / "run")
    with pytest.raises(UserError, match="run exists"):
        runs.exported(llama["run_tied"], tmp_path / "run")
    with pytest.raises(UserError, match="max_shard_size='big' is not a size"):
        runs.exported(llama["run_tied"], tmp_path / "out", max_shard_size="big")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_not_exported(llama: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(llama["run_tied"], tmp_path / "run")
    arrays = [
        p for p in (tmp_path / "run" / "checkpoints" / "0" / "state").rglob("*") if p.is_file()
    ]
    cut(max(arrays, key=lambda path: path.stat().st_size))
    with pytest.raises(UserError, match=r"checkpoint .* is damaged"):
        runs.exported(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_alone_cannot_be_resumed(llama: dict[str, Path]) -> None:

    path = checkpoint.locate(llama["run_tied"])
    built = build_lib.local(checkpoint.read_config(path))
    with pytest.raises(UserError, match=r"holds weights and no optimizer state; .* init_from"):
        checkpoint.restore(path, built.abstract_state)


def test_an_import_notes_what_it_ignores(llama: dict[str, Path], tmp_path: Path) -> None:
    """Notes are printed on values that are not finite and on start tokens, which are not used here.
    null means the default.
    """
    source = tmp_path / "source"
    shutil.copytree(llama["granite"], source)
    weights(lambda t: t.update({HEAD: t["model.embed_tokens.weight"].copy()}))(source)
    weights(lambda t: t[GATE].__setitem__((0, 0), np.nan))(source)
    path = source / "config.json"
    values = json.loads(path.read_text()) | {"tie_word_embeddings": None, "bos_token_id": 1}
    path.write_text(json.dumps(values))
    notes = runs.imported(source, tmp_path / "run").notes
    assert [note.partition(";")[0] for note in notes] == [
        "bos_token_id=1",
        f"{GATE} holds values that are not finite",
    ]
    assert not checkpoint.read_config(checkpoint.locate(tmp_path / "run")).model.tied_embeddings
    text = hf.Tokenizer.from_file(str(source / "tokenizer.json"))
    end = ("<|endoftext|>", 256)
    text.post_processor = hf.processors.TemplateProcessing(
        single=f"{end[0]} $A", special_tokens=[end]
    )
    text.save(str(source / "tokenizer.json"))
    notes = runs.imported(source, tmp_path / "other").notes
    assert notes[0].startswith("tokenizer.json puts [256] before texts; here no text begins")


def test_leftovers_of_killed_imports_are_removed(tmp_path: Path) -> None:
    """What live processes and other folders own stays."""
    with subprocess.Popen(["true"]) as gone:
        pass
    left = [f".a.b.{pid}.partial" for pid in (gone.pid, os.getpid(), 10**30)]
    kept = [f".a.b.{os.getppid()}.partial", f".axb.{gone.pid}.partial", ".a.b.x.partial"]
    for name in left + kept:
        (tmp_path / name).mkdir()
    with folder.created(tmp_path / "a.b") as partial:
        assert not any((tmp_path / name).exists() for name in left if name != partial.name)
        (partial / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "a.b"}


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with folder.created(tmp_path / "run") as partial:
            (partial / "file").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ends.Stopped), ends.unwinding():
        work()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_folders_that_cannot_be_compared_are_refused(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    """They are refused without importing transformers."""
    verify.check(llama["tied"], 257, ["a"])
    for path, size, prompt, message in (
        (tmp_path / "none", 257, "a", "none: no such folder"),
        (tmp_path, 257, "a", "config.json: no such file; get the whole folder"),
        (llama["own"], 257, "a", "own holds EspalierForCausalLM, which transformers does not have"),
        (llama["tied"], 300, "a", "config.json: vocab_size=257, the checkpoint's is 300; give"),
        (llama["tied"], 257, "", "a prompt is empty"),
    ):
        with pytest.raises(UserError, match=message):
            verify.check(path, size, [prompt])


def test_a_logit_that_is_not_finite_is_not_within_a_tolerance() -> None:
    zeros = np.zeros((2, 3))
    found = verify.Comparison("", 2, 0.0, 0.0, 0.0, 1.0, True, 0, 0, [])
    for broken in (np.nan, np.inf):
        difference, *_ = verify.distance(zeros + broken, zeros + broken)
        assert not found._replace(max_difference=difference).is_within(1e9)
    assert found._replace(max_difference=verify.distance(zeros, zeros)[0]).is_within(0.0)
