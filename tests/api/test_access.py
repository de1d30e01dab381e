"""Keys at the door: whose they are, what they may ask, how much, and who administers."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from server.access.keys import Access, ApiKey, digest
from server.config import ConfigError, ServerConfig
from tests.checkpoint import CALM
from tests.serving import Connection, serving

ADMIN = ("/v1/steering/profiles/load", "/v1/steering/profiles/unload")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def limited(**limits):
    return Access((ApiKey("team", digest("k"), **limits), ApiKey("free", digest("other"))))


async def test_each_key_opens_and_is_named_in_the_log(artifacts, caplog):
    caplog.set_level(logging.INFO, "finesteer")
    access = replace(Access.of("one", admin="root"), api_keys=(ApiKey("a", digest("one")), ApiKey("b", digest("two"))))
    async with serving(artifacts, access=access) as served:
        for key in ("one", "two", "root"):
            assert (await served.chat(CALM[0], headers=bearer(key), max_tokens=1)).status_code == 200
        for key in ("", "three", digest("one")):
            response = await served.chat(CALM[0], headers=bearer(key))
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    logged = caplog.text
    assert all(f"key={name}" in logged for name in ("a", "b", "admin"))
    assert "one" not in logged.replace("None", "") and digest("one") not in logged


async def test_too_many_requests(artifacts):
    async with serving(artifacts, access=limited(requests_per_minute=2)) as served:
        first = await served.chat(CALM[0], headers=bearer("k"), max_tokens=1)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert (await served.client.get("/v1/models", headers=bearer("k"))).status_code == 200  # reading is not counted
        assert (await served.chat(CALM[0], headers=bearer("k"), max_tokens=1)).status_code == 200
        third = await served.chat(CALM[0], headers=bearer("k"), max_tokens=1)
        error = third.json()["error"]
        assert (third.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(third.headers["retry-after"]) <= 30
        assert (await served.chat(CALM[0], headers=bearer("other"), max_tokens=1)).status_code == 200


async def test_tokens_are_counted_prompt_and_answer(artifacts):
    async with serving(artifacts, access=limited(tokens_per_minute=30)) as served:
        answer = await served.chat(CALM[0], headers=bearer("k"), max_tokens=12, ignore_eos=True)
        used = answer.json()["usage"]["total_tokens"]
        assert used >= 30
        response = await served.chat(CALM[0], headers=bearer("k"))
        assert response.status_code == 429 and "30 tokens a minute" in response.json()["error"]["message"]
        left = float(response.headers["retry-after"])
        assert (used - 30) * 2 - 2 <= left <= (used - 30) * 2 + 4


async def test_requests_at_once_are_freed_however_they_end(artifacts):
    async with serving(artifacts, access=limited(max_concurrent=1)) as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": CALM[0]}], "stream": True, "ignore_eos": True}
        connection = Connection(served.app, "/v1/chat/completions", body | {"max_tokens": 200}, bearer("k"))
        running = asyncio.create_task(connection.run())
        await connection.first_event.wait()
        refused = await served.chat(CALM[0], headers=bearer("k"))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        connection.cut()
        await running
        for bad in ({"max_tokens": -1}, {"model": "none"}):
            assert (await served.chat(CALM[0], headers=bearer("k"), **bad)).status_code in (400, 404)
        assert (await served.chat(CALM[0], headers=bearer("k"), max_tokens=1)).status_code == 200


async def test_nobody_administers_without_an_admin_key(artifacts):
    async with serving(artifacts, access=Access.of("k")) as served:
        for path in ADMIN:
            response = await served.client.post(path, json={"name": "safety"}, headers=bearer("k"))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "no_admin_key")
    async with serving(artifacts) as served:  # nor where clients need no key
        assert (await served.client.put("/v1/steering/defaults", json={})).status_code == 403


async def test_an_api_key_does_not_administer(artifacts):
    async with serving(artifacts, access=Access.of("k", admin="root")) as served:
        for key, status, code in (("k", 403, "admin_key_required"), ("x", 401, "invalid_api_key")):
            for path in ADMIN:
                response = await served.client.post(path, json={"name": "safety"}, headers=bearer(key))
                assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert (await served.client.get("/v1/steering/defaults", headers=bearer("root"))).status_code == 200


async def test_metrics_are_open_unless_guarded(artifacts):
    async with serving(artifacts, access=Access.of("k")) as served:
        assert (await served.client.get("/metrics")).status_code == 200
    async with serving(artifacts, access=Access.of("k", admin="root", guard_metrics=True)) as served:
        assert (await served.client.get("/metrics")).status_code == 401
        for key in ("k", "root"):
            assert (await served.client.get("/metrics", headers=bearer(key))).status_code == 200
        assert (await served.client.get("/health")).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "server.example"])
def test_no_listening_beyond_this_machine_without_a_key(host):
    with pytest.raises(ConfigError, match=f"--host {host} without an API key"):
        ServerConfig("m", "m", host=host)
    ServerConfig("m", "m", host=host, access=Access.of("k"))
    ServerConfig("m", "m", host=host, allow_no_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    ServerConfig("m", "m", host=host)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_keys": ["a b"]}, "--api-key: must not be empty or hold spaces"),
        ({"api_keys": ["a"], "admin_key": "a"}, "--admin-key: is an API key too"),
        ({"guard_metrics": True}, "--guard-metrics: there is no key"),
        ({"file": {"keys": [{"name": "x"}]}}, "--api-keys-file"),
        (
            {"file": {"keys": [{"name": "x", "sha256": digest("a")}]}, "admin_key": "a"},
            "--admin-key: is an API key too",
        ),
    ],
)
def test_keys_that_make_no_sense_are_said_at_the_start(tmp_path, options, message):
    if file := options.pop("file", None):
        options["api_keys_file"] = tmp_path / "k.json"
        options["api_keys_file"].write_text(json.dumps(file))
    common = {"model": "m", "profiles": (), "served_model_name": None, "profile_policies": (), "profile_modes": ()}
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_options(**common, max_steer_strength=20, steering_metadata="full", environ={}, **options)


TWO = replace(Access.of("one", "two", admin="root"), isolate_keys=True)


async def test_a_response_is_its_keys_own(artifacts):
    async with serving(artifacts, access=TWO) as served:
        body = {"model": "tiny", "input": CALM[0], "max_output_tokens": 16, "temperature": 0}
        made = (await served.client.post("/v1/responses", json=body, headers=bearer("one"))).json()
        path, item = f"/v1/responses/{made['id']}", made["output"][0]["id"]
        for method, where in (("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("POST", "/cancel")):
            response = await served.client.request(method, path + where, headers=bearer("two"))
            assert response.status_code == 404, (method, where)
        for more, status in (
            ({"previous_response_id": made["id"]}, 400),
            ({"input": [{"type": "item_reference", "id": item}, {"role": "user", "content": "and?"}]}, 404),
        ):
            assert (
                await served.client.post("/v1/responses", json=body | more, headers=bearer("two"))
            ).status_code == status
            assert (
                await served.client.post("/v1/responses", json=body | more, headers=bearer("one"))
            ).status_code == 200
        assert (await served.client.get(path, headers=bearer("one"))).json()["id"] == made["id"]


@pytest.mark.parametrize("isolated", [True, False])
async def test_the_prefix_cache_tells_nothing_across_keys_that_are_kept_apart(artifacts, isolated):
    async with serving(artifacts, access=replace(TWO, isolate_keys=isolated)) as served:

        async def cached(key, path="/v1/chat/completions"):
            text = "the same long question, " * 6
            answer = await served.chat(text, headers=bearer(key), max_tokens=1, steer_metadata="full")
            usage, steering = answer.json()["usage"], answer.json()["steering"]
            return usage["prompt_tokens_details"]["cached_tokens"] > 0, steering["compute_ms"] > 0

        assert await cached("one") == (False, True)
        assert await cached("one") == (True, False)  # read from memory: it takes no time
        assert await cached("two") == ((False, True) if isolated else (True, False))
        assert await cached("two") == (True, False)


def test_keeping_one_key_apart_makes_no_sense():
    with pytest.raises(ConfigError, match="no two API keys"):
        ServerConfig("m", "m", access=replace(Access.of("one"), isolate_keys=True))


async def test_everything_but_health_and_pages_wants_a_key(artifacts):
    async with serving(artifacts, access=Access.of("k")) as served:
        for path in ("/tokenize", "/detokenize", "/v1/chat/completions", "/v1/steering/score"):
            assert (await served.client.post(path, json={})).status_code == 401, path
        for path in ("/health", "/ready", "/version", "/openapi.json", "/docs"):
            assert (await served.client.get(path)).status_code == 200, path
