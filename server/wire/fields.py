"""The tables of request fields in the API page, made from the request models. `python -m server.wire.fields` rewrites them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.wire.base import RequestModel
from server.wire.chat import ChatCompletionRequest, ScoreRequest
from server.wire.completions import CompletionRequest
from server.wire.responses import ResponsesRequest
from server.wire.steering import DefaultsRequest, LoadProfileRequest, UnloadProfileRequest
from server.wire.tokenize import DetokenizeRequest, TokenizeRequest

PAGE = Path(__file__).parents[1] / "api" / "README.md"
COMMAND = "python -m server.wire.fields"
MODELS: Mapping[str, type[RequestModel]] = {
    model.__name__: model
    for model in (
        ChatCompletionRequest,
        CompletionRequest,
        ResponsesRequest,
        TokenizeRequest,
        DetokenizeRequest,
        ScoreRequest,
        LoadProfileRequest,
        UnloadProfileRequest,
        DefaultsRequest,
    )
}
TABLE = re.compile(r"<!-- fields of (\w+) -->\n(?:\|.*\n)*<!-- end -->")


def table(model: type[RequestModel]) -> str:
    """Markdown: each field that a body may have, whether it is done, a no-op or refused, and what it may hold."""
    schema = model.model_json_schema()
    rows = []
    for name in sorted(schema["properties"], key=lambda name: (name.startswith("steer_"), name)):
        field = schema["properties"][name]
        if name in model.unsupported:
            refusal = model.unsupported[name]
            passed = " or ".join(f"`{json.dumps(value)}`" for value in refusal.neutral)
            rows.append((name, "refused", (f"{passed} is let pass. " if passed else "") + refusal.remedy))
        else:
            description = field.get("description", "")
            status = "no-op" if name in model.no_ops else "done"
            rows.append((name, status, " – ".join(part for part in (_holds(field, schema), description) if part)))
    lines = ["| field | | what it may hold |", "|---|---|---|"]
    lines += [f"| `{name}` | {status} | {said.replace('|', chr(92) + '|')} |" for name, status, said in rows]
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with all its tables made anew."""
    return TABLE.sub(lambda found: f"<!-- fields of {found[1]} -->\n{table(MODELS[found[1]])}\n<!-- end -->", text)


def _holds(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: `integer, 1 to 128`."""
    if "$ref" in field:
        target = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return f"`{{{', '.join(target.get('properties', {}))}}}`"
    if "anyOf" in field:
        kinds = [_holds(option, schema) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(kind for kind in dict.fromkeys(kinds) if kind)
    if "const" in field or "enum" in field:
        return ", ".join(
            f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]) if value is not None
        )
    kinds = [kind for kind in _listed(field.get("type")) if kind != "null"]
    kind = " or ".join(kinds)
    if kind == "array":
        kind = f"list of {_holds(field.get('items', {}), schema) or 'anything'}"
    return kind + _bounds(field)


def _listed(kind: Any) -> list[str]:
    return kind if isinstance(kind, list) else [] if kind is None else [kind]


def _bounds(field: Mapping[str, Any]) -> str:
    low = field.get("minimum", field.get("minItems"))
    above, high = field.get("exclusiveMinimum"), field.get("maximum", field.get("maxItems"))
    if high is not None and abs(high) >= 2**63 - 1:
        return ", 64 bits"
    start = f"from {low}" if low is not None else f"above {above}" if above is not None else ""
    end = f"to {high}" if high is not None else ""
    return ", " + f"{start} {end}".strip() if start or end else ""


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
