"""JSON schemas from strangers: bounds on what compiling may cost, and the text that the grammar engine reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from importlib.metadata import version
from typing import Any

MAX_BYTES = 64 * 1024
MAX_NESTING = 64  # of objects and lists in the schema's JSON
MAX_PROPERTIES = 500  # of one object
MAX_TOTAL_PROPERTIES = 2000
MAX_ENUM = 1000  # values of one enum
MAX_ALTERNATIVES = 256  # of one anyOf, oneOf or allOf
MAX_MULTIPLE = 10_000  # the least common multiple of all `multipleOf`, without factors 2 and 5: states of an automaton

# An answer's white space is bounded: nothing, one space, or a line break and its indentation.
SOME_SPACE = {"whitespace_pattern": r"( |\n {0,8})?"}
NO_SPACE = {"whitespace_flexible": False}  # for releases of the grammar engine that cannot bound it (vLLM's)
CAN_BOUND_SPACE = tuple(map(int, version("llguidance").split(".")[:2])) >= (1, 9)
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"enum", "const", "default", "example", "examples", "required", "type", "multipleOf"})
_PATTERNS = frozenset({"pattern", "patternProperties"})


class SchemaError(ValueError):
    """A schema or grammar that cannot be enforced; the message says why, with no full stop."""


def schema_texts(schema: Mapping[str, Any] | bool, *, strict: bool) -> list[str]:
    """A schema as JSON text with the options of this server, for `%json` or by itself: the first that compiles holds.

    Strict: one text, the whole schema. Else two: what cannot be enforced is let pass; and so is every pattern.

    Raises:
        SchemaError: it is over one of the bounds above, is no JSON, or allows nothing.
    """
    if isinstance(schema, bool):
        if not schema:
            raise SchemaError("a schema that is false allows nothing")
        schema = {}
    _check_bounds(schema)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:
        raise SchemaError("it holds a number that is not finite, or text that is not Unicode") from error
    if size > MAX_BYTES:
        raise SchemaError(f"it has more than {MAX_BYTES} bytes")
    options = {
        **(SOME_SPACE if CAN_BOUND_SPACE else NO_SPACE),
        "item_separator": ",",
        "key_separator": ":",
        "lenient": not strict,
        "coerce_one_of": not strict,
    }
    dropped = [frozenset()] if strict else [frozenset(), _PATTERNS]
    return [json.dumps(_cleaned(schema, {"x-guidance"} | drop) | {"x-guidance": options}) for drop in dropped]


def without_white_space(text: str) -> str:
    """A text of `schema_texts`, or a Lark grammar around some, for releases of the grammar engine that cannot bound it."""
    return text.replace(json.dumps(SOME_SPACE)[1:-1], json.dumps(NO_SPACE)[1:-1])


def _check_bounds(schema: Mapping[str, Any]) -> None:
    num_properties, multiple = 0, 1
    for node in _objects(schema):
        for key, value in node.items():
            if key in _MAPS and isinstance(value, dict):
                if len(value) > MAX_PROPERTIES:
                    raise SchemaError(f"an object has {len(value)} {key}; the limit is {MAX_PROPERTIES}")
                num_properties += len(value)
            elif key == "enum" and isinstance(value, list) and len(value) > MAX_ENUM:
                raise SchemaError(f"an enum has {len(value)} values; the limit is {MAX_ENUM}")
            elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list) and len(value) > MAX_ALTERNATIVES:
                raise SchemaError(f"{key} has {len(value)} alternatives; the limit is {MAX_ALTERNATIVES}")
            elif key == "multipleOf" and isinstance(value, int | float) and not isinstance(value, bool):
                multiple = math.lcm(multiple, _odd_part(value))
                if multiple > MAX_MULTIPLE:
                    raise SchemaError("its multipleOf makes too many cases")
    if num_properties > MAX_TOTAL_PROPERTIES:
        raise SchemaError(f"it has {num_properties} properties; the limit is {MAX_TOTAL_PROPERTIES}")


def _odd_part(number: float) -> int:
    """0.35 → 7: a number's digits without the factors 2 and 5, which cost a decimal automaton next to nothing; never 0."""
    digits = int("0" + "".join(map(str, Decimal(str(number)).as_tuple().digits)))
    for factor in (2, 5):
        while digits and digits % factor == 0:
            digits //= factor
    return digits or 1


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value. Raises SchemaError where it is nested too deeply, or holds more than fits the bytes."""
    level, count = [value], 0
    for _ in range(MAX_NESTING):
        count += len(level)
        if count > MAX_BYTES // 2:
            raise SchemaError(f"it has more than {MAX_BYTES} bytes")
        yield from (item for item in level if isinstance(item, dict))
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise SchemaError(f"it is nested more than {MAX_NESTING} levels deep")


def _cleaned(schema: Any, drop: frozenset[str]) -> Any:
    """A schema without some keywords, at every depth; properties and data of those names stay."""
    if isinstance(schema, list):
        return [_cleaned(item, drop) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in drop:
            continue
        if key in _MAPS and isinstance(value, dict):
            kept[key] = {name: _cleaned(inner, drop) for name, inner in value.items()}
        else:
            kept[key] = value if key in _DATA else _cleaned(value, drop)
    return kept
