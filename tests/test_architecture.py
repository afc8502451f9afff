"""The tree has the shape that tests/architecture.py describes, and planted violations are found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.architecture import (
    CHECKS,
    ROOT,
    check_borders,
    check_budgets,
    check_files,
    check_module_level_arrays,
    check_names,
    check_ranks,
)

Check = Callable[[Path], Iterator[str]]


@pytest.mark.parametrize("check", CHECKS)
def test_tree(check: Check) -> None:
    found = list(check(ROOT))
    assert not found, "\n".join(found)


def test_kernels_is_ours() -> None:
    """`kernels` is also the name of a published package."""
    spec = importlib.util.find_spec("kernels")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    assert list(map(Path, spec.submodule_search_locations)) == [ROOT / "kernels"]


# Check, file, the file's text, part of the message. `BESIDE` holds the other files it needs.
PLANTED: list[tuple[Check, str, str, str]] = [
    (
        check_ranks,
        "lm/config.py",
        "def f():\n    from lm import train\n",
        "'config' imports lm.train",
    ),
    (check_ranks, "lm/metrics.py", "from .params import x\n", "lower rank"),
    (check_ranks, "lm/loss.py", "import lm\n", "lower rank"),
    (check_ranks, "lm/metrics.py", "if TYPE_CHECKING:\n    import lm.mup\n", "lm.mup"),
    (check_ranks, "lm/surprise.py", "", "no rank"),
    (check_ranks, "kernels/foo/surprise.py", "", "no rank"),
    (check_ranks, "kernels/foo/tile.py", "import kernels.b.tile\n", "another op"),
    (check_ranks, "kernels/foo/reference.py", "import kernels.primitives.rope\n", "oracle"),
    (check_ranks, "kernels/foo/chunked.py", "import kernels.foo.decode\n", "lower rank"),
    (check_ranks, "kernels/foo/tile.py", "from . import decode\n", "imports kernels.foo.decode"),
    (check_ranks, "lm/mixers/bar.py", "import lm.mixers.baz\n", "lower rank"),
    (check_ranks, "lm/data/a.py", "import lm.data.b\n", "cycle"),
    (check_borders, "lm/metrics.py", "import launch.cli\n", "lm imports launch.cli"),
    (check_borders, "launch/a.py", "from experiments import base\n", "imports experiments"),
    (check_borders, "lm/model.py", "import kernels.foo.tile\n", "may not see kernels.foo.tile"),
    (check_borders, "lm/model.py", "import kernels.blocks\n", "may not see kernels.blocks"),
    (check_borders, "kernels/foo/tile.py", "import flax\n", "kernels imports flax"),
    (check_borders, "kernels/foo/tile.py", "import triton\n", "kernels imports triton"),
    (check_borders, "experiments/a.py", "import jax\n", "experiments imports jax"),
    (check_budgets, "lm/metrics.py", "x = 1\n" * 401, "401 lines, budget 400"),
    (check_budgets, "kernels/foo/pallas_tpu.py", "x = 1\n" * 601, "budget 600"),
    (
        check_budgets,
        "launch/a.py",
        "x = 1\n" * 80 + "if __name__ == '__main__': f()\n",
        "budget 80",
    ),
    (check_budgets, "lm/metrics.py", "def f():\n" + "    pass\n" * 60, "f has 61 lines, budget 60"),
    (
        check_budgets,
        "lm/a.py",
        "class A:\n    def f(self, a, b, c, d, *, e, f, g, h, i): 0\n",
        "9 par",
    ),
    (check_module_level_arrays, "lm/a.py", "import jax.numpy as jnp\njnp.zeros(3)\n", "jnp.zeros"),
    (
        check_module_level_arrays,
        "lm/a.py",
        "from jax import lax\ndef f(x=lax.iota(3)): 0\n",
        "lax.io",
    ),
    (check_names, "lm/utils.py", "", "named utils"),
    (check_names, "lm/text_utils.py", "", "named utils"),
    (check_names, "lm/model.py", "x = 'bar, x'\n", "spells 'bar'"),
    (check_names, "kernels/dispatch.py", "x = 'foo'\n", "spells 'foo'"),
    (check_names, "lm/mixers/bar.py", "x = 'baz'\n", "spells 'baz'"),
    (check_files, "kernels/foo/tile.py", "", "reference.py is missing"),
    (check_files, "lm/mixers/bar.py", "", "test_bar.py is missing"),
]
BESIDE = {
    "kernels/foo/decode.py": "",
    "lm/data/b.py": "import lm.data.a\n",
    "lm/mixers/bar.py": "",
    "lm/mixers/baz.py": "",
    "lm/params.py": "",
    "lm/train.py": "",
}

SOUND = {
    "kernels/__init__.py": '"""Ours."""\n',
    "kernels/foo/tile.py": "import jax.numpy as jnp\nfrom kernels import letters\nx = 'foo'\n",
    "kernels/foo/triton_gpu.py": "def f():\n    import triton\n",
    "kernels/foo/pallas_tpu.py": "def a_kernel(a, b, c, d, e, f, g, h, i): ...\n",
    "kernels/dispatch.py": "import kernels.shard\n",
    "kernels/letters.py": "from typing import Any\n",
    "lm/data/a.py": "from lm.data import b\nfrom lm.config import Config\n",
    "lm/data/b.py": "import jax.numpy as jnp\n\ndef f():\n    return jnp.zeros(3)\n",
    "lm/mixers/bar.py": "from kernels import dispatch\nOP = 'foo'\n",
    "lm/config.py": '"""foo"""\n',
    "launch/a.py": "import lm.config, launch.cli, kernels.blocks, kernels.foo.cases\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("check", "path", "text", "message"), PLANTED)
def test_planted_violation_is_found(
    tmp_path: Path, check: Check, path: str, text: str, message: str
) -> None:
    plant(tmp_path, BESIDE | {path: text})
    assert any(message in found for found in check(tmp_path)), list(check(tmp_path))


@pytest.mark.parametrize("check", CHECKS[:-1])
def test_sound_tree_passes(tmp_path: Path, check: Check) -> None:
    plant(tmp_path, SOUND)
    assert list(check(tmp_path)) == []
