"""What is tested over vLLM's engine only. Where vLLM is not installed all of it is skipped: `make test-vllm`."""

from __future__ import annotations

import pytest

from tests.running_vllm import INSTALLED, MISSING, prepare

if INSTALLED:
    prepare()


def pytest_runtest_setup() -> None:
    if not INSTALLED:
        pytest.skip(MISSING)
