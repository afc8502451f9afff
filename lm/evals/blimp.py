"""BLiMP: minimal pairs of sentences, one of which breaks a rule of grammar. The model chooses the
likelier one (Warstadt et al. 2020, arXiv 1912.00582).

    accuracy            share of pairs; also the mean over paradigms, which have equally many pairs
    accuracy/NAME       the same for a phenomenon, which has several paradigms
    baseline_unigram    the same for counts of the run's training tokens (lm/data/ngram.py),
    baseline_bigram     for counts of pairs of neighbors (bigram/NAME: for a phenomenon),
    baseline_length     and for the number of tokens: the shorter sentence is chosen
    over_bigram         accuracy - baseline_bigram, pair by pair; at "chance" there is no difference

The words in the sentences may decide a paradigm, so compare the accuracy with the baselines. A tie
counts as half.

    log p(sentence) = log p_unigram(first token) + log p(the rest | first token)

is used because a model without a start token has no distribution of first tokens. A model with a
start token reads it before every sentence and gives log p(sentence) itself. In 88 of 100 pairs the
sentences begin with the same word, whose term cancels.

The path is a .tar or .tar.gz, which is read in place, or a folder. In it, the folder with the most
.jsonl files is used; each of its files is a paradigm, named after the file.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from lm.config import UserError
from lm.data import ngram
from lm.data.ngram import Ngrams
from lm.evals import Given, Items, Number, Scored, _documents, _json_lines, _requests
from lm.evals._json_lines import Line
from lm.evals._requests import TIE
from lm.evaluation import scoring, statistics
from lm.files import one_line

SIDES = ("sentence_good", "sentence_bad")
BASELINES = ("unigram", "bigram", "length")


class Pairs(NamedTuple):
    """`phenomenon` [pairs]. `first` [pairs, 2]: log-probabilities of the first tokens. `baselines`:
    name -> scores [pairs, 2]. Index 0 is the good sentence, 1 the bad one.
    """

    phenomenon: np.ndarray
    first: np.ndarray
    baselines: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blimp:
    """The options of this task.

    Attributes:
      path: blimp.tar.gz, or a folder of .jsonl files
      max_items: pairs of each paradigm, evenly spread; 0: all
      max_len: most tokens of a sentence; 0: the run's context length
      ngram_tokens: training tokens that the baselines count
    """

    path: str = ""
    max_items: int = 0
    max_len: int = 0
    ngram_tokens: int = 1 << 22
    headline: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of pairs"
    is_better: ClassVar[Literal["higher", "lower"]] = "higher"

    def problem(self) -> str | None:
        if not self.path:
            return "path is empty; set it to blimp.tar.gz or a folder of .jsonl files"
        for name in ("max_items", "max_len"):
            if getattr(self, name) < 0:
                return f"{name}={getattr(self, name)} must be >= 0"
        return None if self.ngram_tokens > 0 else f"ngram_tokens={self.ngram_tokens} must be > 0"

    def items(self, given: Given) -> Items:
        paradigms = _paradigms(self.path)
        fewest = min(map(len, paradigms.values()))
        most = min(fewest, self.max_items or fewest)
        lines = [x for found in paradigms.values() for x in _json_lines.spread(found, most)]
        texts = [line.text(side) for line in lines for side in SIDES]
        sentences = [np.asarray(ids, np.int32) for ids in given.tokenizer.encode_batch(texts)]
        limit = self.max_len or given.data.context_length
        for i, ids in enumerate(sentences):
            place = f"{lines[i // 2].place}: {SIDES[i % 2]}"
            if len(ids) < 2:
                raise UserError(f"{place} has {len(ids)} tokens; a sentence needs two")
            scoring.check_length(place, len(ids) - 1, limit, "set max_len")
        counts = ngram.of_training(
            given.prepared.stores,
            {name: source.weight for name, source in given.data.sources.items()},
            self.ngram_tokens,
            given.tokenizer.vocab_size,
            given.tokenizer.end_of_text,
        )
        phenomenon = np.array([line.text("linguistics_term") for line in lines])
        first, baselines = _baselines(counts, sentences)
        start = given.tokenizer.start
        if start:  # the model has a distribution of first tokens
            first = np.zeros_like(first)
        rows = _documents.rows((np.asarray([*start, *x], np.int32), 1) for x in sentences)
        return Items(rows, Pairs(phenomenon, first, baselines))

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        about: Pairs = items.about
        hits = _chosen(_requests.logprobs(scored).reshape(-1, 2) + about.first)
        base = {name: _chosen(scores) for name, scores in about.baselines.items()}
        share = lambda values: statistics.share(values, chance=0.5)
        found = {"accuracy": share(hits)}
        found |= {f"baseline_{name}": share(values) for name, values in base.items()}
        over = statistics.difference(found["accuracy"], found["baseline_bigram"])
        found["over_bigram"] = dataclasses.replace(over, chance=0.0)
        for name in np.unique(about.phenomenon):
            at = about.phenomenon == name
            found[f"accuracy/{name}"] = share(hits[at])
            found[f"bigram/{name}"] = share(base["bigram"][at])
        return found


def _baselines(
    counts: Ngrams, sentences: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    unigram = [counts.unigram(ids) for ids in sentences]
    sums = {
        "unigram": [-nats.sum() for nats in unigram],
        "bigram": [-counts.bigram(ids).sum() for ids in sentences],
        "length": [-float(len(ids)) for ids in sentences],
    }
    first = -np.array([nats[0] for nats in unigram]).reshape(-1, 2)
    return first, {name: np.array(sums[name]).reshape(-1, 2) for name in BASELINES}


def _chosen(scores: np.ndarray) -> np.ndarray:
    """Scores [pairs, 2] -> credit [pairs]."""
    good, bad = scores.T
    return np.where(np.isclose(good, bad, rtol=TIE, atol=TIE), 0.5, good > bad)


def _paradigms(path: str) -> dict[str, list[Line]]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = {str(file.relative_to(place)): file for file in sorted(place.rglob("*.jsonl"))}
        return {name: _json_lines.read(files[name]) for name in _largest(path, list(files))}
    with one_line(f"cannot read path={path!r}"), tarfile.open(place) as archive:
        streams = {
            member.name: archive.extractfile(member)
            for member in archive
            if member.isfile() and member.name.endswith(".jsonl")
        }
        content = {name: stream.read() for name, stream in streams.items() if stream}
    return {
        name: _json_lines.lines(f"{place}:{name}", io.BytesIO(content[name]))
        for name in _largest(path, list(content))
    }


def _largest(path: str, names: Sequence[str]) -> list[str]:
    """The files of the folder that has the most of them; among equals, of the first folder."""
    folders = collections.Counter(str(PurePosixPath(name).parent) for name in names)
    if not folders:
        raise UserError(f"path={path!r} holds no .jsonl file; set it to BLiMP's")
    ((folder, _),) = folders.most_common(1)
    return [name for name in names if str(PurePosixPath(name).parent) == folder]
