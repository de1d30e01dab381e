"""The compiler: every walk through a schema's grammar validates, and each grammar is compiled once."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import jsonschema
import pytest

from server.conversation import TextFormat
from server.engine.base import GenerationError
from server.errors import InvalidRequestError
from server.grammar import compiler as module
from tests.grammars import allowed, byte_level, compiler_for, pieces, spelt, walk

SMALL = {"type": "integer", "minimum": -20, "maximum": 300}
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": SMALL,
            "tags": {"type": "array", "items": {"enum": ["a", "bé", '"']}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "a tree": {
        "$defs": {
            "leaf": {"type": "boolean"},
            "node": {
                "type": "object",
                "properties": {"l": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"}]}},
                "required": ["l"],
                "additionalProperties": False,
            },
        },
        "$ref": "#/$defs/node",
    },
    "a union": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "v": SMALL}, "required": ["k", "v"], "additionalProperties": False},
            {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"], "additionalProperties": False},
        ]
    },
    "numbers": {"type": "array", "items": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700}, "minItems": 2, "maxItems": 2},
    "formats": {"type": "array", "prefixItems": [{"type": "string", "format": "date"}, {"type": ["null", "boolean"]}], "items": False, "minItems": 2},
    "both": {"allOf": [{"type": "string", "pattern": "^[a-f]+$"}, {"maxLength": 5, "minLength": 2}]},
}  # fmt: skip


async def schema_grammar(compiler, schema, *, strict=True):
    return await compiler.json_schema(schema, strict=strict, what="the schema", param="p")


@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_random_walk_validates(name, make):
    tokenizer = make()
    grammar = await schema_grammar(compiler_for(tokenizer, padding=9), SCHEMAS[name])
    texts = {spelt(tokenizer, walk(grammar, seed)) for seed in range(25)}
    assert len(texts) > 5
    checker = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for text in texts:
        checker.validate(json.loads(text))
        outside_strings = re.sub(r'"(\\.|[^"\\])*"', "s", text)
        assert not re.search(r"  |\n {9}|\s\n|\t|\r", re.sub(r"\n {0,8}", "\n", outside_strings)), (
            "white space is bounded"
        )


async def test_a_walk_that_leaves_the_grammar_fails_by_name():
    tokenizer = byte_level()
    state = (await schema_grammar(compiler_for(tokenizer), SCHEMAS["person"])).begin()
    assert tokenizer.convert_tokens_to_ids("x") not in allowed(state.mask())
    with pytest.raises(GenerationError) as failure:
        state.accept(tokenizer.convert_tokens_to_ids("x"))
    assert failure.value.code == "grammar_failed"
    with pytest.raises(GenerationError):
        state.mask()


async def test_what_cannot_be_enforced_is_let_pass_where_it_is_not_strict():
    tokenizer = byte_level()
    compiler = compiler_for(tokenizer)
    unmet = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "maximum": 5, "minimum": 0, "not": {"const": 3}},
            "price": {"type": "string", "pattern": r"^(?!0)\d+$", "maxLength": 4},  # pydantic's decimals have such
        },
        "required": ["a", "price"],
        "additionalProperties": False,
    }
    with pytest.raises(InvalidRequestError):
        await schema_grammar(compiler, unmet)
    grammar = await schema_grammar(compiler, unmet, strict=False)
    for seed in range(5):
        found = json.loads(spelt(tokenizer, walk(grammar, seed)))
        assert set(found) == {"a", "price"} and 0 <= found["a"] <= 5 and len(found["price"]) <= 4


async def test_any_object_is_an_object_and_may_be_empty():
    tokenizer = byte_level()
    grammar = await compiler_for(tokenizer).text_format(TextFormat("json_object"))
    state = grammar.begin()
    for token in tokenizer.encode("{}", add_special_tokens=False):
        assert token in allowed(state.mask())
        state.accept(token)
    assert state.finished
    assert tokenizer.convert_tokens_to_ids("[") not in allowed(grammar.begin().mask())


async def test_text_formats():
    compiler = compiler_for(byte_level())
    assert await compiler.text_format(TextFormat()) is None
    assert await compiler.text_format(TextFormat("json_object")) is await compiler.text_format(
        TextFormat("json_object")
    )
    assert await compiler.text_format(TextFormat("json_schema", "x", SCHEMAS["person"], strict=True))
    assert await compiler.text_format(TextFormat("json_schema", "x"))
    bad = TextFormat("json_schema", "x", {"not": {}}, strict=True, param="text.format")
    with pytest.raises(InvalidRequestError, match="'x'") as refusal:
        await compiler.text_format(bad)
    assert refusal.value.param == "text.format"


async def test_a_schema_inside_a_lark_grammar_is_as_strict_as_by_itself():
    tokenizer = byte_level()
    compiler = compiler_for(tokenizer)
    inner = await compiler.embeddable(SCHEMAS["person"], strict=True, what="it", param="p")
    grammar = await compiler.lark(f'start: "<f>" arguments "</f>"\narguments: %json {inner}', what="it", param="p")
    for seed in range(10):
        text = spelt(tokenizer, walk(grammar, seed))
        assert text.startswith("<f>") and text.endswith("</f>")
        jsonschema.validate(json.loads(text[3:-4]), SCHEMAS["person"])
    with pytest.raises(InvalidRequestError):
        await compiler.embeddable({"not": {}}, strict=True, what="it", param="p")


async def test_a_lark_grammar_that_is_none_is_refused():
    with pytest.raises(
        InvalidRequestError, match=r'tools: the tools cannot be enforced: .*unknown name: "nothing"'
    ) as refusal:
        await compiler_for(byte_level()).lark("start: nothing", what="the tools", param="tools")
    assert (refusal.value.param, refusal.value.code) == ("tools", "invalid_grammar")


async def test_without_an_end_token_nothing_is_promised():
    tokenizer = byte_level()
    compiler = module.GrammarCompiler(compiler_for(tokenizer)._vocabulary, (), len(tokenizer))
    with pytest.raises(InvalidRequestError, match="no end-of-sequence token"):
        await compiler.text_format(TextFormat("json_object"))


async def test_each_grammar_is_compiled_once_whoever_asks(monkeypatch):
    made = []

    class Counted(module.CompiledGrammar):
        def __init__(self, *arguments):
            made.append(threading.current_thread().name)
            super().__init__(*arguments)

    monkeypatch.setattr(module, "CompiledGrammar", Counted)
    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    compiler = compiler_for(byte_level())
    asks = [schema_grammar(compiler, SCHEMAS["person"]) for _ in range(6)]
    found = await asyncio.gather(*asks)
    assert len(set(map(id, found))) == 1 and len(made) == 1
    assert made[0].startswith("grammar"), "not on the event loop"
    assert await schema_grammar(compiler, SCHEMAS["person"]) is found[0]
    assert found[0].begin() is not found[0].begin()
    await schema_grammar(compiler, SCHEMAS["both"])
    await schema_grammar(compiler, SCHEMAS["person"])  # now the later used one
    await schema_grammar(compiler, SCHEMAS["numbers"])
    assert len(made) == 3
    await schema_grammar(compiler, SCHEMAS["person"])
    assert len(made) == 3
    await schema_grammar(compiler, SCHEMAS["both"])
    assert len(made) == 4, "the one that was longest unused had been dropped"


@pytest.fixture
def release(monkeypatch):
    """Compiles wait for this event."""
    event = threading.Event()

    class Slow(module.CompiledGrammar):
        def __init__(self, *arguments):
            event.wait(10)
            super().__init__(*arguments)

    monkeypatch.setattr(module, "CompiledGrammar", Slow)
    return event


async def test_who_leaves_while_a_compile_waits_for_a_thread_ends_it_for_nobody(release):
    compiler = compiler_for(byte_level())
    busy = [asyncio.create_task(schema_grammar(compiler, SCHEMAS[name])) for name in ("person", "numbers")]
    leaver, other = (asyncio.create_task(schema_grammar(compiler, SCHEMAS["both"])) for _ in range(2))
    await asyncio.sleep(0.2)
    leaver.cancel()
    await asyncio.sleep(0.02)
    release.set()
    assert (await other).begin()
    await asyncio.gather(*busy)


async def test_a_compile_that_takes_too_long_is_refused_and_leaves_the_event_loop_free(monkeypatch, release):
    monkeypatch.setattr(module, "MAX_COMPILE_S", 0.1)
    compiler = compiler_for(byte_level())
    begun = time.perf_counter()
    task = asyncio.create_task(schema_grammar(compiler, SCHEMAS["both"]))
    with pytest.raises(InvalidRequestError, match=r"takes more than 0\.1 s"):
        await task
    assert time.perf_counter() - begun < 5
    release.set()
    monkeypatch.setattr(module, "MAX_COMPILE_S", 5.0)
    assert (await schema_grammar(compiler, SCHEMAS["both"])).begin()
