"""Rows that a long evaluation writes as it goes, so that a run that was cut short goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """A hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class KeptRows:
    """A JSONL file whose first line holds a key: rows under another key are worthless and are dropped. No path: in memory only."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        head, *rows = _whole_lines(path) or [{}]
        if head.get("key") == key:
            self.rows = rows
        path.write_text("".join(json.dumps(row) + "\n" for row in [{"key": key}, *self.rows]), encoding="utf-8")

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows, on disk at once."""
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects up to the first line that a crash left half written."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict):
                break
            found.append(row)
    return found
