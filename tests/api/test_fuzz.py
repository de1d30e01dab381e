"""Every operation of our own `/openapi.json`, fuzzed by schemathesis: right and wrong bodies, odd headers, other methods.

Whatever it sends, the answer has a documented status, media type and shape, and none is a 500.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai.types.responses
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings

from server.api.documentation import describe
from server.app import MODULES
from server.listen import address_of, listen
from tests import openai_schema, openai_types
from tests.serving import Artifacts, serving

schemathesis = pytest.importorskip("schemathesis", reason="the development extra is not installed")

EXAMPLES = 15  # of each operation, beside the boundary values
TOKENS = 4


@contextlib.contextmanager
def listening(artifacts: Artifacts) -> Iterator[str]:
    """The application on a socket, in a thread of this process; yields its address."""
    listener = listen("127.0.0.1", 0)
    up, server = threading.Event(), None

    async def run() -> None:
        nonlocal server
        async with serving(artifacts, ("safety", "tone")) as served:
            server = uvicorn.Server(uvicorn.Config(served.app, lifespan="off", log_config=None, access_log=False))
            listener.listen()  # connections queue from here on
            up.set()
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert up.wait(60)
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address(artifacts: Artifacts) -> Iterator[str]:
    with listening(artifacts) as address:
        yield address


def description() -> dict[str, Any]:
    """`/openapi.json`, without an engine: the tests' names are needed before there is one."""
    app = FastAPI()
    for module in MODULES:
        app.include_router(module.router)
    describe(app)
    return app.openapi()


schema = schemathesis.openapi.from_dict(description())
schema.config.checks.update(
    excluded_check_names=[
        "positive_data_acceptance",  # what a body means is not all in its schema: no such model, too long a prompt
        "negative_data_rejection",  # null is taken for absent everywhere, as many clients send it
    ]
)


chances: dict[str, random.Random] = {}  # one for each operation, so that none depends on how many others there are


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Requests that are short, and mostly of what there is: else nearly all would end at their model's name."""
    chance = chances.setdefault(case.operation.label, random.Random(0))
    if case.path_parameters and chance.random() < 0.5:
        case.path_parameters = {name: {"model": "tiny"}.get(name, "safety") for name in case.path_parameters}
    body = case.body
    if not isinstance(body, dict) or not {"messages", "prompt", "input"} & set(body):
        return
    if isinstance(body.get("model"), str) and chance.random() < 0.9:
        body["model"] = chance.choice(["tiny", "tiny:tone", "tiny:unsteered"])
    if isinstance(body.get("n"), int) and body["n"] > 3:
        body["n"] = chance.choice([3, 100])
    if "input" in body:
        body["max_output_tokens"] = TOKENS
        if chance.random() < 0.9:
            body.pop("previous_response_id", None)  # there is none such
            body.pop("tool_choice", None)  # it must name a tool that is there
        if isinstance(body.get("stream"), bool | None):
            body["stream"] = chance.choice([True, False])
    limit = body.get("max_tokens")
    if case.path.endswith("completions") and (limit is None or (isinstance(limit, int) and limit > TOKENS)):
        body["max_tokens"] = TOKENS
        if body.get("stream") in (None, False) and chance.random() < 0.5:
            body["stream"] = True
    if chance.random() < 0.7:
        body.pop("best_of", None)  # it must equal n, and seldom does by chance


@schemathesis.deserializer("text/event-stream")
def events_of(context, response) -> list[Any]:
    """Each of them is held against the schema by itself; the end mark is no event."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    if not response.text.startswith("event: "):  # Responses end with an event of their own
        assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


seen: set[tuple[str, int, str]] = set()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_operation(case, address) -> None:
    response = case.call_and_validate(base_url=address)
    kind = response.headers.get("content-type", [""])[0].partition(";")[0]
    seen.add((case.operation.label, response.status_code, kind))
    if response.status_code == 200 and case.path == "/v1/responses":
        if kind == "text/event-stream":
            for event in events_of(None, response):
                openai_types.valid_event(event)
        else:
            openai_types.valid(openai.types.responses.Response, response.json())
    elif response.status_code == 200 and kind == "text/event-stream":
        name = "ChatCompletionChunk" if "chat" in case.path else "Completion"
        openai_schema.stream_conforms(name, response.text, case.body)
    elif response.status_code >= 400:
        openai_schema.conforms("Error", response.json())


def test_the_fuzzing_got_somewhere(request: pytest.FixtureRequest) -> None:
    """Both sorts of answers, and refusals for the reasons that a client can give."""
    if not any(item.name.startswith("test_every_operation") for item in request.session.items):
        pytest.skip("the fuzzing is not selected in this run")
    completions = {item[1:] for item in seen if item[0].endswith("completions")}
    assert completions >= {(200, "application/json"), (200, "text/event-stream")}
    assert completions >= {(status, "application/json") for status in (400, 405, 415)}
    assert {item[1] for item in seen if item[0] == "POST /v1/responses"} >= {200, 400}
    for label in ("GET /v1/models/{model}", "GET /v1/steering/profiles/{name}", "POST /v1/steering/score"):
        assert (label, 200, "application/json") in seen


def test_what_is_fuzzed_is_what_is_served(address) -> None:
    served = httpx.get(f"{address}/openapi.json").json()
    for part in ("paths", "components"):
        assert served[part] == description()[part]


def test_the_description_names_every_status_and_nothing_undefined() -> None:
    text = json.dumps(description())
    defined = description()["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/([^\"]+)", text)) <= set(defined)
    for path, operations in description()["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert {"200", "405", "500"} <= statuses and not statuses & {"422", "499"}
            if path.startswith("/v1/"):
                assert "401" in statuses
                assert "503" in statuses or "requestBody" not in operation
            if "requestBody" in operation:
                assert {"400", "413", "415"} <= statuses
                assert "404" in statuses or path in ("/v1/steering/profiles/load", "/v1/steering/defaults")
            answer = operation["responses"]["200"]["content"]
            assert path == "/metrics" or path.endswith("/report") or answer["application/json"]["schema"]
