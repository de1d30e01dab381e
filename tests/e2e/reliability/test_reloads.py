"""Versions of a profile that come, go, and come again before they are gone."""

from __future__ import annotations

import asyncio

from server.access.keys import Access
from server.engine import served_profiles
from tests.checkpoint import FIRING
from tests.serving import serving

ADMIN = {"Authorization": "Bearer admin"}
GRACE_S = 2.0  # four loads take less


async def test_a_version_may_come_back_while_it_is_being_retired(artifacts, oracle, monkeypatch):
    """Every version is retired once for each time that it was replaced, and never while it is the one that is loaded."""
    monkeypatch.setattr(served_profiles, "RETIRE_AFTER_S", GRACE_S)
    async with serving(artifacts, access=Access.of(admin="admin")) as served:

        async def load(which: str) -> str:
            body = {"name": "live", "source": str(getattr(artifacts, which)), "default": False}
            response = await served.client.post("/v1/steering/profiles/load", json=body, headers=ADMIN)
            assert response.status_code == 200, response.text
            return response.json()["version"]

        for number in range(4):
            which = ("safety", "tone")[number % 2]
            version = await load(which)
            answer = (await served.chat(FIRING[0], steer_profiles=["live"])).json()
            assert answer["steering"]["profiles"][0]["version"] == version
            assert answer["choices"][0]["message"]["content"] == oracle.steered(FIRING[0], name=which)
        await asyncio.sleep(1.5 * GRACE_S)
        assert served.engine.failure is None
        assert {name for name, _ in served.engine._live._profiles} == {"safety", "live"}
        assert len(served.engine._live._profiles) == 2, "what was replaced is gone"
