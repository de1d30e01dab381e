"""Schemas from strangers: what is refused, how soon, and what is taken out."""

from __future__ import annotations

import json
import time

import pytest

from server.conversation import TextFormat
from server.errors import InvalidRequestError
from server.grammar import schema as bounds
from server.grammar.schema import SchemaError, schema_texts, without_white_space
from tests.grammars import allowed, byte_level, compiler_for


def nested(depth, key="items"):
    found = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "array", key: found}
    return found


def properties(count):
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


OVER = {
    # name: (a schema that is refused before anything is compiled, what the message says)
    "deep": (nested(bounds.MAX_NESTING), "nested more than 64 levels"),
    "very deep": (nested(5000), "nested more than 64 levels"),
    "wide": (properties(bounds.MAX_PROPERTIES + 1), "501 properties; the limit is 500"),
    "wide in a definition": ({"$defs": {"a": properties(10_000)}}, "10000 properties; the limit is 500"),
    "many objects": ({"anyOf": [properties(450) for _ in range(5)]}, "2250 properties; the limit is 2000"),
    "long": ({"enum": ["x" * 70_000]}, "more than 65536 bytes"),
    "many small": ({"x": [{}] * 1_000_000}, "more than 65536 bytes"),
    "enum": ({"enum": list(range(1001))}, "enum has 1001 values"),
    "anyOf": ({"anyOf": [{"const": i} for i in range(257)]}, "anyOf has 257 alternatives"),
    "multipleOf": ({"type": "integer", "multipleOf": 999_983}, "multipleOf makes too many cases"),
    "multipleOf of a fraction": ({"type": "number", "multipleOf": 0.999983}, "multipleOf makes too many cases"),
    "multipleOf twice": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf makes too many cases"),
    "multipleOf huge": ({"multipleOf": 10**400 + 1}, "multipleOf makes too many cases"),
    "multipleOf no number": ({"multipleOf": float("nan")}, "not finite"),
    "infinite": ({"maximum": float("inf")}, "not finite"),
    "false": (False, "allows nothing"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OVER)
def test_bounds(name, strict):
    schema, message = OVER[name]
    begun = time.perf_counter()
    with pytest.raises(SchemaError, match=message):
        schema_texts(schema, strict=strict)
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "schema",
    [
        nested(bounds.MAX_NESTING - 2),
        properties(bounds.MAX_PROPERTIES),
        {"enum": [f"value {i}" for i in range(bounds.MAX_ENUM)]},
        {"anyOf": [{"const": i} for i in range(bounds.MAX_ALTERNATIVES)]},
        {"type": "integer", "multipleOf": 9_973},
        {"type": "integer", "multipleOf": 1_000_000},
        {"type": "number", "multipleOf": 0.01},
        True,
        {},
    ],
    ids=["deep", "wide", "enum", "anyOf", "multipleOf", "millions", "cents", "true", "empty"],
)
async def test_up_to_the_bounds_it_compiles_and_begins(schema):
    grammar = await compiler_for(byte_level()).json_schema(schema, strict=True, what="it", param="p")
    state = grammar.begin()
    for _ in range(6):
        if state.finished:
            break
        state.accept(max(allowed(state.mask())))


HOSTILE = {
    "reference to itself": {"$ref": "#"},
    "references in a ring": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "a product of alternatives": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(10)]} for i in range(8)]
    },
    "impossible": {"type": "integer", "minimum": 5, "maximum": 3},
    "a reference abroad": {"$ref": "http://localhost:1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "types that are none": {"type": "strnig"},
    "properties that are none": {"properties": 3},
    "a bad pattern": {"type": "string", "pattern": "["},
    "an empty enum": {"enum": []},
    "multipleOf zero": {"type": "integer", "multipleOf": 0},
}
HARMLESS = {
    "repeats of repeats": {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    "stars of stars": {"type": "string", "pattern": "((a*)*)*b"},
    "long strings": {"type": "string", "maxLength": 1_000_000_000},
    "long lists": {"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}},
    "objects without end": {
        "$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}},
        "$ref": "#/$defs/a",
    },
    "objects full of objects": {
        "type": "object",
        "properties": {f"q{i}": {"type": "object", "properties": {f"p{j}": {} for j in range(100)}} for i in range(19)},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_cannot_be_enforced_is_refused_by_name_and_at_once(name):
    compiler = compiler_for(byte_level())
    await compiler.text_format(TextFormat("json_object"))
    begun = time.perf_counter()
    with pytest.raises(InvalidRequestError, match="the schema 'x' cannot be enforced: ") as refusal:
        await compiler.json_schema(HOSTILE[name], strict=True, what="the schema 'x'", param="some.field")
    assert (refusal.value.param, refusal.value.code, refusal.value.status) == ("some.field", "invalid_json_schema", 400)
    assert len(refusal.value.message) < 500 and "\n" not in refusal.value.message
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_looks_dear_compiles_at_once(name):
    compiler = compiler_for(byte_level())
    await compiler.text_format(TextFormat("json_object"))
    begun = time.perf_counter()
    state = (await compiler.json_schema(HARMLESS[name], strict=True, what="it", param="p")).begin()
    assert any(state.mask())
    assert time.perf_counter() - begun < 2


def test_options_of_the_grammar_engine_are_ours_and_never_the_clients():
    sly = {"x-guidance": {"lenient": True}, "not": {}}
    schema = sly | {
        "properties": {"x-guidance": {"type": "integer"} | sly, "pattern": {"pattern": "a"}},
        "items": [sly],
        "enum": [{"x-guidance": 1}],
    }
    [text] = schema_texts(schema, strict=True)
    found = json.loads(text)
    assert (found["x-guidance"]["lenient"], found["x-guidance"]["coerce_one_of"]) == (False, False)
    assert found["properties"]["x-guidance"] == {"type": "integer", "not": {}}
    assert found["items"] == [{"not": {}}] and found["enum"] == [{"x-guidance": 1}]
    lenient, patternless = map(json.loads, schema_texts(schema, strict=False))
    assert lenient["x-guidance"]["lenient"] is True
    assert lenient["properties"]["pattern"] == {"pattern": "a"}
    assert patternless["properties"]["pattern"] == {}


async def test_a_schema_cannot_make_itself_lenient():
    schema = {"x-guidance": {"lenient": True}, "type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(InvalidRequestError, match="not"):
        await compiler_for(byte_level()).json_schema(schema, strict=True, what="it", param="p")


def test_for_engines_that_cannot_bound_white_space_there_is_none_and_nothing_else_changes():
    schema = {"type": "object", "properties": {"whitespace_pattern": {"const": "( |\\n {0,8})?"}}}
    [text] = schema_texts(schema, strict=True)
    wanted, found = json.loads(text), json.loads(without_white_space(text))
    options, without = wanted.pop("x-guidance"), found.pop("x-guidance")
    assert found == wanted
    assert without == {k: v for k, v in options.items() if k != "whitespace_pattern"} | {"whitespace_flexible": False}
    assert without_white_space(f"start: %json {text}") == f"start: %json {without_white_space(text)}"
