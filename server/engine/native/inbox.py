"""What the engine has made for one request and nobody has taken yet. No torch here."""

from __future__ import annotations

import asyncio

from server.engine.base import GenerationError, TokenEvent
from steering.decision import SteeringDecision

Result = TokenEvent | SteeringDecision | Exception
MAX_UNREAD = 2048  # results; some 5 MB where each has 20 log-probabilities


class Inbox:
    """A queue that does not grow for ever: all calls on the event loop's thread.

    Readers that keep up empty it whenever they run. One that does not is a client that leaves its stream unread.
    """

    def __init__(self) -> None:
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        self._closed = False

    def put(self, result: Result) -> bool:
        """Add a result; False where the reader lags too far behind: it then gets an error in place of all it has not read, and
        nothing more."""
        if self._closed:
            return True
        if self._results.qsize() >= MAX_UNREAD:
            self.fail(
                GenerationError(
                    f"the client left {MAX_UNREAD} tokens of its answer unread, and the answer was broken off; read faster, "
                    "or ask for fewer tokens",
                    "slow_reader",
                )
            )
            return False
        self._results.put_nowait(result)
        return True

    def fail(self, error: Exception) -> None:
        """End it: whatever is unread is dropped, and the reader gets the error."""
        if self._closed:
            return
        self._closed = True
        while not self._results.empty():
            self._results.get_nowait()
        self._results.put_nowait(error)

    async def get(self) -> TokenEvent | SteeringDecision:
        """The next result. Raises where it is an error."""
        result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result
