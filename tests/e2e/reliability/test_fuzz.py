"""The fuzzers' short form."""

from __future__ import annotations

import pytest

from tests.e2e.reliability.fuzz import run, table


@pytest.mark.slow
def test_nothing_breaks_that_is_bent():
    found = run(requests=600, profiles=180, seed=1)
    assert not found.problems, "\n".join(found.problems)
    assert sum(found.requests.values()) == 600 and {200, 400} <= set(found.requests), table(found, "")
    assert found.profiles["refused"] > 100 and found.hostile > 30
