"""What the contract's tests ask of an engine, and how they wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from server.engine.base import Engine, EngineStats, GenerationRequest, SamplingOptions, TokenEvent
from steering.decision import GateMode, ProfileActivation, SteeringDecision, SteeringOptions

PATIENCE_S = 60  # a defect must fail, not hang


def activation(name: str = "p", strength: float = 3.0, *, gate: GateMode = "open", **options) -> ProfileActivation:
    return ProfileActivation(name, strength, gate=gate, **options)


STEERED = SteeringOptions((activation(),))
PLAIN = SteeringOptions()


class Observer:
    """Keeps what the engine tells."""

    def __init__(self) -> None:
        self.decisions: list[SteeringDecision] = []

    def decided(self, decision: SteeringDecision) -> None:
        self.decisions.append(decision)


def request(
    name: str,
    prompt: Iterable[int] = (5, 6, 7),
    *,
    steering: SteeringOptions = STEERED,
    n: int = 1,
    priority: int = 0,
    owner: str = "",
    **sampling,
) -> GenerationRequest:
    """A greedy request for six tokens, unless `sampling` says otherwise."""
    options = SamplingOptions(**{"max_tokens": 6, "temperature": 0.0} | sampling)
    return GenerationRequest(name, tuple(prompt), options, steering, n, priority, owner)


async def collect(engine: Engine, asked: GenerationRequest) -> list[TokenEvent]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in engine.generate(asked)]


def tokens(events: Iterable[TokenEvent], index: int = 0) -> list[int]:
    return [event.token_id for event in events if event.index == index]


async def answer(engine: Engine, asked: GenerationRequest) -> list[int]:
    """The tokens of a request's first completion."""
    return tokens(await collect(engine, asked))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def until_idle(engine: Engine) -> EngineStats:
    await until(lambda: not (engine.stats().num_running or engine.stats().num_waiting))
    return engine.stats()
