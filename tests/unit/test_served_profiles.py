"""Which versions of a profile a request may begin with while profiles come and go."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from server.engine import served_profiles
from server.engine.base import GenerationError
from server.engine.served_profiles import ServedProfiles
from steering.decision import ProfileActivation, SteeringOptions
from tests.tiny import tiny_model, tiny_profile

FIRST = tiny_profile(tiny_model(), name="p").manifest
SECOND = replace(FIRST, strength=99.0)
OTHER = replace(FIRST, name="q")


@pytest.fixture
def retired(monkeypatch):
    monkeypatch.setattr(served_profiles, "RETIRE_AFTER_S", 0.05)
    return []


def served_of(retired, *manifests) -> ServedProfiles:
    return ServedProfiles(manifests, lambda *key: retired.append(key))


def asks(served: ServedProfiles, name: str, version: str = "") -> str:
    """The version that a request gets."""
    [found] = served.pinned(SteeringOptions((ProfileActivation(name, 1.0, version=version),))).activations
    return found.version


async def test_a_request_gets_the_version_that_is_loaded(retired):
    served = served_of(retired, FIRST, OTHER)
    asked = SteeringOptions((ProfileActivation("q", 2.0), ProfileActivation("p", 1.0)), opted_out=False)
    found = served.pinned(asked)
    assert [(a.profile, a.version, a.strength) for a in found.activations] == [
        ("q", OTHER.version, 2.0),
        ("p", FIRST.version, 1.0),
    ]
    assert list(served.manifests) == ["p", "q"]
    assert served.pinned(SteeringOptions(opted_out=True)) == SteeringOptions(opted_out=True)


@pytest.mark.parametrize(("name", "version"), [("r", ""), ("p", "sha256:0"), ("q", FIRST.version)])
async def test_what_is_not_loaded_is_refused(retired, name, version):
    with pytest.raises(GenerationError, match=f"'{name}'") as failure:
        asks(served_of(retired, FIRST), name, version)
    assert failure.value.code == "profile_not_found"


async def test_who_has_a_version_in_hand_may_begin_with_it_for_a_while(retired):
    served = served_of(retired, FIRST)
    before = served.manifests
    served.put("p", SECOND)
    assert asks(served, "p") == SECOND.version and asks(served, "p", FIRST.version) == FIRST.version
    assert before["p"] is FIRST and served.manifests["p"] is SECOND, "a change makes a new mapping"
    await asyncio.sleep(0.1)
    assert retired == [("p", FIRST.version)]
    with pytest.raises(GenerationError):
        asks(served, "p", FIRST.version)
    assert asks(served, "p", SECOND.version) == SECOND.version


async def test_what_is_unloaded_is_found_no_more_by_name(retired):
    served = served_of(retired, FIRST, OTHER)
    served.remove("p")
    with pytest.raises(GenerationError):
        asks(served, "p")
    assert asks(served, "p", FIRST.version) == FIRST.version and not retired
    await asyncio.sleep(0.1)
    assert retired == [("p", FIRST.version)] and list(served.manifests) == ["q"]
    with pytest.raises(KeyError):
        served.remove("p")


async def test_what_is_loaded_again_is_kept(retired):
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    served = served_of(retired, FIRST)
    served.put("p", SECOND)
    assert served.keep("p", FIRST.version) and not served.keep("p", FIRST.version)
    served.put("p", FIRST)
    await asyncio.sleep(0.1)
    assert retired == [("p", SECOND.version)] and asks(served, "p") == FIRST.version
    assert not failures


async def test_the_same_version_once_more_retires_nothing(retired):
    served = served_of(retired, FIRST)
    served.put("p", FIRST)
    await asyncio.sleep(0.1)
    assert not retired and asks(served, "p") == FIRST.version


async def test_what_is_being_proved_is_found_by_its_version_alone(retired):
    served = served_of(retired, FIRST)
    served.allow("p", SECOND.version)
    assert asks(served, "p") == FIRST.version and asks(served, "p", SECOND.version) == SECOND.version
    served.drop("p", SECOND.version)
    assert retired == [("p", SECOND.version)]
    with pytest.raises(GenerationError):
        asks(served, "p", SECOND.version)
