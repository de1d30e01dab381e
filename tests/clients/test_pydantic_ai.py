"""pydantic-ai: agents with outputs and tools, over chat completions and over the Responses API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.clients.asked import ADA, HARMFUL, HARMLESS, Person, Pick, get_weather
from tests.clients.servers import Server

pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
models = pytest.importorskip("pydantic_ai.models.openai", reason="pydantic-ai-slim[openai] is not installed")
providers = pytest.importorskip("pydantic_ai.providers.openai")

APIS = [models.OpenAIChatModel, models.OpenAIResponsesModel]
OUTPUTS = [pydantic_ai.ToolOutput, pydantic_ai.NativeOutput]
SETTINGS = {"max_tokens": 200, "temperature": 0.0}


@pytest.fixture(params=APIS, ids=["chat", "responses"])
async def on(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """server → a model of pydantic-ai there; made within the test's event loop."""
    clients = []

    def made(server: Server) -> Any:
        clients.append(openai.AsyncOpenAI(base_url=server.url, api_key="unused", max_retries=0))
        return request.param(server.model, provider=providers.OpenAIProvider(openai_client=clients[-1]))

    yield made
    for client in clients:
        await client.close()


async def test_text_whole_and_streamed(on: Any, demo: Server) -> None:
    agent = pydantic_ai.Agent(on(demo), model_settings=SETTINGS | {"max_tokens": 16})
    whole = await agent.run(HARMFUL)
    assert whole.output and whole.usage.output_tokens <= 16
    async with agent.run_stream(HARMFUL) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces).strip() == whole.output.strip()
    assert len(pieces) > 1


@pytest.mark.parametrize("question", [HARMFUL, HARMLESS])
@pytest.mark.parametrize("output", OUTPUTS)
async def test_outputs_hold_for_any_model(on: Any, demo: Server, output: Any, question: str) -> None:
    agent = pydantic_ai.Agent(on(demo), output_type=output(Pick), model_settings=SETTINGS, retries=0)
    settings = {"parallel_tool_calls": False}
    assert isinstance((await agent.run(question, model_settings=settings)).output, Pick)


@pytest.mark.parametrize("output", [*OUTPUTS, pydantic_ai.PromptedOutput])
async def test_outputs_are_the_models_own(on: Any, scripted: Server, output: Any) -> None:
    agent = pydantic_ai.Agent(on(scripted), output_type=output(Person), retries=0)
    assert (await agent.run("Who is Ada?")).output == ADA


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_uses_tools(on: Any, scripted: Server, stream: bool) -> None:
    """It calls twice, is told, and answers."""
    agent = pydantic_ai.Agent(on(scripted), tools=[get_weather], instructions="Be brief.", retries=0)
    question = "What is the weather in Paris and Oslo?"
    if stream:
        async with agent.run_stream(question) as running:
            output = await running.get_output()
    else:
        output = (await agent.run(question)).output
    assert output == "The tools say: 12 degrees in Paris; 12 degrees in Oslo"


async def test_instructions_reach_the_model(on: Any, scripted: Server) -> None:
    agent = pydantic_ai.Agent(on(scripted), instructions="Be brief.")
    assert (await agent.run("What were you told?")).output == "I was told: Be brief."


async def test_steering_goes_with_a_request(on: Any, demo: Server) -> None:
    agent = pydantic_ai.Agent(on(demo), model_settings=SETTINGS)
    steered = (await agent.run(HARMFUL)).output
    plain = (await agent.run(HARMFUL, model_settings={"extra_body": {"steer_strength": 0}})).output
    assert steered != plain
