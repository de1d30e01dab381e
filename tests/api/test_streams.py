"""Event streams: what holds while they wait, when they fail, and what their headers say."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from server.api import respond
from server.engine.base import GenerationError
from tests.checkpoint import CALM, FIRING
from tests.serving import Connection, chunks, sample, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"model": "tiny", "temperature": 0, "ignore_eos": True, "messages": [{"role": "user", "content": FIRING[0]}]}
SHORT = LONG | {"max_tokens": 3, "stream": True}
PROMPTS = {"model": "tiny", "temperature": 0, "prompt": ["a", "b"], "max_tokens": 3, "stream": True}


@pytest.fixture
async def busy(artifacts, monkeypatch):
    """One slot, and a request in it that takes long: whatever comes next waits. `busy.first.cut()` lets it in."""
    monkeypatch.setattr(respond, "PING_S", 0.05)
    async with serving(artifacts, max_num_seqs=1) as served:
        step = served.engine._core.step
        monkeypatch.setattr(served.engine._core, "step", lambda: time.sleep(0.01) or step())
        first = Connection(served.app, CHAT, LONG | {"stream": True})
        running = asyncio.create_task(first.run())
        await first.first_event.wait()
        yield served, first
        first.cut()
        await asyncio.wait_for(running, 5)


async def comments(connection: Connection, count: int) -> None:
    async with asyncio.timeout(10):
        while connection.received.count(b": waiting") < count:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("path", "body"), [(CHAT, SHORT), (TEXT, PROMPTS)])
async def test_a_stream_that_waits_long_says_so_and_then_goes_on(busy, path, body):
    served, first = busy
    waiting = Connection(served.app, path, body)
    running = asyncio.create_task(waiting.run())
    await comments(waiting, 3)
    assert (waiting.status, served.engine.stats().num_waiting > 0) == (200, True)
    assert set(waiting.received.decode().split("\n\n")) == {": waiting", ""}
    assert not [name for name in waiting.headers if name.startswith("x-finesteer")]  # nobody knows yet
    first.cut()
    await asyncio.wait_for(running, 10)
    found = chunks(waiting.received.decode())
    assert "steering" in found[0] and "steering" in found[-1]
    assert waiting.ended
    rest = waiting.received[waiting.received.rindex(b": waiting\n\n") + 11 :]
    assert rest.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")


async def test_who_goes_while_waiting_leaves_the_queue(busy):
    served, _ = busy
    waiting = Connection(served.app, CHAT, SHORT)
    running = asyncio.create_task(waiting.run())
    await comments(waiting, 1)
    waiting.cut()
    await asyncio.wait_for(running, 5)
    async with asyncio.timeout(5):
        while served.engine.stats().num_waiting:
            await asyncio.sleep(0.005)
    text = (await served.client.get("/metrics")).text
    assert sample(text, "request_success_total", finished_reason="abort") == 1


async def test_an_error_after_long_waiting_is_an_event_and_a_clean_end(busy):
    served, _ = busy
    waiting = Connection(served.app, CHAT, SHORT)
    running = asyncio.create_task(waiting.run())
    await comments(waiting, 1)
    await served.engine.stop()
    await asyncio.wait_for(running, 5)
    assert (waiting.status, waiting.ended) == (200, True)
    *_, last, end = waiting.received.decode().split("\n\n")
    assert (end, json.loads(last.removeprefix("data: "))["error"]["code"]) == ("", "shutting_down")
    assert b"[DONE]" not in waiting.received


async def test_an_error_soon_enough_has_its_own_status(served, monkeypatch):
    async def start(self):
        raise GenerationError("the numbers were not finite", "non_finite")

    monkeypatch.setattr("server.answers.generation.Generation.start", start)
    for path, body in ((CHAT, SHORT), (TEXT, PROMPTS)):
        response = await served.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "non_finite")


@pytest.mark.parametrize(("text", "applied"), [(FIRING[0], "true"), (CALM[0], "false")])
async def test_headers_of_a_stream_say_what_was_steered(served, text, applied):
    response = await served.chat(text, stream=True)
    assert response.headers["x-finesteer-applied"] == applied
    assert response.headers["x-finesteer-profiles"] == ("safety" if applied == "true" else "")
    assert chunks(response.text)[0]["steering"]["applied"] is (applied == "true")


class Broken:
    """Breaks a generation after some deltas."""

    def __init__(self, monkeypatch, error: Exception, after: int) -> None:
        from server.answers.generation import Generation

        whole = Generation.deltas

        async def deltas(generation):
            count = 0
            async for delta in whole(generation):
                if count == after:
                    raise error
                count += 1
                yield delta

        monkeypatch.setattr(Generation, "deltas", deltas)


@pytest.mark.parametrize(("path", "body"), [(CHAT, LONG | {"stream": True}), (TEXT, PROMPTS | {"max_tokens": 30})])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (GenerationError("the numbers were not finite", "non_finite"), "non_finite", "The numbers were not finite."),
        (RuntimeError("secret detail"), "internal_error", "made a mistake"),
    ],
)
async def test_an_error_in_mid_stream_is_an_event_and_a_clean_end(served, monkeypatch, path, body, error, code, said):
    Broken(monkeypatch, error, 5)
    connection = Connection(served.app, path, body)
    await asyncio.wait_for(connection.run(), 10)
    assert (connection.status, connection.ended) == (200, True)
    *before, last, end = connection.received.decode().split("\n\n")
    told = json.loads(last.removeprefix("data: "))["error"]
    assert end == ""
    assert (told["code"], told["type"]) == (code, "server_error")
    assert said in told["message"] and "secret" not in told["message"]
    assert len(before) >= 5 and "[DONE]" not in connection.received.decode()
    async with asyncio.timeout(5):
        while served.engine.stats().num_running:
            await asyncio.sleep(0.005)


async def test_the_official_client_raises_on_such_an_event(served, monkeypatch):
    import openai

    Broken(monkeypatch, GenerationError("the numbers were not finite", "non_finite"), 5)
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=served.client, max_retries=0)
    stream = await client.chat.completions.create(
        model="tiny", messages=LONG["messages"], stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="not finite"):
        async for _ in stream:
            pass


async def test_a_silent_stream_is_kept_alive(served, monkeypatch):
    """Also after its first token: a preempted request may wait long in the middle."""
    monkeypatch.setattr(respond, "PING_S", 0.05)
    step = served.engine._core.step
    monkeypatch.setattr(served.engine._core, "step", lambda: time.sleep(0.12) or step())
    connection = Connection(served.app, CHAT, SHORT | {"max_tokens": 4})
    await asyncio.wait_for(connection.run(), 20)
    text = connection.received.decode()
    assert text.index("data: ") < text.rindex(": waiting") < text.index("[DONE]")
    chunks(text)
