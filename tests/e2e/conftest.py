"""One server process with two profiles for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import Artifacts, process


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def address(artifacts: Artifacts, log) -> Iterator[str]:
    """A fresh process for each module, so that its metrics are that module's own."""
    options = ("--model", str(artifacts.model), "--num-threads", "1")
    profiles = ("--profile", f"safety={artifacts.safety}", "--profile", f"tone={artifacts.tone}")
    with process(*options, *profiles, log=log) as found:
        yield found
