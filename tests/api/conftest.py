"""A running application, in process, for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.serving import Artifacts, Served, serving


@pytest_asyncio.fixture
async def served(artifacts: Artifacts) -> AsyncIterator[Served]:
    async with serving(artifacts) as running:
        yield running
