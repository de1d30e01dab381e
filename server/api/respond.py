"""How answers leave: whole with their headers, or as server-sent events; and never for a client that has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import anyio
from fastapi import Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.answers.generation import Generation
from server.answers.merge import together
from server.api.engine_errors import api_error
from server.engine.base import EngineError
from server.errors import ApiError, InternalError
from server.wire.base import ResponseModel
from server.wire.response_objects import ErrorEvent, Event

APPLIED_HEADER = "X-FineSteer-Applied"
PROFILES_HEADER = "X-FineSteer-Profiles"
PING_S = 15.0  # the longest silence on a stream; proxies give up on a connection after a minute or so
WAITING = b": waiting\n\n"
Result = TypeVar("Result")
Framing = Callable[[AsyncIterator[Any]], AsyncIterator[bytes]]
logger = logging.getLogger("finesteer")


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
    headers = _steering_headers(generations) if tell else {}
    return Response(answer.to_json(), media_type="application/json", headers=headers)


async def streamed(
    request: Request,
    generations: Sequence[Generation],
    chunks: AsyncIterator[ResponseModel],
    *,
    tell: bool,
    framed: Framing | None = None,
) -> Response:
    """Start the generations, and then stream `chunks`, which must not be asked for before.

    Until the first tokens are there, nothing is sent: an error has its own HTTP status, and the headers say what was
    steered (`tell`). But no longer than `PING_S`: after that the status is 200 and the line a comment, again and again,
    an error is an event, and only the first chunk says what was steered. Closes the generations, whatever happens.
    """
    starting = asyncio.ensure_future(together([generation.start() for generation in generations]))

    async def close() -> None:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.gather(*(generation.aclose() for generation in generations))

    try:
        await while_connected(request, _within(starting, PING_S))
    except BaseException:
        await close()
        raise
    headers = _steering_headers(generations) if tell and starting.done() else {}
    return AnswerStream(_after(starting, chunks), close, headers, framed)


async def _within(work: asyncio.Future, patience_s: float) -> None:
    """Wait for `work`, raise what it raises, and leave it alone when it takes longer."""
    await asyncio.wait((work,), timeout=patience_s)
    if work.done():
        work.result()


async def _after(work: asyncio.Future, chunks: AsyncIterator[ResponseModel]) -> AsyncIterator[ResponseModel | bytes]:
    """`chunks` once `work` is done; a comment at once where it is not yet."""
    if not work.done():
        yield WAITING
        await work
    async for chunk in chunks:
        yield chunk


def _steering_headers(generations: Sequence[Generation]) -> dict[str, str]:
    """Whether any prompt's numbers were changed, and the profiles that changed them."""
    decisions = [generation.decision for generation in generations if generation.decision is not None]
    acted = {profile.name: None for decision in decisions for profile in decision.profiles if profile.applied}
    return {
        APPLIED_HEADER: "true" if any(decision.applied for decision in decisions) else "false",
        PROFILES_HEADER: ",".join(acted),
    }


class AnswerStream(EventSourceResponse):
    """Chunks as server-sent events, written by `framed`, and a comment in every `PING_S` of silence.

    `close` is awaited however the stream ends, also where the client goes before its first byte.
    """

    def __init__(
        self,
        chunks: AsyncIterator[ResponseModel | bytes],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
        framed: Framing | None = None,
    ) -> None:
        """`chunks` may hold bytes, which are sent as they are."""
        super().__init__(
            (framed or data_events)(chunks),
            ping=PING_S,
            ping_message_factory=lambda: ServerSentEvent(comment="waiting", sep="\n"),
            headers={"Cache-Control": "no-cache", **(headers or {})},
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()


async def data_events(chunks: AsyncIterator[ResponseModel | bytes]) -> AsyncIterator[bytes]:
    """Nameless events, `[DONE]` at the end. An error in mid-stream becomes an event `{"error": …}` and the end, without it."""
    try:
        async for chunk in chunks:
            yield chunk if isinstance(chunk, bytes) else b"data: " + chunk.to_json().encode() + b"\n\n"
    except Exception as error:
        yield b"data: " + _told(error).to_json() + b"\n\n"
    else:
        yield b"data: [DONE]\n\n"


async def named_events(events: AsyncIterator[Event | bytes]) -> AsyncIterator[bytes]:
    """Events under their types' names; the last one ends the stream, with no `[DONE]`. An error is an event of its own type."""
    number = 0
    try:
        async for event in events:
            if isinstance(event, bytes):
                yield event
                continue
            number = event.sequence_number + 1
            yield _named(event)
    except Exception as error:
        told = _told(error)
        yield _named(
            ErrorEvent(type="error", sequence_number=number, code=told.code, message=told.message, param=told.param)
        )


def _named(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {event.to_json()}\n\n".encode()


def _told(error: Exception) -> ApiError:
    """What a client hears of an error once the status has gone out: no handler can tell it, a cut connection would not."""
    if isinstance(error, EngineError):
        return api_error(error)
    if isinstance(error, ApiError):
        return error
    logger.error("a stream was broken off by a defect", exc_info=error)
    return InternalError("The server made a mistake, and its log has the details.")
