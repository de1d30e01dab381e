"""What every engine promises of profiles that come, are replaced and go while it runs."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.base import GenerationError
from steering.decision import SteeringOptions
from steering.errors import ProfileError
from tests.contract.asking import STEERED, Observer, activation, answer, collect, request, tokens, until
from tests.contract.harness import model, profile
from tests.tiny import tiny_model, tiny_profile

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def saved(tmp_path):
    """Another profile at the same layer, and the folder it is loaded from."""
    folder = tmp_path / "other"
    return tiny_profile(model(), 1, name="p", strength=3.0, seed=5).save(folder), str(folder)


async def test_a_profile_is_loaded_under_a_name(harness, saved):
    other, folder = saved
    observer = Observer()
    async with harness.running(live=True, observer=observer) as engine:
        before = engine.profiles
        plain = await answer(engine, request("p", max_tokens=20))
        manifest = await engine.load_profile("q", folder)
        assert len(observer.decisions) == 1, "what an engine asks itself is no traffic"
        assert manifest.name == "q" and manifest.tensors_sha256 == other.manifest.tensors_sha256
        assert list(engine.profiles) == ["p", "q"] and engine.profiles["q"] == manifest
        assert list(before) == ["p"], "a change makes a new mapping"
        events = await collect(engine, request("q", steering=SteeringOptions((activation("q"),)), max_tokens=20))
        [told] = events[0].decision.profiles
        assert (told.name, told.version, told.applied) == ("q", manifest.version, True)
        assert tokens(events) != plain == await answer(engine, request("p", max_tokens=20))
    async with harness.running([tiny_profile(model(), 1, name="q", strength=3.0, seed=5)]) as engine:
        wanted = await answer(engine, request("q", steering=SteeringOptions((activation("q"),)), max_tokens=20))
        assert tokens(events) == wanted, "as one that was there from the start"


async def test_requests_under_way_keep_the_version_they_began_with(harness, saved):
    """One that runs, one that waits for a row, one that names its version."""
    _, folder = saved
    old = profile().version
    pinned = SteeringOptions((activation(version=old),))
    async with harness.running(live=True, max_num_seqs=1) as engine:
        wanted = await answer(engine, request("w", max_tokens=40))
        async with harness.slowed(engine):
            runs = asyncio.create_task(collect(engine, request("runs", max_tokens=40)))
            await until(lambda: engine.stats().num_running == 1)
            waits = asyncio.create_task(collect(engine, request("waits", max_tokens=40)))
            await until(lambda: engine.stats().num_waiting == 1)
            manifest = await engine.load_profile("p", folder)
            new = asyncio.create_task(collect(engine, request("new", max_tokens=40)))
            named = asyncio.create_task(collect(engine, request("named", max_tokens=40, steering=pinned)))
        for task in (runs, waits, named):
            events = await task
            assert events[0].decision.profiles[0].version == old and tokens(events) == wanted
        events = await new
        assert events[0].decision.profiles[0].version == manifest.version != old and tokens(events) != wanted


async def test_an_unloaded_profile_is_refused_to_those_that_come(harness):
    async with harness.running(live=True, max_num_seqs=1) as engine:
        wanted = await answer(engine, request("w", max_tokens=40))
        async with harness.slowed(engine):
            runs = asyncio.create_task(answer(engine, request("runs", max_tokens=40)))
            await until(lambda: engine.stats().num_running == 1)
            waits = asyncio.create_task(answer(engine, request("waits", max_tokens=40)))
            await until(lambda: engine.stats().num_waiting == 1)
            await engine.unload_profile("p")
            assert dict(engine.profiles) == {}
            for refused in (collect(engine, request("late")), engine.score(request("late"))):
                with pytest.raises(GenerationError, match="'p'") as refusal:
                    await refused
                assert refusal.value.code == "profile_not_found"
        assert await runs == await waits == wanted
        with pytest.raises(KeyError):
            await engine.unload_profile("p")


async def test_a_profile_that_was_unloaded_comes_again(harness, tmp_path):
    original = profile().save(tmp_path / "p")
    async with harness.running([original], live=True) as engine:
        wanted = await answer(engine, request("w", max_tokens=20))
        await engine.unload_profile("p")
        manifest = await engine.load_profile("p", str(tmp_path / "p"))
        assert manifest.version == original.version
        assert await answer(engine, request("again", max_tokens=20)) == wanted


async def test_a_profile_that_cannot_be_used_changes_nothing(harness, saved, tmp_path):
    _, folder = saved
    tiny_profile(tiny_model(), 1, name="p").save(tmp_path / "narrow")

    def check(manifest):
        assert manifest.name == "p"
        raise PermissionError("this one is locked")

    async with harness.running(live=True) as engine:
        before, wanted = engine.profiles, await answer(engine, request("w", max_tokens=20))
        with pytest.raises(ProfileError, match="no such profile folder"):
            await engine.load_profile("p", str(tmp_path / "nowhere"))
        with pytest.raises(ProfileError, match="hidden size 64"):
            await engine.load_profile("p", str(tmp_path / "narrow"))
        with pytest.raises(PermissionError, match="locked"):
            await engine.load_profile("p", folder, check)
        with pytest.raises(KeyError):
            await engine.unload_profile("nobody")
        assert engine.profiles == before
        events = await collect(engine, request("w", max_tokens=20, steering=STEERED))
        assert tokens(events) == wanted and events[0].decision.profiles[0].version == profile().version
