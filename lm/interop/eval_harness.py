"""Evaluates a model of this project with EleutherAI's lm-evaluation-harness (lm-eval 0.4.13),
without torch. The extra `eval` installs the harness.

    import lm
    from lm_eval import evaluator, tasks
    from lm.interop.eval_harness import EspalierLM

    manager = tasks.TaskManager(include_path="my_tasks", include_defaults=False)
    results = evaluator.simple_evaluate(
        model=EspalierLM(lm.load("runs/quickstart")), tasks=["my_task"], task_manager=manager
    )

or espalier eval_harness --checkpoint=runs/quickstart --tasks_dir=my_tasks --tasks=my_task.
A task of my_tasks/my_task.yaml is local if it says `dataset_path: json` and `dataset_kwargs:
{data_files: {test: FILE.jsonl}}`; the harness's own tasks load data from the Hugging Face hub.

Tasks written by others are checked by lm/interop/harness_tasks.py before they are read, and their
templates are `confine`d, as espalier eval_harness does. Otherwise a `!function` or a template could
run code of whoever wrote it.

Set DISABLE_MULTIPROC=1, or the harness's bootstrap forks this process while JAX is running in it.

The harness puts its prefix token before a text without context. If the run has a start token
(data.tokenizer.bos), it is the prefix token, and contexts begin with it. If not, the first token of
such a text is given and not scored. Log-likelihoods of whole texts then lack their first token, and
bits per byte still divide by all bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2.sandbox import SandboxedEnvironment  # pyright: ignore[reportMissingImports]
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from lm.config import UserError
from lm.evals import _requests
from lm.evals._requests import Request
from lm.evaluation import scoring
from lm.evaluation.generate import GenerateOptions, Vocabulary, generate
from lm.evaluation.scoring import Row, Scorer
from lm.run.checkpoint import Loaded

MAX_NEW_TOKENS = 256  # if a task does not say; the harness's own default
ROWS = 16  # prompts per compiled call


def confine() -> None:
    """From now on templates of tasks (doc_to_text, ...) can reach only their document and nothing
    else in the process.
    """
    found = utils.env
    utils.env = SandboxedEnvironment(
        undefined=found.undefined, keep_trailing_newline=found.keep_trailing_newline
    )
    utils.env.filters |= found.filters


class EspalierLM(TemplateLM):
    """The harness's interface to a loaded run. At most `max_length` tokens are read (0: the run's
    context length). Longer contexts lose their start and longer texts are cut into windows, as the
    harness prescribes. All requests run in one process.
    """

    def __init__(self, loaded: Loaded, max_length: int = 0, seed: int = 0) -> None:
        super().__init__()
        self._loaded, self._seed = loaded, seed
        self._scorer = Scorer(loaded.build, loaded.params)
        self._start = loaded.tokenizer.start
        self.max_length = max_length or loaded.config.data.context_length

    @property
    def eot_token_id(self) -> int:
        return self._loaded.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        bos = self._loaded.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._loaded.tokenizer.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text. There are no special tokens to add."""
        return self._loaded.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Cuts a request as our own tasks do, so that a token across the join is scored. If nothing
        can be scored, `_row` reports it.
        """
        if not context.strip() or not continuation:
            return super()._encode_pair(context, continuation)
        request = Request(f"lm-eval's {context!r}", context, continuation)
        ((ids, first),) = _requests.split([request], self._loaded.tokenizer)
        return ids[:first].tolist(), ids[first:].tolist()  # the start is among them

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """[(texts, context ids, continuation ids)] -> [(sum of log p, whether greedy)]."""
        rows = [self._row(texts, *ids) for texts, *ids in requests]
        return [
            (
                -float(scored.nll.sum(dtype=np.float64)),
                bool(scored.hit.sum() == np.count_nonzero(row.weights)),
            )
            for row, scored in zip(rows, self._scorer(rows), strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """[text] -> [sum of log p of all tokens but the first], in windows of max_length."""
        del disable_tqdm  # the scorer is called once, so there is no progress to show
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            rolling = utils.get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
            for pair in map(utils.make_disjoint_window, rolling):
                if len(ids) + len(self._start) > 1:  # a single token cannot be scored
                    windows.append((text, *pair))
                    owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """[(context, options)] -> [continuation up to the first text in options["until"]]."""
        del disable_tqdm
        groups: dict[tuple[int, GenerateOptions], list[_Prompt]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            context, asked = request.args
            options, until = self._options(asked)
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a task asks for {options.max_new_tokens} new tokens and max_length is "
                    f"{self.max_length}; set max_gen_toks in the task, or max_length"
                )
            ids = [*self._start, *self.tok_encode(context)][-room:]
            if not ids:
                raise UserError(
                    f"task {request.task_name}, document {request.doc_id}: its context is empty, "
                    "and the model predicts no first token; change doc_to_text or leave it out"
                )
            groups[(len(ids) - 1).bit_length(), options].append(_Prompt(i, ids, until))
        found = [""] * len(requests)
        for (_, options), prompts in groups.items():
            for start in range(0, len(prompts), ROWS):
                part = prompts[start : start + ROWS]
                for one, text in zip(part, self._continue(part, options), strict=True):
                    ends = [text.find(stop) for stop in one.until if stop and stop in text]
                    found[one.place] = text[: min(ends, default=len(text))]
        return found

    def _row(self, texts: Any, context: list[int], continuation: list[int]) -> Row:
        if not self._start and context[:1] == [self.eot_token_id]:
            context = context[1:]
        if not continuation:
            raise UserError(f"lm-eval asks for {texts!r}: the continuation is empty; leave it out")
        given = 1 if not context else 0
        if len(continuation) <= given:
            raise UserError(
                f"lm-eval asks for {texts!r}: the model predicts no first token; change "
                "doc_to_text, or leave the document out"
            )
        if len(continuation) - given > self.max_length:
            raise UserError(
                f"lm-eval asks for {len(continuation)} tokens and max_length is {self.max_length}; "
                "set max_length"
            )
        ids = (context + continuation)[-self.max_length - 1 :]
        return scoring.row(ids, first=max(given, len(ids) - len(continuation)))

    def _options(self, asked: Mapping[str, Any]) -> tuple[GenerateOptions, list[str]]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS))
        until, is_sampled = options.pop("until"), options.pop("do_sample")
        temperature = float(options.pop("temperature", 1.0))
        found = GenerateOptions(
            max_new_tokens=options.pop("max_gen_toks"),
            temperature=temperature if is_sampled else 0.0,
            top_k=int(options.pop("top_k", 0)),
            top_p=float(options.pop("top_p", 1.0)),
            seed=self._seed,
        )
        if options:
            raise UserError(f"unknown generation_kwargs.{min(options)}; remove it from the task")
        return found, until

    def _continue(self, prompts: Sequence[_Prompt], options: GenerateOptions) -> list[str]:
        """Continues prompts in ROWS rows, repeating the last, so that a length is compiled once."""
        tokenizer = self._loaded.tokenizer
        rows = [prompts[min(i, len(prompts) - 1)].ids for i in range(ROWS)]
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text)
        model, params = self._loaded.model, self._loaded.params
        new = generate(model, params, rows, options=options, vocabulary=vocabulary)
        return [tokenizer.decode(ids) for ids in new[: len(prompts)]]


class _Prompt(NamedTuple):
    """`place`: its number among the requests. `until`: texts that end the continuation."""

    place: int
    ids: list[int]
    until: list[str]
