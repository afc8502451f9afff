"""Seconds of a decode step against the number of tokens the state can hold, for every mixer.

One row is decoded. A mixer whose state does not grow must cost the same at every context; a mixer
whose state grows is reported without a goal.
"""

from __future__ import annotations

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm import families
from lm.studies import measure

FLAT = Goal("<=", 1.1)
CONTEXTS = (1024, 4096, 16384)


def run(
    options: Options,
    contexts: tuple[int, ...] = CONTEXTS,
    mixers: tuple[str, ...] | None = None,
) -> list[Result]:
    return [
        _result(options, mixer, contexts)
        for mixer in (families.MIXERS.names() if mixers is None else mixers)
    ]


def _result(options: Options, mixer: str, contexts: tuple[int, ...]) -> Result:
    built = problem.built(options, mixer)
    params = built.init(0).params
    sides = {f"{n} tokens": measure.decoder(built.model, params, n) for n in contexts}
    samples = timing.interleave(sides, options.pairs)
    state = {n: measure.state_bytes(built.model, n) for n in contexts}
    shortest, longest = min(contexts), max(contexts)
    return timing.ratio(
        f"decode/{mixer}/{longest} over {shortest} tokens",
        samples,
        (f"{longest} tokens", f"{shortest} tokens"),
        FLAT if state[longest] == state[shortest] else None,
        state_bytes=state,
        milliseconds={
            n: 1e3 * timing.quartile(samples[f"{n} tokens"]) / measure.DECODE_STEPS
            for n in contexts
        },
    )
