"""What no flag of any command may be."""

from __future__ import annotations

import pytest

from tests.launch.test_cli import CONFIG, ROOT, WORKDIR, line_of

COMMANDS = [
    ([CONFIG, WORKDIR, "--rate=nan"], "--rate=nan must be a finite number"),
    ([CONFIG, WORKDIR, "--rate=-inf"], "--rate=-inf must be a finite number"),
    ([CONFIG, WORKDIR, "--rate=1e999"], "--rate=inf must be a finite number"),
    ([CONFIG, WORKDIR, "--profile_steps=4294967296"], "must be below 2^32 in size"),
    ([CONFIG, "--workdir=a\udcff"], "--workdir is not UTF-8 at place 11 of '--workdir=a\\udcff'"),
    ([CONFIG, WORKDIR, "a\udc80"], "the command line is not UTF-8 at place 1 of 'a\\udc80'"),
    ([CONFIG, WORKDIR, "--config.init_from=\udc80"], "--config.init_from is not UTF-8 at place 19"),
]


@pytest.mark.parametrize(("arguments", "told"), COMMANDS, ids=ascii)
def test_flag_values(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert told in line_of(arguments, capsys)
