"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or leaves what was there: a kill at any time leaves one of the two.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
