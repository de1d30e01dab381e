"""What every engine promises of grammars: that an answer spells what it must, and ends where nothing may follow."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.grammar.compiler import GrammarCompiler
from server.prompting.vocabulary import Vocabulary
from tests.contract.asking import answer, collect, request, tokens
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="session")
WORDS = ("fox", "dog", "vector")


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(tiny_tokenizer())


@pytest.fixture
def compiler(vocabulary):
    compiler = GrammarCompiler(vocabulary, {3}, VOCAB_SIZE)
    yield compiler
    compiler.close()


async def word(compiler):
    schema = {"type": "object", "properties": {"a": {"enum": WORDS}}, "required": ["a"], "additionalProperties": False}
    return await compiler.json_schema(schema, strict=True, what="schema", param="response_format")


def spelt(vocabulary, events, index=0):
    return b"".join(vocabulary.text_bytes(token) for token in tokens(events, index) if token != 3).decode()


async def test_every_completion_spells_what_the_grammar_says(engine, compiler, vocabulary):
    """Beside one that may say anything, and steered."""
    free = asyncio.create_task(answer(engine, request("free", max_tokens=50)))
    options = {"grammar": await word(compiler), "max_tokens": 50, "stop_token_ids": frozenset({3})}
    for sampling in ({}, {"temperature": 1.5, "seed": 7}):
        events = await collect(engine, request("bound", n=3, **options, **sampling))
        for index in range(3):
            assert json.loads(spelt(vocabulary, events, index))["a"] in WORDS
            assert [e.finish_reason for e in events if e.index == index][-1] == "stop"
        assert events[0].decision.applied
    assert len(await free) == 50


async def test_a_grammar_wins_over_biases(engine, compiler, vocabulary):
    greedy = await answer(engine, request("free"))
    options = {"grammar": await word(compiler), "max_tokens": 50, "stop_token_ids": frozenset({3})}
    events = await collect(engine, request("bound", logit_bias={greedy[0]: 100.0, 3: 100.0}, **options))
    assert json.loads(spelt(vocabulary, events))["a"] in WORDS


async def test_a_grammar_that_is_not_over_ends_by_length(engine, compiler):
    events = await collect(engine, request("short", grammar=await word(compiler), max_tokens=3))
    assert len(events) == 3 and events[-1].finish_reason == "length"
