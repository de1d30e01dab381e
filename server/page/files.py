"""The page's files, read once: what is not in this table cannot be asked for. No FastAPI."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class PageFile:
    """One file. `etag` is a weak one, since compression on the way changes the bytes and not what they say."""

    body: bytes
    media_type: str
    etag: str

    def unchanged(self, if_none_match: str) -> bool:
        """Whether the client has it already, by its `If-None-Match` header."""
        tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
        return "*" in tags or self.etag.removeprefix("W/") in tags


def page_files() -> dict[str, PageFile]:
    """Every file of the page by its name; those whose ending `MEDIA_TYPES` does not know are left out."""
    found = {}
    for entry in (resources.files("server.page") / "static").iterdir():
        media_type = MEDIA_TYPES.get(PurePath(entry.name).suffix)
        if media_type is not None and entry.is_file():
            body = entry.read_bytes()
            found[entry.name] = PageFile(body, media_type, f'W/"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found
