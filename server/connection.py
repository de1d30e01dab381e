"""A client's connection, bounded: how large its requests' heads are, how long they take to come, how long its answers lie unread."""

from __future__ import annotations

import asyncio
import logging
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError, InvalidRequestError

MAX_HEAD_BYTES = 64 * 2**10
logger = logging.getLogger("finesteer")


class BoundedConnection(H11Protocol):
    """uvicorn's protocol on h11, with limits that it has not.

    A head that is too large, malformed or late is refused in OpenAI's error shape. A connection that sends nothing is closed.
    Where more is written than the client reads, the rest waits in the transport's buffer and the answer pauses (uvicorn's
    doing); a client that leaves it there is cut off, and whoever writes the answer hears that the client has gone.

    Args:
        read_timeout_s: for a head to come, from the moment that there is nothing else to do on the connection.
        stall_timeout_s: for an answer to be read on.
        options: uvicorn's.
    """

    def __init__(self, *, read_timeout_s: float, stall_timeout_s: float, **options: Any) -> None:
        super().__init__(**options)
        self._read_timeout_s, self._stall_timeout_s = read_timeout_s, stall_timeout_s
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()
        self._leave_in_time()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._leave_in_time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._stall_timeout_s, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _cancelled(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stall = _cancelled(self._head), _cancelled(self._stall)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where h11 cannot read on."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            self._refuse(431, "headers_too_large", f"The request's headers are larger than {MAX_HEAD_BYTES >> 10} KiB.")
        else:
            self._refuse(status, "malformed_http", f"This is not a valid HTTP request ({error}).")

    def _watch_head(self) -> None:
        """Have the clock run while a head, or the rest of a body that nobody wants, is all that there is to wait for."""
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self._read_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head = None
        begun, _ = self.conn.trailing_data
        if begun and self.conn.their_state is h11.IDLE:
            self._refuse(
                408, "upload_timeout", f"The request's headers did not come within {self._read_timeout_s:g} s."
            )
        else:
            self.transport.close()
            self._leave_in_time()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer and close. Where an answer is on its way already, only close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal: ApiError = InvalidRequestError(message, code=code)
            body = refusal.to_json()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
        self._leave_in_time()

    def _leave_in_time(self) -> None:
        """A closed connection still sends what it has; give it a limit, too."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self._stall_timeout_s, self.transport.abort)

    def _cut(self) -> None:
        self._stall = None
        logger.warning("a client left its answer unread for %g s and was cut off", self._stall_timeout_s)
        self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
