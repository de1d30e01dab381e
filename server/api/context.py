"""Around every request: an id, an API key check where one is asked for, and one line in the log at the end."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.answers.generation import Generation
from server.errors import ApiError, AuthenticationError
from server.observability.logging import log_request
from server.service import new_id

REQUEST_ID_HEADER = "X-Request-Id"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


class RequestContext:
    """ASGI middleware. Leaves `request_id` in the request's state; whatever `watch` left there goes into the log line."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, headers = scope["method"], Headers(scope=scope)
        if method == "HEAD":  # a GET whose body is kept back: no route need know of it
            scope = scope | {"method": "GET"}
        sent = headers.get(REQUEST_ID_HEADER, "")
        request_id = sent if SANE_ID.fullmatch(sent) else new_id("req-")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        begun_s, status = time.perf_counter(), None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        try:
            if self._allows(scope["path"], headers):
                await self._app(scope, receive, send_with_id)
            else:
                error = AuthenticationError("Wrong or missing API key. Send it as `Authorization: Bearer KEY`.")
                await error_response(error)(scope, receive, send_with_id)
        finally:
            if scope["path"] not in QUIET_PATHS:
                log_request(
                    {
                        "request": request_id,
                        "path": scope["path"],
                        "status": status or 500,
                        "seconds": time.perf_counter() - begun_s,
                        **_account(state),
                    }
                )

    def _allows(self, path: str, headers: Headers) -> bool:
        if self._api_key is None or not path.startswith("/v1/"):
            return True
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key.encode())


def error_response(error: ApiError) -> Response:
    """The error as OpenAI writes it."""
    retry = {"Retry-After": "1"} if error.status == 503 else {}
    return Response(error.to_json(), status_code=error.status, media_type="application/json", headers=retry)


def watch(request: Request, model: str, generations: Sequence[Generation]) -> None:
    """Have the request's log line tell of these generations."""
    request.state.watched = (model, generations)


def _account(state: dict[str, Any]) -> dict[str, Any]:
    if "watched" not in state:
        return {}
    model, generations = state["watched"]
    decisions = [generation.decision for generation in generations if generation.decision is not None]
    fired = {profile.name: None for decision in decisions for profile in decision.profiles if profile.fired}
    times = [generation.time_to_first_token_s for generation in generations]
    return {
        "model": model,
        "prompt_tokens": sum(generation.prompt_tokens for generation in generations),
        "completion_tokens": sum(generation.completion_tokens for generation in generations),
        "first_token_s": min((time_s for time_s in times if time_s is not None), default=None),
        "steered": str(any(decision.applied for decision in decisions)).lower(),
        "reason": ",".join(dict.fromkeys(decision.reason for decision in decisions)) or None,
        "fired": ",".join(fired) or None,
    }
