"""`/health`, `/ready` and `/version` on the wire."""

from __future__ import annotations

from typing import Literal

from server.wire.base import ResponseModel


class Health(ResponseModel):
    status: Literal["ok"]


class Versions(ResponseModel):
    """The server's version, and those of what it runs on."""

    version: str
    engine: str
    torch: str
    transformers: str
    system_fingerprint: str
