"""The tiny checkpoint with its two profiles, and what transformers alone says of it: once for all tests that serve."""

from __future__ import annotations

import logging

import pytest

from tests.oracle_text import TextOracle
from tests.serving import Artifacts, build_artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Artifacts:
    return build_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def oracle(artifacts: Artifacts) -> TextOracle:
    return TextOracle(artifacts)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A command that a test runs in process sends the log to the test's own stderr, which is closed after it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
