"""Wire models and the parser, without a server."""

from __future__ import annotations

import json

import pytest

from server.errors import ApiError, InvalidRequestError
from server.wire.base import Unsupported
from server.wire.chat import ChatCompletionRequest
from server.wire.completions import CompletionRequest
from server.wire.parsing import field_path, merge_extra_body, parse_body
from server.wire.steering import SteeringFields, steering_report
from server.wire.template import RESERVED
from steering.decision import ProfileActivation, SteeringOptions, combine, decide_profile

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def parse(kind, /, **fields):
    return parse_body(kind, json.dumps(fields).encode())


def test_every_field_of_openais_chat_request_is_either_read_or_refused_by_its_own_words():
    """So that none of them is ever called an unknown field, let alone ignored."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    ours = set(ChatCompletionRequest.model_fields) | set(ChatCompletionRequest.unsupported)
    assert set(CompletionCreateParamsBase.__annotations__) - ours == set()


def test_every_field_of_openais_text_request_likewise():
    from openai.types.completion_create_params import CompletionCreateParamsBase

    ours = set(CompletionRequest.model_fields) | set(CompletionRequest.unsupported)
    assert set(CompletionCreateParamsBase.__annotations__) - ours == set()


def test_nothing_is_both_read_and_refused():
    for model in (ChatCompletionRequest, CompletionRequest):
        assert not set(model.model_fields) & set(model.unsupported)


@pytest.mark.parametrize(
    ("value", "allowed"), [(None, True), (False, True), (0, False), ([], True), ([1], False), ("", False)]
)
def test_neutral_values_are_equal_in_type_too(value, allowed):
    assert Unsupported("", (False, [])).allows(value) is allowed


def test_field_paths():
    assert field_path(("messages", 0, "content")) == "messages[0].content"
    assert field_path(()) == ""


def test_extra_body_is_lifted():
    assert merge_extra_body({"a": 1, "extra_body": {"b": 2, "a": 1}}) == {"a": 1, "b": 2}
    assert merge_extra_body({"a": 1, "extra_body": None}) == {"a": 1}
    with pytest.raises(InvalidRequestError) as caught:
        merge_extra_body({"a": 1, "extra_body": {"a": 2}})
    assert caught.value.param == "a"


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ([[1], "b"], ((1,), "b")),
    ],
)
def test_prompts_of_all_shapes(prompt, parsed):
    assert parse(CompletionRequest, model="m", prompt=prompt).prompt == parsed


@pytest.mark.parametrize("prompt", [[], [[]], [True], [-1], [1.5], {"a": 1}, 3, [["a"]]])
def test_prompts_of_no_shape(prompt):
    with pytest.raises(InvalidRequestError) as caught:
        parse(CompletionRequest, model="m", prompt=prompt)
    assert caught.value.param == "prompt"


def test_no_template_option_can_take_the_place_of_what_the_server_sets():
    import inspect

    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}
    taken |= set(ImmutableSandboxedEnvironment().globals) | {"raise_exception", "strftime_now"}
    taken |= set(PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES)
    assert taken - RESERVED == set()
    for name in RESERVED:
        with pytest.raises(InvalidRequestError, match=f"must not hold '{name}'"):
            parse(ChatCompletionRequest, **CHAT, chat_template_kwargs={name: 1})
    free = {"enable_thinking": False, "reasoning": {"effort": 1}}
    asked = parse(ChatCompletionRequest, **CHAT, chat_template_kwargs=free)
    assert asked.conversation().template_options == free


def test_an_echo_costs_log_probabilities_only_where_they_are_shown():
    def wanted(**fields):
        return parse(CompletionRequest, model="m", prompt="x", **fields).num_prompt_logprobs

    assert wanted() is wanted(echo=True) is wanted(logprobs=3) is None
    assert (wanted(echo=True, logprobs=0), wanted(echo=True, logprobs=3)) == (0, 3)
    assert (wanted(prompt_logprobs=2), wanted(prompt_logprobs=2, echo=True, logprobs=1)) == (2, 2)


def test_numbers_keep_their_kind():
    asked = parse(ChatCompletionRequest, **CHAT, steer_strength=4, temperature=1, logit_bias={"7": -3}, stop="a")
    assert (asked.steer_strength, asked.temperature, asked.logit_bias, asked.stop) == (4.0, 1.0, {7: -3.0}, ("a",))
    assert parse(SteeringFields, steer_strength={"a": 1}).steer_strength == {"a": 1.0}
    assert parse(ChatCompletionRequest, **CHAT).stop == ()


def test_an_error_is_openais():
    error = InvalidRequestError("no", param="p", code="c")
    assert json.loads(error.to_json()) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "p", "code": "c"}
    }
    assert ApiError("x").body()["error"]["code"] is None


def decision(gate=0.5, ratio=0.123456789, routing=(0.25, 0.75)):
    activation = ProfileActivation("p", 2.0, "request")
    made = decide_profile(
        activation,
        version="v",
        method="finesteer",
        layer=3,
        gate=gate,
        vector_norm=1.5,
        state_norm=3.0,
        energy_ratio=ratio,
        threshold=0.4,
        tail=0.05,
        routing=routing,
        residual_norm=0.5,
    )
    return combine(SteeringOptions((activation,)), (made,), compute_ms=1.23456789)


def test_the_steering_object():
    assert json.loads(steering_report(decision(), "summary").to_json()) == {
        "applied": True,
        "reason": "gate_open",
        "profiles": [
            {
                "name": "p",
                "version": "v",
                "method": "finesteer",
                "layer": 3,
                "positions": "all",
                "fired": True,
                "gate": 0.5,
                "energy_ratio": 0.123457,
                "threshold": 0.4,
                "strength": 2.0,
                "strength_source": "request",
                "relative_norm": 0.5,
            }
        ],
    }
    full = json.loads(steering_report(decision(), "full").to_json())
    assert full["compute_ms"] == 1.23457
    added = {name: full["profiles"][0][name] for name in ("routing", "residual_norm", "vector_norm", "tail")}
    assert added == {"routing": [0.25, 0.75], "residual_norm": 0.5, "vector_norm": 1.5, "tail": 0.05}
    assert steering_report(decision(), "none") is None


def test_what_json_cannot_hold_becomes_null():
    report = json.loads(
        steering_report(decision(gate=float("nan"), ratio=float("inf"), routing=None), "full").to_json()
    )
    assert report["reason"] == "non_finite"
    assert (report["profiles"][0]["energy_ratio"], report["profiles"][0]["routing"]) == (None, None)
