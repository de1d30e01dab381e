"""Around every request: an id, an API key check where one is asked for, and one line in the log at the end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.gatekeeper import Gatekeeper
from server.access.keys import Access
from server.answers.generation import Generation
from server.errors import ApiError
from server.observability.logging import log_request
from server.service import new_id

REQUEST_ID_HEADER = "X-Request-Id"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


class RequestContext:
    """ASGI middleware. Leaves `request_id` in the request's state; whatever `watch` left there goes into the log line."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._gatekeeper = Gatekeeper(access)

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
        begun_s, status, visitor = time.perf_counter(), None, None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent_headers = MutableHeaders(scope=message)
                sent_headers[REQUEST_ID_HEADER] = request_id
                if visitor is not None and visitor.usage is not None:
                    sent_headers.update(visitor.usage.headers())
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        try:
            try:
                visitor = self._gatekeeper.admit(scope["method"], scope["path"], headers.get("Authorization", ""))
            except ApiError as error:
                await error_response(error)(scope, receive, send_with_id)
            else:
                state["key"] = visitor.name if visitor else ""
                await self._app(scope, receive, send_with_id)
        finally:
            account = _account(state)
            if visitor is not None and visitor.usage is not None:
                visitor.usage.end(account.get("prompt_tokens", 0) + account.get("completion_tokens", 0))
            if scope["path"] not in QUIET_PATHS:
                log_request(
                    {
                        "request": request_id,
                        "path": scope["path"],
                        "status": status or 500,
                        "seconds": time.perf_counter() - begun_s,
                        **({} if visitor is None else {"key": visitor.name}),
                        **account,
                    }
                )


def error_response(error: ApiError) -> Response:
    """The error as OpenAI writes it."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if error.closes:
        headers["Connection"] = "close"
    return Response(error.to_json(), status_code=error.status, media_type="application/json", headers=headers)


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
