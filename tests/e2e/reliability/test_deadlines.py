"""Requests that take longer than the operator allows: in the queue, in the prompt, in mid-stream, whole."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from server.answers.generation import by
from server.engine.base import DeadlineExceededError
from tests.checkpoint import CALM, FIRING
from tests.serving import Served, sample, serving

ENDLESS = {"max_tokens": None, "ignore_eos": True}
TIMEOUT_S = 0.4


def slowed(monkeypatch, served: Served, step_s: float) -> None:
    """A step takes longer, so that 200 tokens take seconds on any machine."""
    step = served.engine._core.step

    def slow():
        time.sleep(step_s)
        return step()

    monkeypatch.setattr(served.engine._core, "step", slow)


async def freed(served: Served) -> None:
    async with asyncio.timeout(10):
        while (stats := served.engine.stats()).num_running or stats.num_waiting or stats.kv_cache_usage:
            await asyncio.sleep(0.005)


async def test_a_whole_answer_becomes_a_504(artifacts, oracle, monkeypatch):
    async with serving(artifacts, request_timeout_s=TIMEOUT_S) as served:
        slowed(monkeypatch, served, 0.02)
        begun = time.monotonic()
        response = await served.chat(CALM[0], n=2, **ENDLESS)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (504, "request_timeout", "server_error")
        assert TIMEOUT_S <= time.monotonic() - begun < TIMEOUT_S + 5
        await freed(served)
        metrics = (await served.client.get("/metrics")).text
        assert sample(metrics, "request_success_total", finished_reason="error") == 2
        assert (await served.chat(CALM[0], max_tokens=2)).json()["choices"][0]["message"]["content"] == oracle.plain(
            CALM[0], 2
        )


async def test_a_stream_ends_with_an_error_event(artifacts, oracle, monkeypatch):
    async with serving(artifacts, request_timeout_s=TIMEOUT_S) as served:
        slowed(monkeypatch, served, 0.02)
        response = await served.chat(FIRING[0], stream=True, **ENDLESS)
        *events, last = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        assert last["error"]["code"] == "request_timeout" and "[DONE]" not in response.text
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        assert text and oracle.steered(FIRING[0], 200).startswith(text.rstrip("�"))
        await freed(served)


async def test_a_response_stream_fails_by_name_and_is_kept_as_failed(artifacts, monkeypatch):
    async with serving(artifacts, request_timeout_s=TIMEOUT_S) as served:
        slowed(monkeypatch, served, 0.02)
        body = {"model": "tiny", "input": CALM[0], "stream": True, "temperature": 0}
        response = await served.client.post("/v1/responses", json=body | {"max_output_tokens": 200})
        last = json.loads(response.text.strip().split("data: ")[-1])
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        kept = (await served.client.get(f"/v1/responses/{last['response']['id']}")).json()
        assert kept["status"] == "failed"
        await freed(served)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_in_the_queue_for_too_long_leaves_it(artifacts, monkeypatch, stream):
    async with serving(artifacts, request_timeout_s=TIMEOUT_S, max_num_seqs=1) as served:
        slowed(monkeypatch, served, 0.02)
        answers = await asyncio.gather(*(served.chat(text, stream=stream, **ENDLESS) for text in CALM))
        waited = [answer for answer in answers if answer.status_code == 504]
        assert len(waited) >= len(CALM) - 1
        assert {answer.json()["error"]["code"] for answer in waited} == {"request_timeout"}
        await freed(served)


async def test_a_score_has_the_deadline_too(artifacts, monkeypatch):
    async with serving(artifacts, request_timeout_s=TIMEOUT_S) as served:
        slowed(monkeypatch, served, 3 * TIMEOUT_S)
        response = await served.client.post("/v1/steering/score", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
        await freed(served)


async def test_without_a_limit_nothing_ends(artifacts, oracle, monkeypatch):
    async with serving(artifacts, request_timeout_s=0) as served:
        slowed(monkeypatch, served, 0.05)
        answer = (await served.chat(CALM[0])).json()
        assert answer["choices"][0]["message"]["content"] == oracle.plain(CALM[0])


async def test_work_is_done_by_a_time_or_not_at_all():
    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    now = asyncio.get_running_loop().time()
    assert await by(None, work(0)) == "done"
    assert await by(now + 10, work(0)) == "done"
    with pytest.raises(DeadlineExceededError):
        await by(now - 1, work(1))
