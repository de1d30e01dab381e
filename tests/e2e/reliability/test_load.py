"""Many clients, and clients that misbehave, over real sockets: `pytest tests/e2e/reliability/test_load.py`.

Whatever they do, every answer that comes is the one that its prompt has alone, and afterwards nothing is held for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from server.api import dependencies
from server.engine.native import inbox
from tests.checkpoint import CALM, FIRING
from tests.e2e.reliability.sockets import PATH, Listening, head, listening, question, response
from tests.serving import chunks

TOKENS = 12
LONG = {"max_tokens": None, "ignore_eos": True, "stream": True}
HEAVY = LONG | {"n": 4, "logprobs": True, "top_logprobs": 20}  # more than kernel buffers hold


def wanted(oracle, text: str) -> str:
    return oracle.steered(text, TOKENS) if text in FIRING else oracle.plain(text, TOKENS)


async def ask(http: httpx.AsyncClient, text: str, **fields: Any) -> httpx.Response:
    return await http.post(PATH, content=question(text, **fields), headers={"Content-Type": "application/json"})


def said(answer: httpx.Response) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in chunks(answer.text))


def http_to(at: Listening) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{at.port}", limits=limits, timeout=120)


async def still_right(at: Listening, oracle) -> None:
    """Nothing is left of the clients, and the server answers."""
    await at.all_quiet()
    async with http_to(at) as http:
        for text in (FIRING[0], CALM[0]):
            assert said(await ask(http, text, stream=True)) == wanted(oracle, text)


@pytest.mark.slow
async def test_256_streams_at_once(artifacts, oracle):
    async with listening(artifacts, max_num_seqs=16) as at, http_to(at) as http:
        texts = (FIRING + CALM) * 32
        answers = await asyncio.gather(*(ask(http, text, stream=True) for text in texts))
        assert {answer.status_code for answer in answers} == {200}
        for text, answer in zip(texts, answers, strict=True):
            assert said(answer) == wanted(oracle, text)
        await still_right(at, oracle)


async def test_more_than_the_queue_holds(artifacts, oracle):
    async with listening(artifacts, max_num_seqs=4, max_waiting=16) as at, http_to(at) as http:
        texts = (FIRING + CALM) * 32
        asked = [{"stream": i % 3 == 0, "n": 1 + (i % 3 == 2)} for i in range(len(texts))]
        answers = await asyncio.gather(*(ask(http, t, **fields) for t, fields in zip(texts, asked, strict=True)))
        served = [i for i, answer in enumerate(answers) if answer.status_code == 200]
        assert 16 <= len(served) < 256
        for i, answer in enumerate(answers):
            if i not in served:
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                error = answer.json()["error"]
                assert (error["code"], error["type"], error["param"]) == ("overloaded", "server_error", None)
            elif asked[i]["stream"]:
                assert said(answer) == wanted(oracle, texts[i])
            else:
                found = {choice["message"]["content"] for choice in answer.json()["choices"]}
                assert found == {wanted(oracle, texts[i])}
        await still_right(at, oracle)


async def test_several_prompts_are_taken_or_refused_together(artifacts, oracle):
    async with listening(artifacts, max_num_seqs=2, max_waiting=6) as at, http_to(at) as http:

        async def complete(num_prompts: int) -> httpx.Response:
            body = {"model": "tiny", "prompt": ["a"] * num_prompts, "max_tokens": 4, "temperature": 0}
            return await http.post("/v1/completions", json=body)

        assert len((await complete(6)).json()["choices"]) == 6
        too_many = await complete(7)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt")
        answers = await asyncio.gather(*(complete(5) for _ in range(6)))
        assert {len(a.json()["choices"]) for a in answers if a.status_code == 200} == {5}
        refused = [a for a in answers if a.status_code != 200]
        assert refused and {(a.status_code, a.json()["error"]["code"]) for a in refused} == {(503, "overloaded")}
        await still_right(at, oracle)


async def test_too_little_kv_memory_preempts_and_fails_nobody(artifacts, oracle):
    from tests.engine import block_bytes
    from tests.serving import load_engine

    probe = load_engine(str(artifacts.model), {"safety": str(artifacts.safety)}, max_model_len=64, num_threads=1)
    memory = 12 * block_bytes(probe._core.runner.decoder, steered=True)
    async with listening(artifacts, max_num_seqs=8, kv_cache_memory=memory, prefix_cache_memory=0) as at:
        async with http_to(at) as http:
            texts = (FIRING + CALM) * 4
            answers = await asyncio.gather(
                *(ask(http, text, stream=True, max_tokens=80, ignore_eos=True) for text in texts)
            )
            assert {answer.status_code for answer in answers} == {200}
            alone = {
                text: said(await ask(http, text, stream=True, max_tokens=80, ignore_eos=True)) for text in set(texts)
            }
        assert at.served.engine.stats().num_preemptions > 0
        for text, answer in zip(texts, answers, strict=True):
            assert said(answer) == alone[text]
        await still_right(at, oracle)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_client_that_does_not_read_is_cut_off(artifacts, oracle):
    async with listening(artifacts, send_buffer_bytes=8192, stall_timeout_s=0.5) as at:
        reader, writer = await at.connect(buffer_bytes=4096)
        body = question(FIRING[0], **HEAVY)
        writer.write(head(body) + body)
        await until(lambda: at.served.engine.stats().num_running > 0)
        begun = time.monotonic()
        async with http_to(at) as http:  # others are not held up by it
            assert said(await ask(http, CALM[0], stream=True)) == wanted(oracle, CALM[0])
        await at.all_quiet()
        assert time.monotonic() - begun < 10
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4096):
                received += piece
        assert b"[DONE]" not in received
        writer.close()
        await still_right(at, oracle)


async def test_a_whole_answer_that_nobody_reads_is_cut_off(artifacts, oracle):
    async with listening(artifacts, send_buffer_bytes=8192, stall_timeout_s=0.5) as at:
        _, writer = await at.connect(buffer_bytes=4096)
        body = question(FIRING[0], **(HEAVY | {"stream": False}))
        writer.write(head(body) + body)
        await until(lambda: at.served.engine.stats().num_running > 0)
        await at.all_quiet()
        writer.close()
        await still_right(at, oracle)


async def test_a_client_that_lags_too_far_behind_is_broken_off(artifacts, oracle, monkeypatch):
    """Its rows are free long before the stall timeout, and what waits for it is bounded."""
    monkeypatch.setattr(inbox, "MAX_UNREAD", 50)
    async with listening(artifacts, send_buffer_bytes=8192) as at:
        reader, writer = await at.connect(buffer_bytes=4096)
        body = question(FIRING[0], **HEAVY)
        writer.write(head(body) + body)
        await until(lambda: at.served.engine.stats().num_running > 0)
        await until(lambda: at.served.engine.stats().num_running == 0)
        [waiting] = at.served.engine._open
        assert waiting._results.qsize() == 1
        *_, last = (await reader.read(-1)).split(b"data: ")
        assert json.loads(last.split(b"\n")[0])["error"]["code"] == "slow_reader"
        writer.close()
        await still_right(at, oracle)


async def test_slow_but_steady_readers_get_all(artifacts, oracle):
    async with listening(artifacts, send_buffer_bytes=8192, stall_timeout_s=2) as at:
        reader, writer = await at.connect(buffer_bytes=4096)
        body = question(FIRING[0], **(HEAVY | {"n": 1, "max_tokens": 60}))
        writer.write(head(body, PATH, "Connection: close") + body)
        received = b""
        while piece := await reader.read(4096):
            received += piece
            await asyncio.sleep(0.02)
        assert b"[DONE]" in received and received.count(b'"finish_reason":"length"') == 1
        writer.close()
        await still_right(at, oracle)


async def test_half_open_connections_end(artifacts, oracle):
    """Nothing sent, half a head, half a body, a body drop by drop, and a pause between two requests."""
    body = question(CALM[0])
    async with listening(artifacts, read_timeout_s=0.6) as at:
        connections = [await at.connect() for _ in range(4)]
        for (_, writer), sent in zip(
            connections, (b"", head(body)[:40], head(body) + body[:20], head(body)), strict=True
        ):
            writer.write(sent)

        async def drops(writer: asyncio.StreamWriter) -> None:
            for byte in body[:-1]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        dropping = asyncio.create_task(drops(connections[3][1]))
        async with asyncio.timeout(5):
            assert await connections[0][0].read() == b""
            for reader, _ in connections[1:]:
                status, headers, answer = await response(reader)
                assert (status, headers["connection"]) == (408, "close")
                assert (answer["error"]["code"], answer["error"]["type"]) == ("upload_timeout", "invalid_request_error")
                assert await reader.read() == b""
        dropping.cancel()
        for _, writer in connections:
            writer.close()
        await still_right(at, oracle)


async def test_bodies_that_do_not_end_hold_no_memory_without_bound(artifacts, oracle, monkeypatch):
    """Each may be so large, and all together, too; whoever goes makes room."""
    monkeypatch.setattr(dependencies, "MAX_UPLOADS_BYTES", 1_000_000)
    body = question(CALM[0])
    async with listening(artifacts) as at:
        service = at.served.app.state.service
        connections = [await at.connect() for _ in range(3)]
        for i, (_, writer) in enumerate(connections):
            writer.write(head(b"x" * 600_000) + b" " * 400_000)
            if i < 2:
                await until(lambda i=i: service.uploads.num_bytes == 400_000 * (i + 1))
        status, headers, answer = await response(connections[2][0])
        assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "1", "overloaded")
        for _, writer in connections:
            writer.transport.abort()
        await until(lambda: service.uploads.num_bytes == 0)
        async with http_to(at) as http:
            assert (await http.post(PATH, content=body)).status_code == 200
        await still_right(at, oracle)


async def test_a_body_that_goes_on_after_its_refusal_ends_too(artifacts, oracle):
    """The answer is out (no such path), the body keeps coming: the connection must not live on it."""
    async with listening(artifacts, read_timeout_s=0.6) as at:
        reader, writer = await at.connect()
        writer.write(head(b"x" * 1_000_000, "/v1/nothing"))
        assert (await response(reader))[0] == 404
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(5):
            while not ended.done():
                writer.write(b"x")
                await asyncio.sleep(0.05)
        writer.close()
        await still_right(at, oracle)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 2_000_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 200_000, 431, "headers_too_large"),
        (b"NONSENSE\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n", 400, "malformed_http"),
    ],
)
async def test_heads_that_are_none(artifacts, oracle, sent, status, code):
    async with listening(artifacts) as at:
        reader, writer = await at.connect()
        writer.write(sent)
        found, headers, answer = await response(reader)
        assert (found, headers["connection"], answer["error"]["code"]) == (status, "close", code)
        [connection] = at.server.server_state.connections or [None]
        assert connection is None or len(connection.conn._receive_buffer) < 400_000  # not all that was sent
        writer.close()
        await still_right(at, oracle)


async def test_a_head_of_60_kib_is_read(artifacts):
    async with listening(artifacts) as at, http_to(at) as http:
        assert (await http.get("/health", headers={"X-Long": "a" * 60_000})).status_code == 200


async def hang_up_before_the_head(at: Listening) -> None:
    _, writer = await at.connect()
    writer.write(head(question(FIRING[0]))[:30])
    writer.transport.abort()


async def hang_up_after_the_head(at: Listening) -> None:
    _, writer = await at.connect()
    writer.write(head(question(FIRING[0])))
    await asyncio.sleep(0.01)
    writer.transport.abort()


async def hang_up_in_mid_body(at: Listening) -> None:
    _, writer = await at.connect()
    body = question(FIRING[0])
    writer.write(head(body) + body[: len(body) // 2])
    await asyncio.sleep(0.01)
    writer.transport.abort()


async def hang_up_before_the_first_token(at: Listening) -> None:
    _, writer = await at.connect()
    body = question(FIRING[0] * 7, **LONG)
    writer.write(head(body) + body)
    await asyncio.sleep(0.005)
    writer.transport.abort()


async def hang_up_in_mid_stream(at: Listening) -> None:
    reader, writer = await at.connect()
    body = question(FIRING[0], **LONG)
    writer.write(head(body) + body)
    for _ in range(3):
        await reader.readuntil(b"data: ")
    writer.transport.abort()


async def hang_up_on_a_whole_answer(at: Listening) -> None:
    _, writer = await at.connect()
    body = question(FIRING[0], **(LONG | {"stream": False, "n": 3}))
    writer.write(head(body) + body)
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def hang_up_after_the_last_token(at: Listening) -> None:
    reader, writer = await at.connect()
    body = question(CALM[0], stream=True, max_tokens=2)
    writer.write(head(body) + body)
    await reader.readuntil(b"[DONE]")
    writer.transport.abort()


async def hang_up_politely(at: Listening) -> None:
    """Half a close: the client sends no more, and so reads no more either, for all that the server can know."""
    reader, writer = await at.connect()
    body = question(FIRING[0], **LONG)
    writer.write(head(body) + body)
    await reader.readuntil(b"data: ")
    writer.close()


HANG_UPS: dict[str, Callable[[Listening], Coroutine[Any, Any, None]]] = {
    name.removeprefix("hang_up_"): work for name, work in globals().items() if name.startswith("hang_up_")
}


@pytest.mark.parametrize("stage", HANG_UPS)
async def test_clients_that_hang_up(artifacts, oracle, stage):
    async with listening(artifacts, max_num_seqs=4) as at:
        async with http_to(at) as http:
            staying = [asyncio.create_task(ask(http, text, stream=True)) for text in (FIRING[1], CALM[1])]
            await asyncio.gather(*(HANG_UPS[stage](at) for _ in range(12)))
            for text, answer in zip((FIRING[1], CALM[1]), staying, strict=True):
                assert said(await answer) == wanted(oracle, text)
        await still_right(at, oracle)


async def test_what_is_left_can_be_seen(artifacts):
    """The check of the tests above is able to fail: a client that is still there is noticed."""
    async with listening(artifacts) as at:
        reader, writer = await at.connect()
        body = question(FIRING[0], **LONG)
        writer.write(head(body) + body)
        await reader.readuntil(b"data: ")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await at.all_quiet()
        writer.close()
        await at.all_quiet()
