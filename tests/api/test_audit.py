"""The audit log through the application: a line for each decision of an answer, and nothing answered unaudited where it must be."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import struct

import pytest

from server.access.keys import Access
from server.observability import audit as audit_module
from server.observability.audit import AuditLog
from server.steering_options import SteeringPolicy
from tests.checkpoint import CALM, FIRING
from tests.serving import Connection, sample, serving

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer k"}


def opened(path, **options) -> AuditLog:
    return AuditLog(path, **{"max_bytes": 2**20, "keep": 2} | options)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def hashed(served, **body) -> str:
    """A prompt's hash, from what `/tokenize` says of it."""
    tokens = (await served.client.post("/tokenize", json=body)).json()["tokens"]
    return hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens)).hexdigest()


def acted(report: dict, reason: str) -> dict:
    """A profile's entry, by what the response said of it."""
    return {
        "name": report["name"],
        "version": report["version"],
        "fired": report["fired"],
        "gate": pytest.approx(report["gate"], rel=1e-5),
        "strength": report["strength"],
        "source": report["strength_source"],
        "applied": reason in ("gate_open", "forced_open"),
        "reason": reason,
    }


async def test_each_decision_has_its_line(artifacts, tmp_path):
    path, policy = tmp_path / "audit", SteeringPolicy(modes={"tone": "shadow"})
    audit = opened(path)
    async with serving(artifacts, ("safety", "tone"), audit=audit, access=Access.of("k"), policy=policy) as served:
        served.client.headers.update(KEY)
        answers = []
        for text, fields in (
            (FIRING[0], {"n": 2, "headers": {"X-Request-Id": "one"}}),
            (CALM[0], {"stream": False}),
            (FIRING[1], {"headers": {"X-FineSteer-Strength": "safety=0"}}),
            (FIRING[2], {"model": "tiny:unsteered"}),
        ):
            response = await served.chat(text, **fields)
            assert response.status_code == 200
            answers.append((text, response.headers["x-request-id"], response.json()))
        await until(lambda: audit.num_records == 4)
        found = lines(path)
        reasons = [
            ("gate_open", ["gate_open", "shadow"]),
            ("gate_closed", ["gate_closed"] * 2),
            ("shadow", ["strength_zero", "shadow"]),
            ("opted_out", []),
        ]
        for line, (text, request_id, answer), (reason, own) in zip(found, answers, reasons, strict=True):
            assert (line["request"], line["id"], line["key"], line["path"]) == (request_id, answer["id"], "key-1", CHAT)
            assert (line["status"], line["reason"], line["applied"]) == (200, reason, reason == "gate_open")
            assert line["profiles"] == [acted(*pair) for pair in zip(answer["steering"]["profiles"], own, strict=True)]
            assert line["prompt_sha256"] == await hashed(served, messages=[{"role": "user", "content": text}])
            assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
            assert line["completion_tokens"] == answer["usage"]["completion_tokens"]
            assert line["finish"] == [choice["finish_reason"] for choice in answer["choices"]]
            assert line["time"].endswith("Z")
            assert set(line) == set(found[0]) and "house" not in json.dumps(line)
        assert found[0]["request"] == "one" and found[3]["model"] == "tiny:unsteered"
        metrics = (await served.client.get("/metrics")).text
        assert sample(metrics, "audit_log_records_total") == 4
        assert sample(metrics, "audit_log_errors_total", kind="write") == 0


async def test_several_prompts_streams_and_what_has_no_line(artifacts, tmp_path):
    path = tmp_path / "audit"
    async with serving(artifacts, audit=opened(path)) as served:
        body = {"model": "tiny", "prompt": ["abc", "defg"], "max_tokens": 3, "stream": True}
        answer = await served.client.post("/v1/completions", json=body)
        assert answer.text.endswith("[DONE]\n\n")
        assert (await served.client.post("/v1/steering/score", json={"prompt": "abc"})).status_code == 200
        assert (await served.chat(FIRING[0], mood="calm")).status_code == 400
        assert (
            await served.client.post("/v1/responses", json={"model": "tiny", "input": FIRING[0]})
        ).status_code == 200
        first, second = [await hashed(served, prompt=prompt) for prompt in ("abc", "defg")]
    found = lines(path)
    assert [line["prompt_sha256"] for line in found[:2]] == [first, second]
    assert [line["path"] for line in found] == ["/v1/completions"] * 2 + ["/v1/responses"]
    assert found[0]["id"].removesuffix("-0") == found[1]["id"].removesuffix("-1")


async def test_broken_answers(artifacts, tmp_path):
    """A client that leaves, and a vector that is not finite: the decision is there, and how it ended."""
    path = tmp_path / "audit"
    async with serving(artifacts, ("safety", "tone"), audit=opened(path)) as served:
        [tone] = [p for site in served.engine._core.runner.sites for p in site.profiles if p.name == "tone"]
        tone.experts.output_bias.fill_(3e38)  # after the start-up proof, which would refuse it
        body = {"model": "tiny", "messages": [{"role": "user", "content": FIRING[0]}], "ignore_eos": True}
        connection = Connection(served.app, CHAT, body | {"stream": True, "steer_profiles": ["safety"]})
        running = asyncio.create_task(connection.run())
        await connection.first_event.wait()
        connection.cut()
        await asyncio.wait_for(running, 5)
        failed = await served.chat(FIRING[0])
        assert failed.json()["error"]["code"] == "steering_non_finite"
    left, refused = lines(path)
    assert (left["applied"], left["reason"], left["finish"], left["status"]) == (True, "gate_open", ["abort"], 200)
    assert (refused["reason"], refused["finish"], refused["status"]) == ("non_finite", ["error"], 500)
    assert [(p["name"], p["reason"]) for p in refused["profiles"]] == [("safety", "gate_open"), ("tone", "non_finite")]
    assert refused["completion_tokens"] == 0


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """`disk["full"]`: whether the audit log's disk is."""
    state, write = {"full": False}, os.write

    def limited(descriptor, content):
        if state["full"] and os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    monkeypatch.setattr(audit_module.os, "write", limited)
    monkeypatch.setattr(audit_module, "RETRY_S", 0.02)
    return state


async def test_a_full_disk_does_not_stop_the_answers(artifacts, tmp_path, disk, caplog):
    audit = opened(tmp_path / "audit")
    async with serving(artifacts, audit=audit) as served:
        disk["full"] = True
        for _ in range(3):
            assert (await served.chat(FIRING[0])).status_code == 200
            await until(lambda: audit.failure)
        assert (await served.client.get("/ready")).status_code == 200
        metrics = (await served.client.get("/metrics")).text
        assert sample(metrics, "audit_log_errors_total", kind="write") > 0
        assert "cannot be written (No space left on device)" in caplog.text
        disk["full"] = False
        await until(lambda: audit.num_records == 3)


async def test_nothing_is_answered_unaudited_where_that_is_asked(artifacts, tmp_path, disk):
    audit = opened(tmp_path / "audit", required=True)
    async with serving(artifacts, audit=audit) as served:
        assert (await served.chat(FIRING[0])).status_code == 200
        await until(lambda: audit.num_records == 1)
        disk["full"] = True
        assert (await served.chat(FIRING[0])).status_code == 200  # how else should it know?
        await until(lambda: audit.failure)
        before = (await served.client.get("/metrics")).text
        for path, body in (
            (CHAT, {"messages": [{"role": "user", "content": FIRING[0]}]}),
            ("/v1/completions", {"prompt": "abc", "stream": True}),
            ("/v1/responses", {"input": "abc"}),
        ):
            refused = await served.client.post(path, json={"model": "tiny"} | body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_log_unavailable")
            assert "No space left on device" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "10"
        assert (await served.client.get("/ready")).json()["error"]["code"] == "audit_log_unavailable"
        assert (await served.client.get("/health")).status_code == 200
        after = (await served.client.get("/metrics")).text
        evaluated = [sample(text, "gate_evaluations_total", profile="safety") for text in (before, after)]
        assert evaluated[0] == evaluated[1] == 2
        disk["full"] = False
        await until(lambda: audit.refusal is None)
        assert (await served.chat(FIRING[0])).status_code == 200
        assert (await served.client.get("/ready")).status_code == 200
    assert len(lines(tmp_path / "audit")) == 3, "whoever was answered is in it"


async def test_who_changes_what_acts_is_in_it(artifacts, tmp_path):
    path = tmp_path / "audit"
    async with serving(artifacts, audit=opened(path), access=Access.of("k", admin="root")) as served:

        async def send(method, path, **body):
            headers = {"Authorization": "Bearer root", "X-Request-Id": "by-root"}
            return await served.client.request(method, f"/v1/steering/{path}", json=body, headers=headers)

        version = (await send("POST", "profiles/load", name="tone", source=str(artifacts.tone))).json()["version"]
        await send("POST", "profiles/load", name="tone", source=str(artifacts.safety), mode="shadow")
        await send("PUT", "defaults", strengths={"safety": 1.5})
        await send("POST", "profiles/unload", name="tone")
        assert (await send("POST", "profiles/load", name="x", source="nowhere")).status_code == 400  # changes nothing
    loaded, replaced, changed, unloaded = lines(path)
    assert [line["event"] for line in lines(path)] == ["profile_loaded"] * 2 + ["defaults_changed", "profile_unloaded"]
    assert all((line["key"], line["request"]) == ("admin", "by-root") for line in lines(path))
    assert (loaded["name"], loaded["version"], loaded["profiles"]) == ("tone", version, ["safety", "tone"])
    assert replaced["replaced"] == version and replaced["modes"]["tone"] == "shadow"
    assert changed["strengths"]["safety"] == 1.5 and unloaded["profiles"] == ["safety"]
