"""API keys: where they come from, and whose one is. Only their hashes are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPACE = re.compile(r"\s")


class KeyFileError(Exception):
    """The key file cannot be used; names the file and the entry."""


@dataclass(frozen=True)
class ApiKey:
    """One client's key. `name` stands for it in logs. Limits are None where there is none."""

    name: str
    sha256: str = field(repr=False)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Access:
    """Whom the server answers. Without `api_keys` anyone; without `admin_sha256` nobody administers it.

    `guard_metrics`: `/metrics` wants a key too. `isolate_keys`: no key's requests find another's prompts in the prefix cache, so
    that nobody can tell by the time it takes what others have asked.
    """

    api_keys: tuple[ApiKey, ...] = ()
    admin_sha256: str | None = field(default=None, repr=False)
    guard_metrics: bool = False
    isolate_keys: bool = False

    @classmethod
    def of(cls, *keys: str, admin: str | None = None, guard_metrics: bool = False) -> Access:
        """From the keys themselves, without limits."""
        named = tuple(ApiKey(f"key-{number}", digest(key)) for number, key in enumerate(keys, start=1))
        return cls(named, digest(admin) if admin else None, guard_metrics)

    def holder(self, key: str) -> ApiKey | None:
        """Whose key this is. The hash is looked up, so how long it takes tells nothing of any key."""
        return self._by_sha256.get(digest(key))

    @cached_property
    def _by_sha256(self) -> dict[str, ApiKey]:
        return {key.sha256: key for key in self.api_keys}

    def administers(self, key: str) -> bool:
        """Whether this is the admin key."""
        return digest(key) == self.admin_sha256


def digest(key: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(key: str) -> str | None:
    """Why a key cannot be one; None where it can."""
    if not key or _SPACE.search(key):
        return "must not be empty or hold spaces"
    return None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a JSON file: {"keys": [{"name", "sha256", "requests_per_minute", "tokens_per_minute", "max_concurrent"}]}.

    Raises KeyFileError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise KeyFileError(f"{path}: not valid JSON ({error}).") from error
    rows = content.get("keys") if isinstance(content, dict) and set(content) == {"keys"} else None
    if not isinstance(rows, list) or not rows:
        raise KeyFileError(f'{path}: must be an object {{"keys": [...]}} with at least one key.')
    keys = tuple(_key(row, f"{path}: keys[{number}]") for number, row in enumerate(rows))
    for attribute in ("name", "sha256"):
        if twice := _first_repeated(getattr(key, attribute) for key in keys):
            raise KeyFileError(f"{path}: {attribute} {twice!r} is given twice.")
    return keys


def _key(row: Any, where: str) -> ApiKey:
    if not isinstance(row, dict):
        raise KeyFileError(f"{where} must be an object.")
    known = {f.name for f in fields(ApiKey)}
    if unknown := sorted(set(row) - known):
        raise KeyFileError(f"{where} has an unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    name, sha256 = row.get("name"), row.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise KeyFileError(f"{where}.name must be 1 to 64 letters, digits, dots, dashes and underscores.")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise KeyFileError(
            f"{where}.sha256 must be 64 lower-case hex digits; `finesteer key` makes a key and its hash."
        )
    for limit in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        value = row.get(limit)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise KeyFileError(f"{where}.{limit} must be a whole number above 0, or left out for no limit.")
    return ApiKey(**row)


def _first_repeated(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
