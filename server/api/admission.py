"""Lets requests in until the server drains, and counts those that are being answered."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.context import error_response
from server.draining import Draining
from server.errors import ShuttingDownError

ALWAYS_ANSWERED = frozenset({"/health", "/ready", "/metrics", "/version"})


class Admission:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app, self._draining = app, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        if self._draining.begun:
            refusal = ShuttingDownError("The server is shutting down. Try another one, or this one again in a while.")
            await error_response(refusal)(scope, receive, send)
            return
        self._draining.num_active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._draining.num_active -= 1
