"""instructor: a model's fields from any model, in each of its modes for OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.asked import ADA, HARMFUL, HARMLESS, Person, Pick, said
from tests.clients.servers import Server

instructor = pytest.importorskip("instructor", reason="instructor is not installed")

FORCED = {"model": "demo", "temperature": 0, "max_tokens": 200, "max_retries": 0}


def patched(client: openai.OpenAI, mode: str) -> Any:
    return instructor.from_openai(client, mode=getattr(instructor.Mode, mode))


@pytest.mark.parametrize("question", [HARMFUL, HARMLESS])
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_a_model_that_knows_nothing_of_it(client: openai.OpenAI, mode: str, question: str) -> None:
    """The grammar makes the demo's answer a `Pick` at the first try."""
    if mode == "RESPONSES_TOOLS":  # that mode has its own name for the limit
        fields = {key: value for key, value in FORCED.items() if key != "max_tokens"} | {"max_output_tokens": 200}
    else:
        fields = FORCED
    found = patched(client, mode).chat.completions.create(messages=said(question), response_model=Pick, **fields)
    assert isinstance(found, Pick)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "MD_JSON", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_what_the_model_says_is_read(clever: openai.OpenAI, mode: str) -> None:
    found = patched(clever, mode).chat.completions.create(
        model="scripted", messages=said("Who is Ada?"), response_model=Person, max_retries=0
    )
    assert found.model_dump() == ADA.model_dump()  # instructor makes a class of its own


def test_in_stream(clever: openai.OpenAI) -> None:
    """Fields fill up as tokens come."""
    states = list(
        patched(clever, "TOOLS").chat.completions.create_partial(
            model="scripted", messages=said("Who is Ada?"), response_model=Person, max_retries=0
        )
    )
    assert (states[-1].name, states[-1].age) == ("Ada", 36)
    assert len(states) > 2


def test_several_at_once(clever: openai.OpenAI) -> None:
    class get_weather(BaseModel):
        city: str

    found = patched(clever, "PARALLEL_TOOLS").chat.completions.create(
        model="scripted",
        messages=said("What is the weather in Paris and Oslo?"),
        response_model=Iterable[get_weather],
        max_retries=0,
    )
    assert [item.city for item in found] == ["Paris", "Oslo"]


async def test_async(demo: Server) -> None:
    async with openai.AsyncOpenAI(base_url=demo.url, api_key="unused", max_retries=0) as client:
        wrapped = instructor.from_openai(client)
        found = await wrapped.chat.completions.create(messages=said(HARMLESS), response_model=Pick, **FORCED)
    assert isinstance(found, Pick)
