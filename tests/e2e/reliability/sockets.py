"""The real application behind real sockets, in this process, so that a test sees its tasks; and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from server.listen import listen
from server.serve import DrainingServer, make_server
from tests.serving import Artifacts, Served, serving

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Listening:
    """`served` behind `port`; `num_tasks` were alive before the first client."""

    served: Served
    server: DrainingServer
    port: int
    num_tasks: int

    async def connect(self, *, buffer_bytes: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection; with `buffer_bytes` one whose kernel takes no more than about so much unread."""
        sock = socket.socket()
        sock.setblocking(False)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=sock, limit=buffer_bytes or 2**16)

    async def all_quiet(self) -> None:
        """No row, no block, no connection, no task is left of what clients did."""
        service = self.served.app.state.service
        async with asyncio.timeout(20):
            while True:
                stats = self.served.engine.stats()
                held = stats.num_running, stats.num_waiting, stats.kv_cache_usage, service.draining.num_active
                left = len(self.server.server_state.connections), len(self.served.engine._open)
                if not any(held) and not any(left) and len(asyncio.all_tasks()) <= self.num_tasks:
                    return
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def listening(
    artifacts: Artifacts, *, send_buffer_bytes: int | None = None, **options: Any
) -> AsyncIterator[Listening]:
    """Serve as `finesteer serve` does; `send_buffer_bytes`: what the kernel takes of an answer that nobody reads."""
    listener = listen("127.0.0.1", 0)
    if send_buffer_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    async with serving(artifacts, **options) as served:
        up = asyncio.Event()
        server = make_server(served.app, up.set, lifespan="off")
        serve = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await asyncio.wait_for(up.wait(), 10)
            await served.chat("warm up", stream=True, max_tokens=1)  # the event-stream library keeps one task for all
            await asyncio.sleep(0)
            yield Listening(served, server, listener.getsockname()[1], len(asyncio.all_tasks()))
        finally:
            server.should_exit = True
            await serve


def head(body: bytes, path: str = PATH, *headers: str) -> bytes:
    """A POST's head."""
    lines = (f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, *headers, "", "")).encode()


def question(text: str, **fields: Any) -> bytes:
    """A body: one user turn, greedy."""
    message = {"role": "user", "content": text}
    return json.dumps({"model": "tiny", "messages": [message], "temperature": 0, "max_tokens": 12} | fields).encode()


async def response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON of a whole answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))
