"""How answers leave: whole with their headers, or as server-sent events; and never for a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio
from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.answers.generation import Generation
from server.api.engine_errors import api_error
from server.engine.base import EngineError
from server.wire.base import ResponseModel
from steering.decision import SteeringDecision

APPLIED_HEADER = "X-FineSteer-Applied"
PROFILES_HEADER = "X-FineSteer-Profiles"
PING_S = 15
Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled at once when the client goes.

    The request's body must have been read. Raises ClientDisconnect, and whatever `work` raises.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def whole(answer: ResponseModel, generations: Sequence[Generation], *, tell: bool) -> Response:
    """A whole answer as JSON; `tell`: with the steering headers."""
    decisions = [generation.decision for generation in generations if generation.decision is not None]
    headers = steering_headers(decisions) if tell else {}
    return Response(answer.to_json(), media_type="application/json", headers=headers)


def steering_headers(decisions: Sequence[SteeringDecision]) -> dict[str, str]:
    """Whether any prompt's numbers were changed, and the profiles that changed them."""
    acted = {profile.name: None for decision in decisions for profile in decision.profiles if profile.applied}
    return {
        APPLIED_HEADER: "true" if any(decision.applied for decision in decisions) else "false",
        PROFILES_HEADER: ",".join(acted),
    }


class AnswerStream(EventSourceResponse):
    """Chunks as server-sent events, `[DONE]` at the end.

    An engine's error in mid-stream becomes an event `{"error": …}` and the end, without `[DONE]`. `close` is awaited
    however the stream ends, also where the client goes before its first byte.
    """

    def __init__(
        self, chunks: AsyncIterator[ResponseModel], close: Callable[[], Awaitable[None]], shutdown_grace_s: float
    ) -> None:
        super().__init__(
            _events(chunks),
            ping=PING_S,
            headers={"Cache-Control": "no-cache"},
            # The library sets this event at shutdown, and cuts streams that have not ended when the grace is over.
            shutdown_event=anyio.Event(),
            shutdown_grace_period=shutdown_grace_s,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()


async def _events(chunks: AsyncIterator[ResponseModel]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield b"data: " + chunk.to_json().encode() + b"\n\n"
    except EngineError as error:
        yield b"data: " + api_error(error).to_json() + b"\n\n"
    else:
        yield b"data: [DONE]\n\n"
