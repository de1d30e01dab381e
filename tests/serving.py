"""The real application around the real engine, in process or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.app import create_app
from server.config import ServerConfig
from server.engine.base import Engine
from server.engine.native.load import load_engine
from server.observability.metrics import Metrics
from server.prompting.prompter import Prompter, load_prompter
from tests.checkpoint import build_checkpoint, build_profile
from tests.openai_schema import CheckedTransport


@dataclass(frozen=True)
class Artifacts:
    """Folders of the tiny checkpoint and of two profiles for it."""

    model: Path
    safety: Path
    tone: Path


def build_artifacts(folder: Path) -> Artifacts:
    model = build_checkpoint(folder / "tiny")
    return Artifacts(
        model,
        build_profile(model, folder / "safety"),
        build_profile(model, folder / "tone", "tone", strength=2.0, seed=9),
    )


@dataclass(frozen=True)
class Served:
    """A running application: `client` talks to it, the rest looks inside."""

    client: httpx.AsyncClient
    app: Any
    engine: Engine
    prompter: Prompter

    async def chat(self, text: str, **fields: Any) -> httpx.Response:
        """One user turn, greedy and short unless `fields` say otherwise."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        headers = fields.pop("headers", None)
        return await self.client.post("/v1/chat/completions", json=body | fields, headers=headers)


@contextlib.asynccontextmanager
async def serving(artifacts: Artifacts, names: tuple[str, ...] = ("safety",), **options: Any) -> AsyncIterator[Served]:
    """Serve the checkpoint as `tiny` with the named profiles; `options` go to `ServerConfig`, but for `audit` and `tracer`."""
    sinks = {name: options.pop(name, None) for name in ("audit", "tracer")}
    profiles = {name: str(getattr(artifacts, name)) for name in names}
    config = ServerConfig(
        **(
            {"model": str(artifacts.model), "served_model_name": "tiny", "profiles": profiles}
            | {"max_model_len": 256}
            | options
        )
    )
    metrics = Metrics("tiny")
    engine = load_engine(
        config.model,
        config.profiles,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_batched_tokens=config.max_batched_tokens,
        max_waiting=config.max_waiting,
        kv_cache_bytes=config.kv_cache_memory,
        prefix_cache_bytes=config.prefix_cache_memory,
        num_threads=1,
        live_profiles=config.access.admin_sha256 is not None,
        observer=metrics,
    )
    prompter = load_prompter(config.model, config.chat_template, config.tool_format)
    app = create_app(config, engine, prompter, metrics, **sinks)
    transport = CheckedTransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield Served(client, app, engine, prompter)


class Connection:
    """One raw ASGI exchange that can be cut. `sent`: each body message as it went out."""

    def __init__(self, app: Any, path: str, body: dict, headers: dict[str, str] | None = None) -> None:
        self._app, self._path, self._body = app, path, json.dumps(body).encode()
        self._request_headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._gone = asyncio.Event()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.sent: list[bytes] = []
        self.ended = False
        self.first_event = asyncio.Event()

    @property
    def received(self) -> bytes:
        """All of the body so far."""
        return b"".join(self.sent)

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": self._request_headers,
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await self._app(scope, self._receive, self._send)

    def cut(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.sent.append(message.get("body", b""))
            self.ended = not message.get("more_body", False)
            self.first_event.set()


def chunks(text: str) -> list[dict]:
    """The JSON of a stream's events; the stream must end with [DONE]."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def samples(metrics_text: str) -> dict[tuple[str, frozenset], float]:
    """`/metrics` as `(name without prefix, labels but model and engine) → value`."""
    found = {}
    for name, labels, value in re.findall(r"^finesteer:(\w+)(?:\{(.*?)\})? (\S+)$", metrics_text, re.M):
        pairs = frozenset(p for p in re.findall(r'(\w+)="(.*?)"', labels) if p[0] not in ("model_name", "engine"))
        found[name, pairs] = float(value)
    return found


def sample(metrics_text: str, name: str, **labels: str) -> float:
    """One sample; a KeyError where there is no such series."""
    return samples(metrics_text)[name, frozenset(labels.items())]


@contextlib.contextmanager
def process(*arguments: str, log: Path, patience_s: float = 120, **environment: str) -> Iterator[str]:
    """`finesteer serve` with these arguments on a free port; yields its address, and ends it by SIGTERM."""
    with launched(*arguments, log=log, patience_s=patience_s, **environment) as (server, address):
        try:
            yield address
        finally:
            server.terminate()
            code = server.wait(timeout=30)
    assert code in (0, -15), f"exit code {code}:\n{log.read_text()}"


@contextlib.contextmanager
def launched(
    *arguments: str, log: Path, port: int = 0, patience_s: float = 120, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The same, for whoever ends it in another way: the process, and its address. Killed at the end, if it is still there."""
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *arguments]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
        )
        try:
            yield server, address_once_up(server, log, patience_s)
        finally:
            server.kill()
            server.wait()


def address_once_up(server: subprocess.Popen, log: Path, patience_s: float = 120) -> str:
    """Where a server that was just launched listens, as its log says, once it is ready. AssertionError where that does not come."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text())
        if found:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(found[1] + "/ready", timeout=5):
                return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")
