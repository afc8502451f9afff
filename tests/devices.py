"""Which device a run of the tests is for."""

from __future__ import annotations

import re


def selected(markexpr: str) -> str | None:
    """ "gpu" or "tpu" where `-m` asks for tests of such a device; None: eight of the CPU.

    >>> selected("not slow and not gpu and not tpu"), selected("gpu and not slow")
    (None, 'gpu')
    """
    found = re.search(r"\b(gpu|tpu)\b", re.sub(r"not \w+", "", markexpr))
    return found[0] if found else None
