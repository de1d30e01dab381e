"""Profiles loaded, replaced and unloaded through the API while requests run; defaults changed."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter

import pytest

from server.access.keys import Access
from server.engine import served_profiles
from server.engine.base import GenerationError, GenerationRequest, SamplingOptions
from server.steering_options import SteeringPolicy
from steering.decision import ProfileActivation, SteeringOptions
from steering.profile import SteeringProfile
from tests.checkpoint import CALM, FIRING, build_profile
from tests.serving import chunks, sample, samples, serving

KEYS = Access.of("k", admin="root")
USER, ROOT = {"Authorization": "Bearer k"}, {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def other(artifacts, tmp_path_factory):
    """Another `safety`: other vectors, at another layer."""
    return build_profile(artifacts.model, tmp_path_factory.mktemp("other") / "safety", strength=4.0, seed=7)


async def post(served, action, **body):
    return await served.client.post(f"/v1/steering/profiles/{action}", json=body, headers=ROOT)


async def acted(served, text=FIRING[0], **fields):
    """The profiles that acted, and their versions."""
    answer = await served.chat(text, headers=USER, **fields)
    assert answer.status_code == 200, answer.text
    return {p["name"]: p["version"] for p in answer.json()["steering"]["profiles"]}


def version_of(folder):
    return SteeringProfile.load(folder).version


async def test_load_replace_unload(artifacts, other, oracle):
    async with serving(artifacts, access=KEYS) as served:
        before = await acted(served)
        fingerprint = (await served.client.get("/version")).json()["system_fingerprint"]
        loaded = await post(served, "load", name="tone", source=str(artifacts.tone))
        assert loaded.status_code == 200 and loaded.json()["id"] == "tone", loaded.text
        assert set(await acted(served)) == {"safety", "tone"}
        assert (await served.client.get("/v1/models/tiny:tone", headers=USER)).status_code == 200
        one = await served.chat(FIRING[0], headers=USER, model="tiny:tone")
        assert one.json()["choices"][0]["message"]["content"] == oracle.steered(FIRING[0], name="tone")

        replaced = (await post(served, "load", name="safety", source=str(other))).json()
        now = await acted(served)
        assert now["safety"] == replaced["version"] == version_of(other) != before["safety"]
        assert (await served.client.get("/version")).json()["system_fingerprint"] != fingerprint
        metrics = (await served.client.get("/metrics")).text
        shown = {
            dict(labels)["profile"]: dict(labels)["version"] for (n, labels) in samples(metrics) if n == "profile_info"
        }
        assert shown == now
        assert sample(metrics, "gate_evaluations_total", profile="safety") == 3, "its counts go on"

        gone = await post(served, "unload", name="tone")
        assert gone.json() == {"object": "steering.profile.unloaded", "id": "tone", "version": now["tone"]}
        assert set(await acted(served)) == {"safety"}
        assert (await served.chat(FIRING[0], headers=USER, steer_profiles=["tone"])).status_code == 400
        assert (await post(served, "unload", name="tone")).status_code == 404
        await post(served, "unload", name="safety")
        assert await acted(served) == {}
        assert (await served.chat(FIRING[0], headers=USER)).json()["steering"]["reason"] == "no_profile"


async def test_streams_under_way_keep_their_version(artifacts, other, oracle):
    """Many long streams, replaced again and again in the middle: each is the answer of the version that it says."""
    plain = {}
    for source in (artifacts.safety, other):
        async with serving(artifacts, (), access=KEYS) as served:  # a server that knows this version alone
            await post(served, "load", name="safety", source=str(source))
            for text in FIRING[:3]:
                answer = (await served.chat(text, headers=USER, max_tokens=40, ignore_eos=True)).json()
                version = answer["steering"]["profiles"][0]["version"]
                plain[text, version] = answer["choices"][0]["message"]["content"]
    assert len(set(plain.values())) == 6, "the versions answer differently"
    async with serving(artifacts, access=KEYS) as served:

        async def stream(text):
            answer = await served.chat(text, headers=USER, max_tokens=40, ignore_eos=True, stream=True)
            parts = chunks(answer.text)
            first, last = parts[0]["steering"]["profiles"][0], parts[-1]["steering"]["profiles"][0]
            assert first["version"] == last["version"]
            return (
                text,
                first["version"],
                "".join(c["choices"][0]["delta"].get("content") or "" for c in parts if c["choices"]),
            )

        async def swap():
            for source in itertools.cycle((artifacts.safety, other)):
                assert (await post(served, "load", name="safety", source=str(source))).status_code == 200
                await asyncio.sleep(0.03)

        swapping, found = asyncio.create_task(swap()), []
        async with asyncio.timeout(120):
            while min(Counter(version for _, version, _ in found).get(v, 0) for _, v in plain) < 6:
                found += await asyncio.gather(*(stream(text) for text in FIRING[:3]))
                assert not swapping.done(), swapping.result()
        swapping.cancel()
        assert [text for text, version, said in found if plain[text, version] != said] == []


async def test_what_was_replaced_is_dropped_from_memory(artifacts, other, monkeypatch):
    monkeypatch.setattr(served_profiles, "RETIRE_AFTER_S", 0.05)
    async with serving(artifacts, access=KEYS) as served:
        await post(served, "load", name="safety", source=str(other))
        async with asyncio.timeout(10):
            while len(served.engine._live._profiles) > 1:
                await asyncio.sleep(0.02)
        assert [version for _, version in served.engine._live._profiles] == [version_of(other)]
        assert await acted(served) == {"safety": version_of(other)}
        await post(served, "load", name="safety", source=str(artifacts.safety))  # and back, before it is dropped
        await post(served, "load", name="safety", source=str(other))
        await asyncio.sleep(0.2)
        assert await acted(served) == {"safety": version_of(other)}


async def test_a_request_that_was_being_read_meanwhile_gets_the_version_it_was_settled_with(artifacts, other):
    old, new = version_of(artifacts.safety), version_of(other)
    async with serving(artifacts, access=KEYS) as served:
        await post(served, "load", name="safety", source=str(other))
        prompt = await served.prompter.text(FIRING[0])

        async def versions(version):
            activation = ProfileActivation("safety", 2.0, gate="open", version=version)
            asked = GenerationRequest("r", prompt, SamplingOptions(2), SteeringOptions((activation,)))
            return [
                event.decision.profiles[0].version async for event in served.engine.generate(asked) if event.decision
            ]

        assert [await versions(v) for v in (old, new, "")] == [[old], [new], [new]]
        with pytest.raises(GenerationError, match="no steering profile 'safety'"):
            await versions("sha256:never")


def damaged(other, folder, **changes):
    folder.mkdir()
    manifest = json.loads((other / "profile.json").read_text()) | changes
    (folder / "profile.json").write_text(json.dumps(manifest))
    (folder / "profile.safetensors").write_bytes((other / "profile.safetensors").read_bytes())
    return folder


async def test_a_bad_profile_changes_nothing(artifacts, other, tmp_path):
    strong = damaged(other, tmp_path / "strong", strength=50.0)
    bent = damaged(other, tmp_path / "bent")
    (bent / "profile.safetensors").write_bytes(b"bent")
    elsewhere = json.loads((other / "profile.json").read_text())["model"] | {"hidden_size": 32}
    cases = [
        ({"source": str(tmp_path / "none")}, "no such profile folder"),
        ({"source": str(bent)}, "sha256 differs"),
        ({"source": str(strong)}, "over this server's limit"),
        ({"source": str(damaged(other, tmp_path / "wide", model=elsewhere))}, "must be float32"),
        ({"source": str(other), "name": "a b"}, "a profile's name is"),
        ({"source": str(other), "name": "unsteered"}, "a profile's name is"),
        ({"source": str(other), "mode": "off"}, "mode"),
        ({}, "source"),
    ]
    async with serving(artifacts, access=KEYS) as served:
        before = await acted(served), (await served.client.get("/v1/steering/profiles", headers=USER)).json()
        for body, message in cases:
            response = await post(served, "load", **({"name": "safety", "default": False} | body))
            assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
            now = await acted(served), (await served.client.get("/v1/steering/profiles", headers=USER)).json()
            assert now == before
        assert served.engine.failure is None


async def test_a_server_without_profiles_takes_one(artifacts, oracle):
    async with serving(artifacts, (), access=KEYS) as served:
        assert (await post(served, "load", name="safety", source=str(artifacts.safety))).status_code == 200
        answer = await served.chat(FIRING[0], headers=USER)
        assert answer.json()["choices"][0]["message"]["content"] == oracle.steered(FIRING[0])


async def test_shadow_first_then_enforced(artifacts, oracle):
    """A safe roll-out: it decides and reports, changes nothing, and is switched on without a reload."""
    async with serving(artifacts, (), access=KEYS) as served:
        card = (await post(served, "load", name="safety", source=str(artifacts.safety), mode="shadow")).json()
        assert card["mode"] == "shadow"
        answer = (await served.chat(FIRING[0], headers=USER)).json()
        assert answer["steering"]["reason"] == "shadow" and answer["steering"]["profiles"][0]["fired"]
        assert answer["choices"][0]["message"]["content"] == oracle.plain(FIRING[0])
        put = await served.client.put("/v1/steering/defaults", json={"modes": {"safety": "enforce"}}, headers=ROOT)
        assert put.json()["modes"] == {"safety": "enforce"}
        answer = (await served.chat(FIRING[0], headers=USER)).json()
        assert answer["choices"][0]["message"]["content"] == oracle.steered(FIRING[0])


async def test_not_by_default(artifacts):
    async with serving(artifacts, access=KEYS) as served:
        await post(served, "load", name="tone", source=str(artifacts.tone), default=False)
        assert set(await acted(served)) == {"safety"}
        assert set(await acted(served, steer_profiles=["tone"])) == {"tone"}
        assert set(await acted(served, model="tiny:tone")) == {"tone"}


async def test_defaults(artifacts):
    async with serving(artifacts, ("safety", "tone"), access=KEYS) as served:
        get = served.client.get
        start = (await get("/v1/steering/defaults", headers=ROOT)).json()
        assert start["profiles"] == ["safety", "tone"] and start["modes"] == {"safety": "enforce", "tone": "enforce"}
        body = {"profiles": ["tone"], "strengths": {"tone": 1.25}}
        put = await served.client.put("/v1/steering/defaults", json=body, headers=ROOT)
        assert put.json()["strengths"]["tone"] == 1.25 and put.json()["profiles"] == ["tone"]
        [report] = (await served.chat(FIRING[0], headers=USER)).json()["steering"]["profiles"]
        assert (report["name"], report["strength"], report["strength_source"]) == ("tone", 1.25, "profile")
        models = (await get("/v1/models/tiny", headers=USER)).json()
        assert models["steer_profiles"] == ["tone"]
        assert (await served.client.put("/v1/steering/defaults", json={}, headers=ROOT)).json() == start


async def test_defaults_that_make_no_sense(artifacts):
    policy = SteeringPolicy(overrides={"safety": "none"})
    async with serving(artifacts, ("safety", "tone"), access=KEYS, policy=policy) as served:
        for body, message in (
            ({"profiles": ["x"]}, "no profile 'x'"),
            ({"strengths": {"tone": 99}}, "over this server's limit"),
            ({"modes": {"x": "shadow"}}, "no profile 'x'"),
            ({"profiles": ["tone"]}, "'safety' is locked (none)"),
            ({"steer_profiles": ["tone"]}, "unknown field"),
        ):
            response = await served.client.put("/v1/steering/defaults", json=body, headers=ROOT)
            assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
        assert set(await acted(served, CALM[0])) == {"safety", "tone"}
