"""Compares a model here and in `transformers`: logits, and greedy continuations.

    max |difference|   over all logits of all positions
    KL(ours || theirs) = sum p_ours (log p_ours - log p_theirs), nats, mean over positions
    argmax agreement   share of positions where both prefer the same token
    greedy             tokens of each prompt before the first that differs

torch is never imported here: `transformers_run.py` runs in the interpreter that
ESPALIER_INTEROP_PYTHON names, and answers in files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import files
from lm.config import UserError
from lm.evaluation import generate
from lm.evaluation.generate import GenerateOptions, Vocabulary
from lm.interop import exporting, hf_config
from lm.interop.folder import AGAIN
from lm.run.checkpoint import Loaded

VARIABLE = "ESPALIER_INTEROP_PYTHON"
SCRIPT = Path(__file__).with_name("transformers_run.py")
PROMPTS = ("def fibonacci(n):\n", "The capital of France is", "1, 2, 3, 4,", "Dear Sir or Madam,")
SEED = 0


class Comparison(NamedTuple):
    """The two agree on `same_tokens` of `new_tokens` greedy tokens, counted up to the first
    difference of each prompt. `same_ids`: both tokenizers encode all prompts alike.
    """

    theirs: str
    positions: int
    max_difference: float
    scale: float
    kl: float
    agreement: float
    same_ids: bool
    same_tokens: int
    new_tokens: int
    texts: list[tuple[str, str, str]]

    def is_within(self, tolerance: float) -> bool:
        """Whether no logit differs by more. A logit that is not finite counts as different."""
        return self.max_difference <= tolerance


def interpreter() -> str:
    """The interpreter that has torch and transformers.

    Raises:
      UserError: none is named, or the name is not a program.
    """
    named = os.environ.get(VARIABLE, "")
    if not named:
        raise UserError(
            f"{VARIABLE} is not set; set it to a Python that has torch and transformers "
            "(CONTRIBUTING.md says how to make one)"
        )
    if shutil.which(named) is None:
        raise UserError(f"{VARIABLE}={named} is not a program; name a Python with torch")
    return named


def check(folder: Path, vocab_size: int, prompts: Sequence[str]) -> None:
    """Checks that `compare` has something to compare, before anything is loaded.

    Raises:
      UserError: there is no folder, it is one of our own, its vocabulary is not `vocab_size`, or a
      prompt is empty.
    """
    if not all(prompts):
        raise UserError("a prompt is empty; the model predicts no first token")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    where = folder / "config.json"
    hf = files.read_json(where, AGAIN)
    if exporting.KEY in hf:
        raise UserError(
            f"{folder} holds {exporting.ARCHITECTURE}, which transformers does not have; "
            "espalier import_hf reads it"
        )
    size = hf_config.number(hf, "vocab_size", where, int)
    if size != vocab_size:
        raise UserError(
            f"{where}: vocab_size={size}, the checkpoint's is {vocab_size}; "
            "give the folder that was exported from it, or that it came from"
        )


def compare(
    loaded: Loaded,
    folder: Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    dtype: str = "float32",
    length: int = 64,
    max_new_tokens: int = 32,
) -> Comparison:
    """Compares a loaded checkpoint and a folder, on the prompts and on two rows of `length` random
    ids. Neither side generates ids beyond the tokenizer's.

    Raises:
      UserError: there is no interpreter with transformers, or it cannot load the folder.
    """
    python, tokenizer = interpreter(), loaded.tokenizer
    rng = np.random.default_rng(SEED)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    rows = [*ids, *rng.integers(0, tokenizer.vocab_size, (2, length)).tolist()]
    request = {
        "model": str(folder.absolute()),
        "dtype": dtype,
        "rows": rows,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "end_of_text": tokenizer.end_of_text,
        "num_ids": tokenizer.vocab_size,
    }
    answer, theirs = _ask(python, request)
    ours = logits(loaded, rows)
    options = GenerateOptions(
        max_new_tokens=max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=SEED
    )
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text)
    new = generate.generate(
        loaded.model, loaded.params, ids, options=options, vocabulary=vocabulary
    )
    texts = [tokenizer.decode(row) for row in new]
    difference, scale, kl, agreement = distance(np.concatenate(ours), np.concatenate(theirs))
    return Comparison(
        theirs=answer["class"],
        positions=sum(map(len, rows)),
        max_difference=difference,
        scale=scale,
        kl=kl,
        agreement=agreement,
        same_ids=answer["ids"] == ids,
        same_tokens=sum(_common(a, b) for a, b in zip(new, answer["new"], strict=True)),
        new_tokens=sum(max(len(a), len(b)) for a, b in zip(new, answer["new"], strict=True)),
        texts=list(zip(prompts, texts, answer["text"], strict=True)),
    )


def logits(loaded: Loaded, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The logits [T, vocab] of each row of ids, float32, without the vocabulary's padding."""
    size = loaded.config.data.tokenizer.vocab_size
    dtype = loaded.model.context.numerics.operand_dtype

    @jax.jit
    def of(params: Any, tokens: jax.Array) -> jax.Array:
        variables: Any = {"params": params}
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden: Any = loaded.model.apply(variables, tokens, positions * 0 + 1, positions)[0]
        head: Any = loaded.model.apply(variables, method="head")
        product = hidden[0].astype(dtype), head[:size].astype(dtype)
        return jnp.einsum("td,vd->tv", *product, preferred_element_type=jnp.float32)

    return [np.asarray(of(loaded.params, np.array([row], np.int32))) for row in rows]


def distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    """Logits [N, vocab] -> max |difference|, RMS of ours, mean KL, argmax agreement."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a logit that is not finite makes the difference NaN
        log_p, log_q = a - _log_sum_exp(a), b - _log_sum_exp(b)
        kl = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
        agreement = float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
        return float(np.abs(a - b).max()), float(np.sqrt((a * a).mean())), kl, agreement


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def _ask(python: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [python, str(SCRIPT), str(folder / "request.json"), name]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.strip().splitlines()[-1:])
            raise UserError(f"{python} cannot run {request['model']}: {reason[:300]}")
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        with np.load(folder / "logits.npz") as found:
            return answer, [found[str(i)] for i in range(len(request["rows"]))]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))
