"""lm-evaluation-harness, through our adapter, agrees with our own tasks and scorer on three local
tasks, and with our own generation.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from lm import extras
from lm.config import UserError
from lm.evals import Given, _requests
from lm.evals._requests import Request
from lm.evals.lambada import Lambada
from lm.evals.multiple_choice import MultipleChoice
from lm.evaluation import generate, scoring
from lm.evaluation.scoring import Scorer
from lm.run.checkpoint import Loaded
from tests.lm import tiny
from tests.lm.evals import asked, planted

CONTEXT = 48
HEADING = ["Tasks", "Version", "Filter"]
TEXTS = [
    "A short text.",
    "x",
    "The grass is green. The sky is blue. The sun is yellow, é. " * 3,
    "b" * CONTEXT,
    "c" * (CONTEXT + 1),
]


@functools.cache
def loaded() -> Loaded:
    built = tiny.create({"data.context_length": CONTEXT})
    params = tiny.params(built)
    return Loaded(built.model, params, planted.tokenizer("bytes"), built.config, 0, built)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The modules of the adapter and of the harness's evaluator and tasks, all offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        reason = f"lm-eval is not installed ({extras.command('eval')})"
        pytest.importorskip("lm_eval", reason=reason)
        names = ("lm.interop.eval_harness", "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.utils")
        adapter, evaluator, tasks, utils = map(importlib.import_module, names)
        yield SimpleNamespace(adapter=adapter, evaluator=evaluator, tasks=tasks, utils=utils)


def evaluate(harness: Any, folder: Path, records: Sequence[Any], task: dict[str, Any]) -> Any:
    """Runs one task of the harness over `records`; returns its metrics and its samples in order."""
    data = asked.write(folder / "data.jsonl", records)
    local = {"task": "local", "dataset_path": "json", "test_split": "test"}
    local["dataset_kwargs"] = {"data_files": {"test": data}}  # pyright: ignore[reportArgumentType]
    (folder / "local.yaml").write_text(yaml.safe_dump(local | task))
    manager = harness.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = harness.evaluator.simple_evaluate(
        model=harness.adapter.EspalierLM(loaded()),
        tasks=["local"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    metrics = {key.split(",")[0]: value for key, value in found["results"]["local"].items()}
    heading = harness.utils.make_table(found).partition("\n")[0]
    assert [word.strip() for word in heading.strip("|").split("|")][:3] == HEADING
    return metrics, samples


def metric(name: str, aggregation: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


def given() -> Given:
    return planted.given(CONTEXT)


def scored(question: Any, items: Any) -> Any:
    found = Scorer(loaded().build, loaded().params)(items.rows)
    return question.numbers(items, found), found


def test_multiple_choice(harness: Any, tmp_path: Path) -> None:
    """The contexts include an empty one, one that ends in white space, and one that is too long."""
    lines = asked.questions(24, choices=(4, 3))
    for line in lines:
        if line["doc_id"] == 3:
            line["request"]["context"] = ""
        if line["doc_id"] == 4:
            line["request"]["context"] += " \n"
        if line["doc_id"] == 5:
            line["request"]["context"] *= 4
    question = MultipleChoice(path=asked.write(tmp_path / "own.jsonl", lines), overlong="left")
    items = question.items(given())
    numbers, found = scored(question, items)
    documents: dict[int, dict[str, Any]] = {}
    for line in lines:
        record = documents.setdefault(line["doc_id"], {"choices": [], "gold": line["label"]})
        record["question"] = line["request"]["context"]
        record["choices"].append(line["request"]["continuation"])
    metrics, samples = evaluate(
        harness,
        tmp_path,
        list(documents.values()),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [metric("acc", "mean"), metric("acc_norm", "mean")],
        },
    )
    theirs = [float(resp[0][0]) for sample in samples for resp in sample["resps"]]
    ours = [-one.nll.sum(dtype=np.float64) for one in found]
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    assert metrics["acc"] == numbers["accuracy_sum"].value
    assert metrics["acc_norm"] == numbers["accuracy"].value
    assert 0 < metrics["acc"] < 1


def test_lambada(harness: Any, tmp_path: Path) -> None:
    """The last words are scored, with line breaks before them."""
    texts = ["The cat sat down", "Who was\nthere, then", "What is the pass \n\nkey", "a  b"]
    records = [{"text": text} for text in texts]
    question = Lambada(path=asked.write(tmp_path / "own.jsonl", records))
    numbers, found = scored(question, question.items(given()))
    metrics, samples = evaluate(
        harness,
        tmp_path,
        records,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "target_delimiter": "",
            "metric_list": [metric("perplexity", "perplexity"), metric("acc", "mean")],
        },
    )
    theirs = [float(sample["resps"][0][0][0]) for sample in samples]
    np.testing.assert_allclose(theirs, [-one.nll.sum(dtype=np.float64) for one in found], rtol=1e-6)
    assert metrics["perplexity"] == pytest.approx(numbers["perplexity"].value, rel=1e-6)
    assert metrics["acc"] == numbers["accuracy"].value


def test_rolling_bits_per_byte(harness: Any, tmp_path: Path) -> None:
    """Each token but the first of a text is scored once, in the windows that the harness cuts."""
    metrics, samples = evaluate(
        harness,
        tmp_path,
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [metric("bits_per_byte", "bits_per_byte")],
        },
    )
    theirs = [float(sample["resps"][0][0]) for sample in samples]
    own = Scorer(loaded().build, loaded().params)
    ours = []
    for text in TEXTS:
        ids = planted.tokenizer("bytes").encode(text)
        rows, done = [scoring.row(ids[:CONTEXT])] if len(ids) > 1 else [], CONTEXT
        while done < len(ids):
            end = min(done + CONTEXT, len(ids))
            start = end - CONTEXT - 1
            rows.append(scoring.row(ids[start:end], first=done - start))
            done = end
        assert sum(int(row.weights.sum()) for row in rows) == len(ids) - 1
        ours.append(-sum(one.nll.sum(dtype=np.float64) for one in own(rows)))
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    size = sum(len(text.encode()) for text in TEXTS)
    assert metrics["bits_per_byte"] == pytest.approx(-sum(ours) / size / math.log(2), rel=1e-6)


def greedy(prompts: Sequence[Sequence[int]], num: int) -> list[list[int]]:
    options = generate.GenerateOptions(
        max_new_tokens=num, temperature=0.0, top_k=0, top_p=1.0, seed=0
    )
    vocabulary = generate.Vocabulary(planted.tokenizer("bytes").vocab_size, 256)
    return generate.generate(
        loaded().model, loaded().params, prompts, options=options, vocabulary=vocabulary
    )


def test_generate_until(harness: Any) -> None:
    """Prompts have several lengths, and one is too long. A continuation ends before its stop
    string.
    """
    prompts = ["What is", "The pass key is", "y" * 60, "Who"] * 5
    model = harness.adapter.EspalierLM(loaded())
    tokenizer = planted.tokenizer("bytes")

    def ask(**options: Any) -> list[str]:
        return model.generate_until([SimpleNamespace(args=(p, dict(options))) for p in prompts])

    room = CONTEXT - 8
    cut = [tokenizer.encode(prompt)[-room:] for prompt in prompts]
    whole = [tokenizer.decode(ids) for ids in greedy(cut, 8)]
    assert ask(until=["\n\n\n"], max_gen_toks=8, do_sample=False) == whole
    stop = whole[0][2]
    assert ask(until=[stop], max_gen_toks=8) == [text.partition(stop)[0] for text in whole]
    drawn = ask(until=[], max_gen_toks=8, do_sample=True, temperature=1.5, top_k=20)
    assert drawn != whole
    with pytest.raises(UserError, match="asks for 48 new tokens and max_length is 48"):
        ask(until=[], max_gen_toks=CONTEXT)
    empty = SimpleNamespace(args=("", {"max_gen_toks": 8}), task_name="gen", doc_id=3)
    with pytest.raises(UserError, match="task gen, document 3: its context is empty, and nothing"):
        model.generate_until([empty])
    with pytest.raises(UserError, match=r"unknown generation_kwargs.num_beams"):
        ask(until=[], max_gen_toks=8, num_beams=4)


def test_loglikelihood_says_whether_a_continuation_is_greedy(harness: Any) -> None:
    """One continuation is greedy; the other differs from it in the last token."""
    model = harness.adapter.EspalierLM(loaded())
    tokenizer = planted.tokenizer("bytes")
    prompts = [letter * 3 for letter in "abcdefghijklmnop"]
    found = greedy([tokenizer.encode(prompt) for prompt in prompts], 3)
    texts = {
        p: bytes(ids).decode() for p, ids in zip(prompts, found, strict=True) if max(ids) < 128
    }
    assert texts
    for prompt, text in texts.items():
        other = text[:-1] + ("x" if text[-1] != "x" else "y")
        answers = model.loglikelihood([SimpleNamespace(args=(prompt, t)) for t in (text, other)])
        assert [greedily for _, greedily in answers] == [True, False]


def test_a_token_across_the_join_is_scored(harness: Any) -> None:
    """Every request has a score, which equals that of our own scorer on our own rows."""
    tokenizer = planted.tokenizer("bpe")
    pairs = [("The pa", "ss"), ("Remem", "ber it."), ("pas", "s"), ("What is the", " pass key")]
    joined = [len(tokenizer.encode(a + b)) <= len(tokenizer.encode(a)) for a, b in pairs]
    assert joined.count(True) >= 2
    built = tiny.create({"data.tokenizer.vocab_size": 400, "data.context_length": CONTEXT})
    made = Loaded(built.model, tiny.params(built), tokenizer, built.config, 0, built)
    model = harness.adapter.EspalierLM(made)
    found = model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    split = _requests.split([Request("", *pair) for pair in pairs], tokenizer)
    rows = [scoring.row(ids, first=first) for ids, first in split]
    ours = [-one.nll.sum(dtype=np.float64) for one in Scorer(made.build, made.params)(rows)]
    assert min(int((row.weights > 0).sum()) for row in rows) >= 1
    np.testing.assert_allclose([number for number, _ in found], ours, rtol=1e-6)
    assert max(ours) < 0


def test_templates_are_confined(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2.sandbox import SecurityError  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(harness.utils, "env", harness.utils.env)
    reach = "{{ cycler.__init__.__globals__.os.getpid() }}"
    assert harness.utils.apply_template(reach, {}).isdigit()
    harness.adapter.confine()
    with pytest.raises(SecurityError):
        harness.utils.apply_template(reach, {})
    template = "{{ a.strip() | regex_replace('b', 'c') }}{{ ' '.join(x) }}\n"
    assert harness.utils.apply_template(template, {"a": " ab ", "x": ["d", "e"]}) == "acd e\n"


def test_requests_that_cannot_be_scored_are_refused(harness: Any) -> None:
    model = harness.adapter.EspalierLM(loaded(), max_length=10)
    ask = lambda *args: model.loglikelihood([SimpleNamespace(args=args)])
    assert ask("", "ab")[0][0] < 0
    with pytest.raises(UserError, match=r"'a'.*: the model predicts no first token; change doc"):
        ask("", "a")
    with pytest.raises(UserError, match=r"'abc', ''.*: the continuation is empty"):
        ask("abc", "")
    assert ask(" ", "ab")[0][0] < 0
    with pytest.raises(UserError, match="asks for 11 tokens and max_length is 10"):
        ask("context", "elevenchars")
    assert ask("context" * 9, "tenletters")[0][0] < 0
