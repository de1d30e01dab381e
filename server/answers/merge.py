"""Several async iterators as one, several coroutines at once; the first failure ends all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


async def merged(iterators: Sequence[AsyncIterator[Item]]) -> AsyncIterator[tuple[int, Item]]:
    """`(which, item)` as items come. The first failure ends it; the tasks that wait on the others are cancelled."""
    if len(iterators) == 1:
        async for item in iterators[0]:
            yield 0, item
        return
    waiting = {asyncio.ensure_future(anext(iterator)): i for i, iterator in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                which = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(iterators[which]))] = which
                yield which, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def together(work: Sequence[Coroutine[Any, Any, Item]]) -> list[Item]:
    """The results in order. On the first failure the others are cancelled, and have ended before it is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
