"""What the contract's tests need of an engine beside its interface: to have one of a kind, to slow it, hold it, break it."""

from __future__ import annotations

import functools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from transformers import PreTrainedModel

from server.engine.base import Engine, EngineObserver
from server.engine.native.build import EngineOptions
from server.engine.native.core import Results
from server.engine.native.decoder import Decoder
from server.engine.native.engine import NativeEngine
from server.engine.native.load import make_decoder
from steering.profile import SteeringProfile
from tests.contract.asking import until
from tests.engine import block_bytes
from tests.running_vllm import SIZES, vllm_model
from tests.tiny import tiny_model, tiny_profile

BLOCK_SIZE = 32  # tokens of a block of keys and values, in every engine here


def model() -> PreTrainedModel:
    """The model that each engine runs, as transformers runs it."""
    return vllm_model()


@functools.cache
def profile(name: str = "p", layer: int = 1, seed: int = 0) -> SteeringProfile:
    return tiny_profile(model(), layer, name=name, strength=3.0, seed=seed)


class Harness(ABC):
    """Engines of one kind around `model()`, with `profile()` unless told otherwise, for 4 completions of 64 tokens."""

    kind: str

    @abstractmethod
    def running(
        self,
        profiles: Sequence[SteeringProfile] | None = None,
        *,
        observer: EngineObserver | None = None,
        live: bool = False,
        num_blocks: int | None = None,
        **limits: int,
    ) -> AbstractAsyncContextManager[Engine]:
        """An engine of a test's own.

        Args:
            live: profiles may be loaded and unloaded.
            num_blocks: memory for keys and values, in blocks.
            limits: max_num_seqs, max_model_len, max_batched_tokens, max_waiting.
        """

    def any_running(self) -> AbstractAsyncContextManager[Engine]:
        """An idle one with no such wishes. Others may have used it before: its counters and its cache need not be new."""
        return self.running()

    async def close(self) -> None:  # noqa: B027 - nothing to do is right where nothing is kept
        """End what was kept between tests."""

    @abstractmethod
    def slowed(self, engine: Engine) -> AbstractAsyncContextManager[None]:
        """Each step takes some 10 ms more, so that on a busy machine, too, nothing ends before a test has looked at it."""

    @abstractmethod
    def held(self, engine: Engine) -> AbstractAsyncContextManager[None]:
        """No step ends. To be entered when a request is on its way."""

    @abstractmethod
    def break_down(self, engine: Engine) -> str:
        """Have it fail at its next step, or now. Returns what its failure must match."""


class NativeHarness(Harness):
    kind = "native"

    @asynccontextmanager
    async def running(self, profiles=None, *, observer=None, live=False, num_blocks=None, **limits):
        options = {"max_num_seqs": 4, "max_model_len": 64, "live_profiles": live} | limits
        if num_blocks is not None:
            options["kv_cache_bytes"] = num_blocks * block_bytes(decoder(), steered=True)
        profiles = [profile()] if profiles is None else profiles
        engine = NativeEngine(decoder(), model(), profiles, EngineOptions(**options), observer=observer)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    @asynccontextmanager
    async def slowed(self, engine):
        with stepping(engine, lambda step: time.sleep(0.01) or step()):
            yield

    @asynccontextmanager
    async def held(self, engine):
        begun, released = threading.Event(), threading.Event()

        def wait(step):
            begun.set()
            released.wait(60)
            return step()

        with stepping(engine, wait):
            try:
                await until(begun.is_set)
                yield
            finally:
                released.set()

    def break_down(self, engine):
        def fail():
            raise RuntimeError("out of memory")

        engine._core.step = fail
        return "out of memory"


@functools.cache
def decoder() -> Decoder:
    """Of a copy of `model()`: it takes its model over."""
    return make_decoder(tiny_model(**SIZES))


@contextmanager
def stepping(engine: NativeEngine, around: Callable[[Callable[[], Results]], Results]) -> Iterator[None]:
    """Have the native engine call `around(step)` for each step."""
    step = engine._core.step
    engine._core.step = lambda: around(step)
    try:
        yield
    finally:
        engine._core.step = step
