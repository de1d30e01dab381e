"""One checkpoint for all, one running application a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.oracle_text import TextOracle
from tests.serving import Artifacts, Served, build_artifacts, serving


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Artifacts:
    return build_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def oracle(artifacts: Artifacts) -> TextOracle:
    return TextOracle(artifacts)


@pytest_asyncio.fixture
async def served(artifacts: Artifacts) -> AsyncIterator[Served]:
    async with serving(artifacts) as running:
        yield running
