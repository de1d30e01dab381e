"""The Responses API without a model: events from hand-made parts, the store's bounds, messages for the template."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from openai.types.responses import Response

from server.answers.generation import TokenNote
from server.answers.parts import CallArguments, CallBegins, End, Part, Text
from server.answers.response_store import ResponseStore, StoredResponse
from server.answers.responses import ResponseWriter
from server.engine.base import TokenLogprobs
from server.errors import InternalError, InvalidRequestError
from server.wire.chat import TokenLogprob, TopLogprob
from server.wire.response_history import template_messages
from server.wire.response_objects import (
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseObject,
    ResponseUsage,
)
from tests.openai_types import valid, valid_event

FIELDS: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "model": "tiny",
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
}
USAGE = ResponseUsage(
    input_tokens=1,
    input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
    output_tokens=2,
    output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
    total_tokens=3,
)


def note(token_id: int) -> TokenNote:
    return TokenNote(token_id, TokenLogprobs(-0.5, ((token_id, -0.5),)), 0)


def to_logprobs(notes) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token=chr(n.token_id),
            logprob=-0.5,
            bytes=[n.token_id],
            top_logprobs=[TopLogprob(token=chr(n.token_id), logprob=-0.5, bytes=[n.token_id])],
        )
        for n in notes
    ]


def writer() -> ResponseWriter:
    numbers = itertools.count(1)
    return ResponseWriter(FIELDS, lambda prefix: f"{prefix}{next(numbers)}", to_logprobs)


def written(*parts: Part) -> tuple[list[dict], dict]:
    """The events of a whole response, each of them valid, and the response."""
    write = writer()
    events = write.begin()
    for part in parts:
        events += write.push(part)
    response, last = write.finish(USAGE)
    return told([*events, *last]), sent(response)


def told(events) -> list[dict]:
    plain = [sent(event) for event in events]
    for number, event in enumerate(plain):
        valid_event(event)
        assert event["sequence_number"] == number
    return plain


def sent(model) -> dict:
    return model.model_dump(exclude_unset=True)


def kinds(events: list[dict]) -> list[str]:
    """The events' types after the first two, without their common beginning."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    return [event["type"].removeprefix("response.") for event in events[2:]]


MESSAGE = ["output_item.added", "content_part.added"]
MESSAGE_END = ["output_text.done", "content_part.done", "output_item.done"]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
DELTA = ["output_text.delta"]


def test_text():
    events, response = written(Text(0, "Hel"), Text(0, "lo"), End(0, "stop"))
    assert kinds(events) == MESSAGE + DELTA * 2 + MESSAGE_END + ["completed"]
    added, part_added, first, second, text_done, part_done, done, completed = events[2:]
    assert added["item"] == {
        "id": "msg_1",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    assert part_added["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert (first["delta"], second["delta"], text_done["text"], part_done["part"]["text"]) == (
        *("Hel", "lo", "Hello", "Hello"),
    )
    assert {event["item_id"] for event in (part_added, first, second, text_done, part_done)} == {"msg_1"}
    assert {(event["output_index"], event["content_index"]) for event in (part_added, first, second)} == {(0, 0)}
    assert done["item"]["status"] == "completed"
    assert response["output"] == [done["item"]]
    assert completed["response"] == response
    assert (response["status"], response["usage"]["total_tokens"], response["incomplete_details"]) == (
        *("completed", 3, None),
    )
    assert response["completed_at"] is not None
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == [] and "usage" not in events[0]["response"], "none is known yet"
    valid(Response, response)


def test_two_calls():
    events, response = written(
        CallBegins(0, 0, "call_a", "f"),
        CallArguments(0, 0, '{"x":1}'),
        CallBegins(0, 1, "call_b", "g"),
        CallArguments(0, 1, "{"),
        CallArguments(0, 1, "}"),
        End(0, "tool_calls"),
    )
    second = [CALL[0], CALL[1], *CALL[1:]]
    assert kinds(events) == CALL + second + ["completed"]
    assert [event["output_index"] for event in events[2:-1]] == [0] * 4 + [1] * 5
    added, delta, done, item_done = events[2:6]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert (delta["delta"], done["arguments"], delta["item_id"], done["item_id"]) == (
        '{"x":1}',
        '{"x":1}',
        *["fc_1"] * 2,
    )
    assert item_done["item"] == {
        "id": "fc_1",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_a",
        "name": "f",
        "arguments": '{"x":1}',
    }
    assert [(item["id"], item["call_id"], item["arguments"]) for item in response["output"]] == [
        ("fc_1", "call_a", '{"x":1}'),
        ("fc_2", "call_b", "{}"),
    ]
    assert response["status"] == "completed"


def test_text_then_call_then_text():
    events, response = written(
        Text(0, "a"), CallBegins(0, 0, "call_a", "f"), CallArguments(0, 0, "{}"), Text(0, "b"), End(0, "tool_calls")
    )
    assert kinds(events) == [*MESSAGE, *DELTA, *MESSAGE_END, *CALL, *MESSAGE, *DELTA, *MESSAGE_END, "completed"]
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "message"]
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 6 + [1] * 4 + [2] * 6


def test_a_call_without_arguments_is_whole():
    events, response = written(CallBegins(0, 0, "call_a", "f"), End(0, "tool_calls"))
    assert kinds(events) == [CALL[0], *CALL[2:], "completed"]
    assert response["output"][0]["arguments"] == ""


@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([Text(0, "Hel")], ["incomplete"]),
        ([Text(0, "a"), CallBegins(0, 0, "call_a", "f"), CallArguments(0, 0, '{"x')], ["completed", "incomplete"]),
    ],
)
def test_length(parts, statuses):
    events, response = written(*parts, End(0, "length"))
    assert events[-1]["type"] == "response.incomplete"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == statuses
    assert response["completed_at"] is None
    assert response["usage"]["output_tokens"] == 2


def test_silence_is_an_empty_message():
    events, response = written(End(0, "stop"))
    assert kinds(events) == MESSAGE + MESSAGE_END + ["completed"]
    assert response["output"][0]["content"][0]["text"] == ""


def test_logprobs_of_text_and_none_of_calls():
    events, response = written(
        Text(0, "", (note(97),)),  # half of a character: its text comes with the next token
        Text(0, "ab", (note(98),)),
        Text(0, "", (note(60),)),  # the call's opening tag
        CallBegins(0, 0, "call_a", "f"),
        Text(0, "", (note(61),)),
        CallArguments(0, 0, "{}"),
        Text(0, "", (note(62),)),
        Text(0, "c", (note(99),)),
        Text(0, "", (note(100),)),
        End(0, "stop"),
    )
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [(event["delta"], "".join(entry["token"] for entry in event["logprobs"])) for event in deltas] == [
        *(("ab", "ab"), ("c", "c"), ("", "d")),
    ]
    assert deltas[0]["logprobs"][0] == {
        "token": "a",
        "logprob": -0.5,
        "top_logprobs": [{"token": "a", "logprob": -0.5}],
    }
    texts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert ["".join(entry["token"] for entry in text["logprobs"]) for text in texts] == ["ab", "cd"]
    assert texts[0]["logprobs"][0]["bytes"] == [97]
    dones = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
    assert ["".join(entry["token"] for entry in entries) for entries in dones] == ["ab", "cd"]


@pytest.mark.parametrize(
    ("parts", "output"),
    [
        ([], []),
        ([Text(0, "Hel")], [("message", "incomplete")]),
        ([Text(0, "a"), CallBegins(0, 0, "call_a", "f")], [("message", "completed"), ("function_call", "incomplete")]),
    ],
)
def test_failure_keeps_what_there_is(parts, output):
    write = writer()
    events = write.begin()
    for part in parts:
        events += write.push(part)
    response, last = write.fail(InternalError("It broke.", code="non_finite"))
    error, failed = told([*events, *last])[-2:]
    assert (error["type"], error["code"], error["message"], error["param"]) == (
        "error",
        "non_finite",
        "It broke.",
        None,
    )
    assert (failed["type"], failed["response"]) == ("response.failed", sent(response))
    assert failed["response"]["error"] == {"code": "server_error", "message": "It broke."}
    assert [(item["type"], item["status"]) for item in failed["response"]["output"]] == output


def stored(number: int, text: str = "x", previous: StoredResponse | None = None) -> StoredResponse:
    part = OutputText(type="output_text", text=text, annotations=[], logprobs=[])
    item = OutputMessage(id=f"msg_out{number}", type="message", status="completed", role="assistant", content=[part])
    response = ResponseObject.model_construct(id=f"resp_{number}", output=[item])
    return StoredResponse.of(response, [{"id": f"msg_in{number}", "type": "message"}], previous)


def ids(items) -> list[str]:
    return [item["id"] for item in items]


def test_store_counts_and_forgets_what_was_used_least():
    store = ResponseStore(max_responses=2)
    for number in (1, 2):
        store.put(stored(number))
    assert store.get("resp_1") is not None
    store.put(stored(3))
    assert [store.get(f"resp_{n}") is not None for n in (1, 2, 3)] == [True, False, True]
    assert (store.item("msg_out2"), store.item("msg_in2")) == (None, None)
    assert store.item("msg_out3")["content"][0]["text"] == "x"


def test_a_reference_counts_as_use():
    store = ResponseStore(max_responses=2)
    for number in (1, 2):
        store.put(stored(number))
    assert store.item("msg_in1") == {"id": "msg_in1", "type": "message"}
    store.put(stored(3))
    assert [store.get(f"resp_{n}") is not None for n in (1, 2, 3)] == [True, False, True]


def test_store_is_bounded_in_bytes():
    one = stored(1, "y" * 1000)
    assert 1000 < one.num_bytes < 1500
    store = ResponseStore(max_bytes=3 * one.num_bytes)
    for number in range(1, 9):
        store.put(stored(number, "y" * 1000))
        assert store.num_bytes <= 3 * one.num_bytes
    assert (len(store), store.num_items) == (3, 6)
    store.put(stored(9, "y" * 5000))
    assert store.get("resp_9") is None and len(store) == 3
    for number in (6, 7, 8):
        assert store.delete(f"resp_{number}")
    assert (len(store), store.num_bytes, store.num_items, store.delete("resp_8")) == (0, 0, 0, False)


def test_a_store_of_no_bytes_keeps_nothing():
    store = ResponseStore(max_bytes=0)
    store.put(stored(1))
    assert len(store) == 0


def test_a_chain_outlives_what_it_continues_and_counts_it():
    store = ResponseStore()
    first = stored(1)
    second = stored(2, previous=first)
    third = stored(3, previous=second)
    for response in (first, second, third):
        store.put(response)
    assert third.num_bytes == 3 * first.num_bytes
    store.delete("resp_1")
    found = store.get("resp_3")
    assert ids(found.items()) == ["msg_in1", "msg_out1", "msg_in2", "msg_out2", "msg_in3", "msg_out3"]
    assert ids(found.input_items()) == ids(found.items())[:-1]
    assert store.item("msg_out1") is None


def message(role: str, *texts: str) -> dict:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


def call(call_id: str, name: str = "f", arguments: str = "{}") -> dict:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id: str, text: str = "42") -> dict:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def test_instructions_and_leading_system_messages_are_one():
    items = [message("developer", "B"), message("system", "C"), message("user", "D", "E"), message("developer", "F")]
    assert template_messages("A", items) == (
        {"role": "system", "content": "A\n\nB\n\nC"},
        {"role": "user", "content": "D\nE"},
        {"role": "system", "content": "F"},
    )
    assert template_messages(None, items[:1]) == ({"role": "system", "content": "B"},)


def test_calls_are_one_message_with_the_text_before_them():
    items = [
        message("user", "Q"),
        message("assistant", "Let me see."),
        call("a", "f", '{"x": 1}'),
        call("b", "g", ""),
        output("b", "2"),
        output("a", "1"),
        call("c"),
        output("c"),
    ]
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert template_messages(None, items) == (
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [made, {"id": "b", "type": "function", "function": {"name": "g", "arguments": {}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "b", "name": "g"},
        {"role": "tool", "content": "1", "tool_call_id": "a", "name": "f"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c", "name": "f"},
    )


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ([call("a")], "No tool output found for function call a."),
        ([output("a")], "No tool call found for function call output with call_id a."),
        ([call("a"), output("a"), output("a")], "No tool call found for function call output with call_id a."),
        ([call("a", arguments="{x"), output("a")], "arguments of function call a are not a JSON object"),
        ([call("a", arguments="[1]"), output("a")], "arguments of function call a are not a JSON object"),
    ],
)
def test_calls_and_outputs_that_do_not_fit(items, sentence):
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        template_messages(None, items)
    assert caught.value.param == "input"
