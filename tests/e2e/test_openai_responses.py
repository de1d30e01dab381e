"""The official client's Responses API, synchronous and asynchronous, against the real process."""

from __future__ import annotations

from typing import Annotated, Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response

from tests.checkpoint import CALM, FIRING
from tests.openai_types import valid, valid_event

GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def ending(oracle):
    """A stop string that ends the plain answer to CALM[1], so that it is completed, and what it leaves."""
    plain = oracle.plain(CALM[1])
    stop = plain[4:6]
    return stop, plain[: plain.index(stop)]


def like(response: Response) -> dict:
    """What two runs of one request have in common."""
    sent = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        sent.pop(name)
    for item in sent["output"]:
        item.pop("id")
        for part in item["content"]:
            part.pop("parsed", None)  # the client's own
    return sent


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
def test_create(client, oracle, text):
    response = client.responses.create(input=text, **GREEDY)
    fired = text in FIRING
    assert response.output_text == (oracle.steered_by_all(text) if fired else oracle.plain(text))
    assert response.steering["applied"] is fired
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    valid(Response, response.to_dict())


async def test_async(address, oracle):
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        response = await client.responses.create(input=FIRING[1], **GREEDY)
        assert response.output_text == oracle.steered_by_all(FIRING[1])
        stream = await client.responses.create(input=FIRING[1], stream=True, **GREEDY)
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == oracle.steered_by_all(FIRING[1])


def test_every_event_of_a_stream(client, ending):
    stop, text = ending
    stream = client.responses.create(input=CALM[1], stream=True, extra_body={"stop": stop}, **GREEDY)
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        valid_event(event.to_dict())
    assert [event.type for event in events if event.type != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[-1].response.output_text == text
    assert events[0].response.steering == events[-1].response.steering


def test_the_stream_helpers_final_response_is_the_whole_one(client, ending):
    stop, text = ending
    extra = {"stop": stop}
    whole = client.responses.create(input=CALM[1], extra_body=extra, **GREEDY)
    with client.responses.stream(input=CALM[1], extra_body=extra, **GREEDY) as stream:
        snapshot = ""
        for event in stream:
            if event.type == "response.output_text.delta":
                snapshot = event.snapshot
        final = stream.get_final_response()
    assert final.output_text == snapshot == text
    assert like(final) == like(whole)
    assert final.steering["reason"] == "gate_closed"


def test_logprobs(client):
    response = client.responses.create(
        input=CALM[0], include=["message.output_text.logprobs"], top_logprobs=2, **GREEDY
    )
    entries = response.output[0].content[0].logprobs
    assert len(entries) == 12
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)


def test_turns(client):
    first = client.responses.create(input=CALM[0], **GREEDY)
    second = client.responses.create(input=FIRING[0], previous_response_id=first.id, **GREEDY)
    turns = [{"role": "user", "content": CALM[0]}, *first.output, {"role": "user", "content": FIRING[0]}]
    alone = client.responses.create(input=turns, **GREEDY)
    assert second.output_text == alone.output_text
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert items[1].id == first.output[0].id


class Trip(pydantic.BaseModel):
    """Where to go, and for how long."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Bern", "Basel"]
    days: Annotated[int, pydantic.Field(ge=1, le=9)]


SAMPLED = {"model": "tiny", "temperature": 1, "max_output_tokens": 400}


def test_parsed_text(client):
    response = client.responses.parse(input=FIRING[0], text_format=Trip, extra_body={"seed": 1}, **SAMPLED)
    assert isinstance(response.output_parsed, Trip)
    with client.responses.stream(input=FIRING[0], text_format=Trip, extra_body={"seed": 1}, **SAMPLED) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_the_tools_loop(client):
    """A streamed call, its output, an answer; the call's arguments parsed by the client."""
    tools = [openai.pydantic_function_tool(Trip, name="plan_trip")["function"] | {"type": "function"}]
    asked = {"tools": tools, "parallel_tool_calls": False, "extra_body": {"seed": 2}, **SAMPLED}
    with client.responses.stream(input="Plan a trip.", tool_choice="required", **asked) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    [call] = first.output
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == call.arguments
    assert Trip.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Booked."}
    second = client.responses.create(input=[output], previous_response_id=first.id, tool_choice="none", **asked)
    assert second.output[0].type == "message"
    items = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
    valid(Response, second.to_dict())


def test_retrieve_delete_cancel(client):
    response = client.responses.create(input=CALM[0], **GREEDY)
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id):
        client.responses.retrieve(response.id)


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input=CALM[0], tools=[{"type": "web_search"}], **GREEDY)
    assert (caught.value.param, caught.value.code) == ("tools[0].type", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input=CALM[0], previous_response_id="resp_x", stream=True, **GREEDY)
    assert caught.value.code == "previous_response_not_found"
