"""Around every request: an id, an API key check where one is asked for, and an account of it at the end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.gatekeeper import Gatekeeper
from server.access.keys import Access
from server.answers.generation import Generation
from server.api.route_names import RouteNames
from server.errors import ApiError
from server.observability.account import Recorder, RequestAccount
from server.service import new_id

REQUEST_ID_HEADER = "X-Request-Id"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TRACE_HEADERS = ("traceparent", "tracestate")


class RequestContext:
    """ASGI middleware. Leaves `request_id` in the request's state; whatever `watch` left there goes into the account."""

    def __init__(self, app: ASGIApp, access: Access, routes: RouteNames, recorder: Recorder) -> None:
        self._app = app
        self._gatekeeper = Gatekeeper(access)
        self._routes, self._recorder = routes, recorder

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
        began_s, begun_s, status, visitor = time.time(), time.perf_counter(), None, None

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
            model, generations = state.get("watched", (None, ()))
            account = RequestAccount(
                request_id=request_id,
                method=method,
                path=scope["path"],
                route=self._routes.of(scope["path"]),
                status=status or 500,
                began_s=began_s,
                seconds=time.perf_counter() - begun_s,
                key=None if visitor is None else visitor.name,
                model=model,
                generations=generations,
                trace_headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
            )
            if visitor is not None and visitor.usage is not None:
                visitor.usage.end(account.prompt_tokens + account.completion_tokens)
            self._recorder.ended(account)


def error_response(error: ApiError) -> Response:
    """The error as OpenAI writes it."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if error.closes:
        headers["Connection"] = "close"
    return Response(error.to_json(), status_code=error.status, media_type="application/json", headers=headers)


def watch(request: Request, model: str, generations: Sequence[Generation]) -> None:
    """Have the request's account tell of these generations."""
    request.state.watched = (model, generations)
