"""vLLM's engine for the contract's tests. What happens inside is in other processes, so these are what is slowed and broken."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager

from server.engine.base import Engine
from tests.contract.asking import until_idle
from tests.contract.harness import Harness, model, profile
from tests.running_vllm import running_vllm

BLOCK_BYTES = 32 * 2 * 4  # tokens, keys and values, bytes of a number


class VllmHarness(Harness):
    """One engine is kept for all tests that are content with any: it takes seconds to start."""

    kind = "vllm"

    def __init__(self) -> None:
        self._kept = AsyncExitStack()
        self._any: Engine | None = None
        self._cores: dict[int, int] = {}  # process ids, by the engine's id

    @asynccontextmanager
    async def running(self, profiles=None, *, observer=None, live=False, num_blocks=None, **limits):
        options = dict(limits)
        if num_blocks is not None:
            config = model().config
            width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            options["kv_cache_bytes"] = num_blocks * BLOCK_BYTES * width
        before = set(multiprocessing.active_children())
        profiles = [profile()] if profiles is None else profiles
        async with running_vllm(profiles, observer=observer, **options) as engine:
            [core] = set(multiprocessing.active_children()) - before
            self._cores[id(engine)] = core.pid
            yield engine

    @asynccontextmanager
    async def any_running(self):
        if self._any is None:
            self._any = await self._kept.enter_async_context(self.running())
        yield self._any
        await until_idle(self._any)

    async def close(self) -> None:
        await self._kept.aclose()

    @asynccontextmanager
    async def slowed(self, engine):
        """The core runs for a tenth of the time."""
        core = self._cores[id(engine)]

        async def slow_down() -> None:
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.kill(core, signal.SIGSTOP)
                    await asyncio.sleep(0.009)
                    os.kill(core, signal.SIGCONT)
                    await asyncio.sleep(0.001)

        task = asyncio.create_task(slow_down())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.kill(core, signal.SIGCONT)

    @asynccontextmanager
    async def held(self, engine):
        os.kill(self._cores[id(engine)], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._cores[id(engine)], signal.SIGCONT)

    def break_down(self, engine):
        os.kill(self._cores[id(engine)], signal.SIGKILL)
        return "failed"
