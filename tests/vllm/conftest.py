"""What is tested over vLLM's engine only. Where vLLM is not installed all of it is skipped: `make test-vllm`."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.running_vllm import INSTALLED, MISSING, prepare
from tests.vllm.exact import CONFIGURATIONS, NAMES, Prompts, running

if INSTALLED:
    prepare()


def pytest_runtest_setup() -> None:
    if not INSTALLED:
        pytest.skip(MISSING)


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=CONFIGURATIONS)
async def engine(request):
    """One for each configuration, for all tests that ask for no other: their prompts keep them apart (`prompts`)."""
    async with running(*NAMES, **CONFIGURATIONS[request.param]) as engine:
        yield engine


@pytest.fixture
def prompts(request) -> Prompts:
    """This test's prompts, the same with every engine."""
    params = getattr(request.node, "callspec", None) and request.node.callspec.params
    others = {name: value for name, value in (params or {}).items() if name != "engine"}
    return Prompts(f"{request.node.originalname} {others}")
