"""Answers and events held against OpenAI's published types, strictly: no field more, none missing, no null where they have none.

`CheckedTransport` does it to every answer that a test gets from the application in process.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft7Validator

STEERING = frozenset({"steering"})
MODEL_CARD = frozenset({"root", "parent", "max_model_len", "steer_profiles"})  # the first three are vLLM's
# vLLM's extras: what a request's field, where it is set, adds to the answer and to its choices.
ON_REQUEST = {
    "prompt_logprobs": frozenset({"prompt_logprobs"}),
    "return_token_ids": frozenset({"token_ids", "prompt_token_ids"}),
}


@functools.cache
def definitions() -> dict[str, Any]:
    """The published types, with corrections where they say something for the SDK's sake that OpenAI's wire does not."""
    text = Path(__file__).with_suffix(".json").read_text("utf-8")
    found = copy.deepcopy(json.loads(text)["definitions"])
    choice = found["CompletionChoice"]["properties"]
    choice["finish_reason"] = {"enum": ["stop", "length", "content_filter", None]}  # null until a stream's last chunk
    logprobs = found["CompletionChoice.Logprobs"]["properties"]
    logprobs["token_logprobs"]["items"] = {"type": ["number", "null"]}  # with echo the first token has none
    logprobs["top_logprobs"]["items"]["type"] = ["object", "null"]
    found["Response"]["properties"].pop("output_text", None)  # the SDK puts it together
    found["Response"]["required"] = [name for name in found["Response"]["required"] if name != "output_text"]
    found["ListModels"] = _object(
        object={"const": "list"}, data={"type": "array", "items": {"$ref": "#/definitions/Model"}}
    )
    found["Error"] = _object(error={"$ref": "#/definitions/ErrorObject"})
    return found


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@functools.cache
def _validator(name: str) -> Draft7Validator:
    return Draft7Validator({"$ref": f"#/definitions/{name}", "definitions": definitions()})


def problems(name: str, value: Any) -> list[str]:
    """What keeps `value` from being a `name` of OpenAI's."""
    return [f"{name}{error.json_path[1:]}: {error.message[:200]}" for error in _validator(name).iter_errors(value)]


def conforms(name: str, value: Any, asked: dict[str, Any] | None = None) -> None:
    """Assert that `value` is a `name`, our documented extensions apart; `asked`: the request, which may have asked for some."""
    wanted = {
        field for field, value in (asked or {}).items() if value is not None and value is not False
    }  # 0 asks, too
    extras = frozenset().union(*(names for field, names in ON_REQUEST.items() if field in wanted))
    bare = _without(value, STEERING | extras)
    if isinstance(bare, dict) and isinstance(bare.get("choices"), list):
        bare = bare | {"choices": [_without(choice, extras) for choice in bare["choices"]]}
    found = problems(name, bare)
    assert not found, f"{found}\nin {json.dumps(value)[:2000]}"


def model_conforms(card: Any) -> None:
    """Assert that `card` is a `Model`, our documented extensions apart."""
    conforms("Model", _without(card, MODEL_CARD))


def _without(value: Any, names: frozenset[str]) -> Any:
    return {key: item for key, item in value.items() if key not in names} if isinstance(value, dict) else value


def stream_conforms(name: str, text: str, asked: dict[str, Any]) -> None:
    """Assert what a stream of chunks must be, event by event and as a whole; it may end with an error."""
    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    events = [line.removeprefix("data: ") for line in lines]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    if events[-1] != "[DONE]":
        assert not problems("Error", chunks[-1]), f"a stream ends with [DONE] or an error, not with {events[-1]}"
        chunks = chunks[:-1]
    assert "[DONE]" not in events[:-1]
    for chunk in chunks:
        conforms(name, chunk, asked)
    same = ("id", "created", "model", "object", "system_fingerprint")
    assert len({tuple(chunk[field] for field in same) for chunk in chunks}) <= 1, "these are equal in all chunks"
    if events[-1] == "[DONE]":
        _whole_stream(name, chunks, asked)


def _whole_stream(name: str, chunks: list[dict], asked: dict[str, Any]) -> None:
    with_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
    *rest, last = chunks
    if with_usage:
        assert last["choices"] == [] and last["usage"] is not None, "the usage comes last, with no choices"
        assert all(chunk.get("usage") is None for chunk in rest)
    else:
        rest = chunks
        assert not any("usage" in chunk for chunk in chunks), "nobody asked for the usage"
    assert all(len(chunk["choices"]) == 1 for chunk in rest)
    choices: dict[int, list[dict]] = {}
    for chunk in rest:
        choices.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    assert sorted(choices) == list(range(len(choices)))
    for parts in choices.values():
        assert [part["finish_reason"] is not None for part in parts] == [False] * (len(parts) - 1) + [True]
        if name == "ChatCompletionChunk":
            assert ["role" in part["delta"] for part in parts] == [True] + [False] * (len(parts) - 1)


def response_conforms(answer: dict) -> None:
    """Assert that `answer` is a `Response`, our `steering` apart."""
    conforms("Response", answer)


def response_stream_conforms(text: str) -> None:
    """Assert that a stream of the Responses API holds known events under their names, numbered, and no `[DONE]`."""
    events = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        if "response" in event:
            response_conforms(event["response"])
            event = event | {"response": _without(event["response"], STEERING)}
        conforms("ResponseStreamEvent", event)


def answer_conforms(method: str, path: str, asked: dict[str, Any], response: httpx.Response) -> None:
    """Assert that an answer is what OpenAI's would be, by its path and kind; paths that are ours alone pass."""
    if response.status_code >= 400 and response.status_code != 499 and method not in ("HEAD", "OPTIONS"):
        conforms("Error", response.json())
        return
    names = {"/v1/chat/completions": "ChatCompletion", "/v1/completions": "Completion"}
    if response.status_code == 200 and method == "POST" and (name := names.get(path)) is not None:
        if response.headers["content-type"].startswith("text/event-stream"):
            stream_conforms("ChatCompletionChunk" if name == "ChatCompletion" else name, response.text, asked)
        else:
            conforms(name, response.json(), asked)
    elif response.status_code == 200 and path.startswith("/v1/responses") and method != "DELETE":
        if response.headers["content-type"].startswith("text/event-stream"):
            response_stream_conforms(response.text)
        elif not path.endswith("/input_items"):
            response_conforms(response.json())
    elif response.status_code == 200 and method == "GET" and path.startswith("/v1/models"):
        answer = response.json()
        if path == "/v1/models":
            answer = answer | {"data": [_without(card, MODEL_CARD) for card in answer["data"]]}
            conforms("ListModels", answer)
        else:
            model_conforms(answer)


class CheckedTransport(httpx.ASGITransport):
    """Talks to an application in process, and fails where an answer of it is not as OpenAI's would be."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        raw = b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]
        response.stream = httpx.ByteStream(raw)
        try:
            asked = json.loads(await request.aread())
        except (ValueError, RecursionError):
            asked = {}
        read = httpx.Response(response.status_code, headers=response.headers, content=raw, request=request)
        answer_conforms(request.method, request.url.path, asked if isinstance(asked, dict) else {}, read)
        return response
