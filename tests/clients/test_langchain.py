"""LangChain's own standard suite for chat models, over chat completions and over the Responses API.

The suite asks for exact calls and answers, so it runs on the scripted model.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.clients.asked import HARMFUL
from tests.clients.servers import Server

langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
suite = pytest.importorskip("langchain_tests.integration_tests", reason="langchain-tests is not installed")


class Suite(suite.ChatModelIntegrationTests):
    """What both APIs share: what the suite may ask for."""

    params: dict[str, Any]

    @pytest.fixture(autouse=True)
    def _on_the_scripted_server(self, scripted: Server) -> None:
        self.server = scripted

    @property
    def chat_model_class(self) -> type:
        return langchain_openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self.params | {
            "model": self.server.model,
            "base_url": self.server.url,
            "api_key": "unused",
            "temperature": 0,
            "max_retries": 0,
            "stream_usage": True,
            # LangChain keeps one asynchronous client for each address, and each test has an event loop of its own.
            "http_async_client": httpx.AsyncClient(),
        }

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return f"{self.server.model}:unsteered"

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def enable_vcr_tests(self) -> bool:
        return False


class TestChatCompletions(Suite):
    params = {"max_tokens": 200}  # noqa: RUF012


class TestResponses(Suite):
    params = {"use_responses_api": True, "max_tokens": 200}  # noqa: RUF012


def test_steering_by_field_by_header_and_by_name(demo: Server) -> None:
    """Three ways to the plain model from a client that knows nothing of steering."""
    common = {"base_url": demo.url, "api_key": "unused", "temperature": 0, "max_tokens": 16, "max_retries": 0}
    ways = [
        {"model": "demo"},
        {"model": "demo:unsteered"},
        {"model": "demo", "extra_body": {"steer_strength": 0}},
        {"model": "demo", "default_headers": {"X-FineSteer-Strength": "0"}},
    ]
    steered, *plain = [langchain_openai.ChatOpenAI(**common, **way).invoke(HARMFUL).text for way in ways]
    assert len(set(plain)) == 1
    assert steered not in plain


def test_a_conversation_is_remembered_by_the_server(scripted: Server) -> None:
    model = langchain_openai.ChatOpenAI(
        model=scripted.model,
        base_url=scripted.url,
        api_key="unused",
        max_retries=0,
        use_responses_api=True,
        use_previous_response_id=True,
    )
    first = ("user", "Hello, I am Ada.")
    answer = model.invoke([first])
    assert model.invoke([first, answer, ("user", "What did I say first?")]).text == "You said: Hello, I am Ada."


def test_text_completions(demo: Server) -> None:
    common = {"base_url": demo.url, "api_key": "unused", "temperature": 0, "max_tokens": 8, "max_retries": 0}
    model = langchain_openai.OpenAI(model=demo.model, **common)
    whole = model.invoke("The cat")
    assert whole and "".join(model.stream("The cat")) == whole


def test_the_suite_would_see_a_wrong_answer(scripted: Server) -> None:
    """The negative control: the same check against a question that the script answers with other arguments."""
    model = langchain_openai.ChatOpenAI(model=scripted.model, base_url=scripted.url, api_key="unused", max_retries=0)
    tool = {"name": "my_adder_tool", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    message = model.bind_tools([tool], tool_choice="any").invoke("What is 3 + 4")
    with pytest.raises(AssertionError):
        suite.chat_models._validate_tool_call_message(message)
