"""`evidence.json` as it is read, by reports and by the server. No more than JSON: the server need not load what draws figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steering.errors import ProfileError
from steering.profile import EVIDENCE_FILE

PARTS = {
    "gate": {"ir": list, "general": list},
    "experts": {"points": list, "prototypes": list, "experts": list, "entropy": list, "curve": list},
}


def load_evidence(folder: Path) -> dict[str, Any]:
    """The folder's evidence; empty where there is none (an imported profile). Raises ProfileError for a damaged file."""
    path = folder / EVIDENCE_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProfileError(f"{path}: not valid JSON ({error}). Delete it, or train the profile again.") from error
    if not _has(found, {"examples": bool}) or not all(
        part not in found or _has(found[part], keys) for part, keys in PARTS.items()
    ):
        raise ProfileError(f"{path}: not what the trainer writes. Delete it, or train the profile again.")
    return found


def _has(found: Any, keys: dict[str, type]) -> bool:
    """Whether it is an object with these keys, none of them empty."""
    return isinstance(found, dict) and all(
        isinstance(found.get(key), kind) and (kind is bool or found[key]) for key, kind in keys.items()
    )
