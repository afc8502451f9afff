"""Nothing in a folder of tasks is executed: code is refused, with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.config import UserError
from lm.interop import harness_tasks

DATA = """
task: local
dataset_kwargs: &a {data_files: {test: x.jsonl}}
again: *a
doc_to_text: "{{question}} !function inside a text"
metric_list: [{metric: acc, higher_is_better: true, weight: 1.5, none: null, day: 2024-01-01}]
"""
# Files of the folder tasks (../ is beside it), and part of the error; "": there is no error.
FOLDERS: list[tuple[dict[str, str], str]] = [
    ({"a.yaml": DATA}, ""),
    ({"a.yaml": ""}, ""),
    ({"a.yaml": DATA, "readme.txt": "x: !function utils.f"}, ""),
    ({"a.yaml": DATA + "process_docs: !function utils.f"}, "a.yaml, line 7: !function runs Python"),
    ({"deep/er/a.yaml": "x: [{y: [1, !function u.f ]}]"}, "er/a.yaml, line 1: !function"),
    ({"a.yaml": "x: {!function u.f : 1}"}, "line 1: !function"),
    ({"a.yaml": "x: &b !function u.f\ny: *b"}, "line 1: !function"),
    ({"a.yaml": "x: !<!function> u.f"}, "line 1: !function"),
    ({"a.yaml": "%TAG !e! !func\n---\nx: !e!tion u.f"}, "line 3: !function"),
    ({"a.yaml": "include: base", "base": "x: !function u.f"}, "base, line 1: !function"),
    ({"a.yaml": "include: [b, ../c]", "b": "{}", "../c": "x: !function u.f"}, "c, line 1: !func"),
    ({"a.yaml": "include: a.yaml\nx: !function u.f"}, "line 2: !function"),
    ({"a.yaml": "include: absent"}, "absent: cannot be read"),
    ({"a.yaml": "<<: {include: b}", "b": "x: !function u.f"}, "b, line 1: !function"),
    ({"a.yaml": "task: [{task: t, include: b}]", "b": "x: !function u.f"}, "b, line 1: !func"),
    ({"a.yaml": 'include: "b\\0"'}, "cannot be read"),
    ({"a.yaml": 'include: "\\ud800"'}, "cannot be read"),
    ({"a.yaml": "x: !!python/object/apply:os.getpid []"}, "python/object/apply:os.getpid runs"),
    ({"a.yaml": "x: !!python/name:os.getpid"}, "python/name:os.getpid runs Python"),
    ({"a.yaml": "x: [1"}, "a.yaml: cannot be read"),
    ({"a.yaml": "x: \x01"}, "a.yaml: cannot be read"),
    ({"a.yaml": "[" * 3000}, "a.yaml: cannot be read"),
]


@pytest.mark.parametrize(("files", "message"), FOLDERS, ids=lambda x: str(x)[:60])
def test_folders_with_code_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / "tasks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if not message:
        harness_tasks.check_is_data(tmp_path / "tasks")
        return
    with pytest.raises(UserError) as caught:
        harness_tasks.check_is_data(tmp_path / "tasks")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: cannot be read"):
        harness_tasks.check_is_data(tmp_path)
