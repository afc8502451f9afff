"""The compilation cache of a launch, and the line that says where its first seconds went."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from lm.run import compiled, start
from lm.run.start import Start

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys, pathlib, jax, jax.monitoring
found = {"hits": 0, "misses": 0}
def count(name, **_):
    for kind in found:
        found[kind] += name == f"/jax/compilation_cache/cache_{kind}"
jax.monitoring.register_event_listener(count)
from lm.run import compiled
jax.jit(lambda x: x + 1)(1.0)
compiled.SHORTEST = 0.0
compiled.keep(pathlib.Path(sys.argv[1]), is_wanted=sys.argv[2] == "True")
print(float(jax.jit(lambda x: jax.numpy.sin(x) * 3)(1.0)))
print(json.dumps(found | {"folder": jax.config.jax_compilation_cache_dir}))
"""


def launch(
    data_dir: Path, *, is_wanted: bool = True, chosen: str = ""
) -> tuple[str, dict[str, Any]]:
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if chosen:
        env["JAX_COMPILATION_CACHE_DIR"] = chosen
    line = [sys.executable, "-c", SCRIPT, str(data_dir), str(is_wanted)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    value, found = done.stdout.splitlines()
    return value, json.loads(found)


def test_a_later_launch_reads_what_an_earlier_one_compiled(tmp_path: Path) -> None:
    """A program compiled before `keep` does not settle that nothing is kept."""
    value, first = launch(tmp_path)
    assert first["hits"] == 0 < first["misses"]
    assert Path(first["folder"]) == compiled.folder(tmp_path)
    again, second = launch(tmp_path)
    assert second["misses"] == 0 < second["hits"]
    assert again == value
    for path in compiled.folder(tmp_path).glob("*-cache"):
        path.write_bytes(path.read_bytes()[:7])  # as where a kill cut the writing short
    env_value, third = damaged(tmp_path)
    assert env_value == value
    assert third["folder"] == first["folder"]


def damaged(data_dir: Path) -> tuple[str, dict[str, Any]]:
    """The same, where JAX may warn of files that it cannot read."""
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(data_dir), "True"]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    value, found = done.stdout.splitlines()
    return value, json.loads(found)


def test_it_can_be_turned_off_and_a_choice_of_the_user_stays(tmp_path: Path) -> None:
    assert launch(tmp_path, is_wanted=False)[1]["folder"] is None
    assert not list(tmp_path.iterdir())
    chosen = str(tmp_path / "chosen")
    assert launch(tmp_path / "data", chosen=chosen)[1]["folder"] == chosen
    assert not (tmp_path / "data").exists()


def test_a_folder_belongs_to_one_compiler_and_one_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for cpu, version in (("A (R) 1", "0.1"), ("A (R) 2", "0.1"), ("A (R) 2", "0.2"), ("", "0.2")):
        monkeypatch.setattr(compiled.record, "cpu", lambda cpu=cpu: cpu)
        monkeypatch.setattr(compiled.jaxlib.version, "__version__", version)
        found.add(compiled.folder(tmp_path).name)
    assert found == {"0.1-A_R_1", "0.1-A_R_2", "0.2-A_R_2", "0.2-unknown"}
    assert jax.config.jax_compilation_cache_dir, "the tests have a cache of their own"


def test_the_parts_are_logged_once_and_add_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(start.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(start, "_age", lambda: 2.0)
    began = Start()
    with caplog.at_level(logging.INFO, "lm"):
        for part, seconds in (("data", 1.5), ("compile", 4.0)):
            now[0] += seconds
            began.done(part)
        now[0] += 0.5
        began.end()
        now[0] += 9
        began.done("compile")
        began.end()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "first step after 8.0 s: imports 2.0, data 1.5, compile 4.0, step 0.5"


def test_the_age_of_this_process_is_known_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    age = start._age()
    assert age is not None
    assert 0 < age < 1e6
    monkeypatch.setattr(start, "STAT", Path("/absent"))
    assert start._age() is None
