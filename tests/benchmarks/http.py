"""What a request and a streamed token cost the server itself, with no model: `python -m tests.benchmarks.http`.

An engine that has its tokens at hand takes the model's place; all else is real, from the ASGI application inwards: reading and
checking the body, the chat template, the tokenizer, detokenizing, metrics, JSON, events. Processor time of one pinned core,
medians over repeats. uvicorn and the socket are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.app import create_app
from server.config import ServerConfig, demo_folder
from server.conversation import Conversation
from server.engine.base import Engine, EngineInfo, EngineStats, GenerationRequest, TokenEvent, TokenLogprobs
from server.observability.metrics import Metrics
from server.prompting.prompter import load_prompter
from steering.decision import ProfileActivation, SteeringDecision, SteeringOptions, combine, decide_profile
from steering.errors import ProfileError
from steering.manifest import ProfileManifest
from steering.profile import SteeringProfile
from tests.serving import Connection

REQUEST_MS, TOKEN_US = 2.0, 50.0  # what is aimed at
SHORT, LONG = 16, 272
TEXT = "Steam rises from the sea, cools, and falls as rain. "
TURNS = [{"role": role, "content": TEXT * 5} for role in ("user", "assistant", "user", "assistant", "user")]
BODY = {"model": "bench", "messages": [{"role": "system", "content": "Be brief."}, *TURNS], "ignore_eos": True}
LOGPROBS = {"logprobs": True, "top_logprobs": 5}


class Instant(Engine):
    """Says the same text whatever is asked, one token a turn of the event loop."""

    def __init__(self, tokens: tuple[int, ...], vocab_size: int, manifest: ProfileManifest) -> None:
        self.info = EngineInfo("instant", "none", 8192, 64, vocab_size, 1, 1, "none", "none")
        self._tokens, self._manifest = tokens, manifest

    @property
    def profiles(self) -> Mapping[str, ProfileManifest]:
        return {"safety": self._manifest}

    @property
    def failure(self) -> str | None:
        return None

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def load_profile(self, name: str, reference: str, check=lambda _: None) -> ProfileManifest:
        raise ProfileError("this engine's profiles are fixed.")

    async def unload_profile(self, name: str) -> None:
        raise KeyError(name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        top = tuple((token, -1.0) for token in range(request.sampling.logprobs or 0))
        logprobs = None if request.sampling.logprobs is None else TokenLogprobs(-1.0, top)
        decision: SteeringDecision | None = await self.score(request)
        for i in range(request.sampling.max_tokens):
            token = self._tokens[i % len(self._tokens)]
            last = i + 1 == request.sampling.max_tokens
            yield TokenEvent(0, token, "length" if last else None, logprobs, decision)
            decision = None
            await asyncio.sleep(0)

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        made = decide_profile(
            ProfileActivation("safety", 1.0, "profile"),
            version="v",
            method="finesteer",
            layer=1,
            gate=1.0,
            vector_norm=1.0,
            state_norm=1.0,
            energy_ratio=0.5,
            threshold=0.4,
            tail=0.05,
            routing=(0.5, 0.5),
            residual_norm=0.1,
        )
        return combine(SteeringOptions((ProfileActivation("safety", 1.0),)), (made,), compute_ms=0.1)

    def stats(self) -> EngineStats:
        return EngineStats()


async def measure(console: Console, model: str, requests: int, repeats: int) -> bool:
    """Print the table; whether both aims are met."""
    prompter = load_prompter(model)
    prompt = await prompter.chat(Conversation(tuple(BODY["messages"])))
    manifest = SteeringProfile.load(demo_folder() / "profiles" / "safety", "safety").manifest
    tokens = await prompter.text(TEXT)
    engine = Instant(tokens, 1 + max((*tokens, *prompt)), manifest)
    config = ServerConfig(model=model, served_model_name="bench", log_level="warning")
    app = create_app(config, engine, prompter, Metrics("bench"))
    async with app.router.lifespan_context(app):

        async def seconds(path: str = "/v1/chat/completions", **fields: Any) -> float:
            """Processor time of one request."""
            connections = [Connection(app, path, BODY | fields) for _ in range(requests)]
            begun = time.process_time()
            for connection in connections:
                await connection.run()
            spent = time.process_time() - begun
            assert all(connection.status == 200 and connection.ended for connection in connections)
            return spent / requests

        async def median(**fields: Any) -> float:
            return statistics.median([await seconds(**fields) for _ in range(repeats)])

        async def a_token(**fields: Any) -> float:
            """Seconds a token costs once a request runs: what a long answer costs more than a short one."""
            pairs = [
                (await seconds(max_tokens=SHORT, **fields), await seconds(max_tokens=LONG, **fields))
                for _ in range(repeats)
            ]
            return statistics.median([(long - short) / (LONG - SHORT) for short, long in pairs])

        await seconds(max_tokens=SHORT)
        whole = 1e3 * await median(max_tokens=1)
        streamed = 1e6 * await a_token(stream=True)
        rows = [
            ("a request: six messages, one token", f"{whole:.2f} ms", f"{REQUEST_MS:g} ms"),
            ("the same, streamed", f"{1e3 * await median(max_tokens=1, stream=True):.2f} ms", ""),
            ("a streamed token", f"{streamed:.0f} µs", f"{TOKEN_US:g} µs"),
            (
                "a streamed token with five log-probabilities",
                f"{1e6 * await a_token(stream=True, **LOGPROBS):.0f} µs",
                "",
            ),
            (
                "a streamed token with four stop strings",
                f"{1e6 * await a_token(stream=True, stop=['zq', 'qz', 'xq', 'END']):.0f} µs",
                "",
            ),
            ("a token of a whole answer", f"{1e6 * await a_token():.0f} µs", ""),
        ]
    table = Table("", "processor time", "aim", title=f"The server's own work; prompts of {len(prompt)} tokens")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return whole <= REQUEST_MS and streamed <= TOKEN_US


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(Path(demo_folder()) / "demo"), help="a folder or hub id, for its tokenizer"
    )
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    asyncio.run(measure(Console(width=120), options.model, options.requests, options.repeats))


if __name__ == "__main__":
    main()
