"""Where a request is cut: whichever tokens merge, at least one is given and one is scored."""

from __future__ import annotations

import pytest

from lm.config import UserError
from lm.evals import _requests
from lm.evals._requests import Request
from tests.lm.evals import planted


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_cut_of_a_text_is_scored(kind: str) -> None:
    """The last token is always scored, and all tokens together decode to the text of the
    request.
    """
    tokenizer = planted.tokenizer(kind)
    text = "The pass key is 12 34. Remember it, é"
    pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
    words = [(word[:1], word[1:]) for word in ("key", "pass")]
    requests = [Request("here", *pair) for pair in pairs + words]
    joined = 0
    for request, (ids, first) in zip(requests, _requests.split(requests, tokenizer), strict=True):
        assert 1 <= first < len(ids)
        assert tokenizer.decode(ids.tolist()) == request.context + request.continuation
        joined += len(tokenizer.encode(request.context + request.continuation)) == 1
    assert joined == {"bytes": 0, "bpe": 2}[kind]


@pytest.mark.parametrize("pair", [("", "a"), ("abc", ""), ("", "")])
def test_a_request_without_a_token_to_score_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"^there: the continuation needs a token with one before"):
        _requests.split([Request("there", *pair)], planted.tokenizer("bpe"))
