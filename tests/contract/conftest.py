"""Each test of the contract once for every kind of engine: `harness` makes them, `engine` is one for whoever wants no more."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.contract.harness import NativeHarness
from tests.contract.vllm_harness import VllmHarness
from tests.running_vllm import INSTALLED, MISSING


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skipped here, not by a mark, all of them are one line of the report."""
    kind = getattr(item, "callspec", None) and item.callspec.params.get("harness")
    if kind is VllmHarness and not INSTALLED:
        pytest.skip(MISSING)


@pytest_asyncio.fixture(
    scope="session", loop_scope="session", params=[NativeHarness, VllmHarness], ids=["native", "vllm"]
)
async def harness(request):
    harness = request.param()
    yield harness
    await harness.close()


@pytest_asyncio.fixture(loop_scope="session")
async def engine(harness):
    async with harness.any_running() as engine:
        yield engine
