"""HTTP itself: paths, methods, media types, keys, cross-origin requests, compression."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from server.access.keys import Access
from server.api.elsewhere import OPERATIONS, why_not
from server.app import GZIP_FROM_BYTES
from tests.checkpoint import CALM
from tests.serving import Connection, chunks, serving

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": CALM[0]}], "max_tokens": 2}
ELSEWHERE = [
    ("POST", "/v1/embeddings", "no embeddings"),
    ("POST", "/v1/images/generations", "text only"),
    ("POST", "/v1/audio/transcriptions", "text only"),
    ("GET", "/v1/files", "files are not stored"),
    ("GET", "/v1/files/file-1/content", "files are not stored"),
    ("POST", "/v1/batches", "no batch jobs"),
    ("POST", "/v1/moderations", "no moderation model"),
    ("POST", "/v1/fine_tuning/jobs", "finesteer train"),
    ("POST", "/v1/assistants", "not built"),
    ("GET", "/v1/threads/t/messages", "not stored"),
    ("GET", "/v1/vector_stores/v", "not stored"),
    ("GET", "/v1/chat/completions/chatcmpl-1", "chat completions are not stored"),
    ("GET", "/v1/engines", "/v1/models"),
]


def error_of(response) -> dict:
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str | None) and isinstance(error["param"], str | None)
    return error


@pytest.mark.parametrize(("method", "path", "said"), ELSEWHERE)
async def test_the_rest_of_openais_tree_is_a_404_that_says_why(served, method, path, said):
    response = await served.client.request(method, path)
    error = error_of(response)
    assert (response.status_code, error["code"], error["type"]) == (404, "unknown_url", "invalid_request_error")
    assert said in error["message"] and path in error["message"]


def test_every_path_of_the_official_client_is_served_or_has_its_sentence():
    """The client's own source says what OpenAI has, so that nothing new there goes without a word here."""
    import openai

    sources = Path(openai.__file__).parent.glob("resources/**/*.py")
    roots = {root for source in sources for root in re.findall(r'"/([a-z_]{2,})[/"]', source.read_text("utf-8"))}
    assert {"embeddings", "files", "chat"} <= roots
    assert {root for root in roots if why_not(f"/v1/{root}") is None} == {"chat", "models"}


async def test_what_is_nobodys_path(served):
    assert why_not("/v1/nothing") is why_not("/embeddings") is None
    error = error_of(await served.client.get("/v1/nothing"))
    assert "no such path" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "OPTIONS, POST"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("PUT", "/docs", "GET, HEAD, OPTIONS"),
        ("HEAD", CHAT, "OPTIONS, POST"),
    ],
)
async def test_wrong_methods(served, method, path, allowed):
    response = await served.client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    if method == "HEAD":
        assert response.content == b""
    else:
        error = error_of(response)
        assert error["code"] == "method_not_supported" and allowed in error["message"]


@pytest.mark.parametrize("path", OPERATIONS)
async def test_an_operation_where_there_are_ids(served, path):
    response = await served.client.post(path, json={})
    assert (response.status_code, error_of(response)["code"]) == (404, "unknown_url")


async def test_options_names_the_methods(served):
    response = await served.client.options(CHAT)
    assert (response.status_code, response.headers["allow"], response.content) == (204, "OPTIONS, POST", b"")
    assert (await served.client.options("/v1/nothing")).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"])
async def test_head_is_get_without_its_body(served, path):
    head, get = await served.client.head(path), await served.client.get(path)
    assert (head.status_code, head.content) == (200, b"") != (200, get.content)
    assert head.headers["content-type"] == get.headers["content-type"]
    assert "x-request-id" in head.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": "application/vnd.api+json"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ],
)
async def test_media_types(served, headers, status):
    for path, body in (
        (CHAT, BODY),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2}),
        ("/v1/steering/score", {"prompt": "a"}),
    ):
        response = await served.client.post(path, content=json.dumps(body).encode(), headers=headers)
        assert response.status_code == status, response.text
        if status == 415:
            error = error_of(response)
            assert error["code"] == "unsupported_content_type"
            assert headers.get("Content-Encoding", headers["Content-Type"])[:20] in error["message"]


async def test_the_key_is_asked_for_before_anything_else(artifacts):
    async with serving(artifacts, access=Access.of("secret")) as served:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/v1/nothing"), ("GET", "/v1/files")):
            response = await served.client.request(method, path)
            error = error_of(response)
            assert (response.status_code, error["code"]) == (401, "invalid_api_key")
            assert "x-request-id" in response.headers
        right = {"Authorization": "Bearer secret"}
        assert (await served.client.get("/v1/models", headers=right)).status_code == 200
        assert (await served.client.get("/v1/files", headers=right)).status_code == 404
        assert (await served.client.get("/health")).status_code == 200


ORIGIN = "https://app.example.com"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


async def test_without_the_option_no_page_may_call(served):
    response = await served.client.options(CHAT, headers=PREFLIGHT)
    assert not [name for name in response.headers if name.startswith("access-control")]
    response = await served.chat(CALM[0], headers={"Origin": ORIGIN})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [(ORIGIN, "http://localhost:3000"), ("*",)])
async def test_pages_of_named_origins_may_call(artifacts, origins):
    async with serving(artifacts, access=Access.of("secret"), cors_origins=origins) as served:
        allowed = "*" if origins == ("*",) else ORIGIN
        preflight = await served.client.options(CHAT, headers=PREFLIGHT)  # browsers send no key with it
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, allowed)
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        key = {"Authorization": "Bearer secret"}
        answer = await served.chat(CALM[0], headers={"Origin": ORIGIN} | key)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, allowed)
        exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert exposed == ["x-request-id", "x-finesteer-applied", "x-finesteer-profiles"]
        assert set(exposed) <= set(answer.headers)
        stream = await served.chat(CALM[0], stream=True, headers={"Origin": ORIGIN} | key)
        assert stream.headers["access-control-allow-origin"] == allowed
        refused = await served.chat(CALM[0], headers={"Origin": ORIGIN})  # a page must be able to read why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, allowed)
        if allowed == ORIGIN:
            other = await served.client.options(CHAT, headers=PREFLIGHT | {"Origin": "https://evil.example"})
            assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


async def test_large_whole_answers_are_compressed_for_who_accepts_it(served):
    """Without compression at all, this fails at the first assertion; with streams compressed, at the last but one."""
    body = BODY | {"max_tokens": 30, "logprobs": True, "top_logprobs": 20, "temperature": 0}
    sizes = {}
    for coding in ("gzip", "identity"):
        async with served.client.stream("POST", CHAT, json=body, headers={"Accept-Encoding": coding}) as response:
            raw = b"".join([piece async for piece in response.aiter_raw()])
        sizes[coding] = len(raw)
        assert response.headers.get("content-encoding", "identity") == coding
        assert "accept-encoding" in response.headers["vary"].lower()
        assert int(response.headers["content-length"]) == len(raw)
        answer = json.loads(gzip.decompress(raw) if coding == "gzip" else raw)
        assert len(answer["choices"][0]["logprobs"]["content"]) == 30
    assert GZIP_FROM_BYTES < sizes["gzip"] < sizes["identity"] / 3
    small = await served.client.get("/health", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers


async def test_streams_are_never_compressed_and_come_event_by_event(served):
    """Each ASGI message is what would go out at once: one event each, in plain text."""
    body = BODY | {"stream": True, "max_tokens": 30, "temperature": 0}
    connection = Connection(served.app, CHAT, body, {"Accept-Encoding": "gzip, deflate, br"})
    await connection.run()
    headers = connection.headers
    assert "content-encoding" not in headers and headers["content-type"].startswith("text/event-stream")
    events = [piece for piece in connection.sent if piece]
    assert all(event.startswith(b"data: ") and event.count(b"\n\n") == 1 for event in events)
    assert len(events) > 20
    assert len(chunks(b"".join(events).decode())) == len(events) - 1
