"""From the bytes of a request body to a wire model, or one `InvalidRequestError` that lists all that is wrong with it."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from server.errors import InvalidRequestError
from server.wire.base import RequestModel

Model = TypeVar("Model", bound=RequestModel)
MAX_PROBLEMS = 8
MAX_NAME = 64  # characters of an unknown field's name that are looked at and repeated


def parse_body(model: type[Model], raw: bytes) -> Model:
    """Parse JSON, merge a literal `extra_body`, refuse unknown and unsupported fields, validate the rest.

    Raises InvalidRequestError: its `param` is the first field at fault, its message lists up to `MAX_PROBLEMS`.
    """
    return parse_fields(model, merge_extra_body(_json_object(raw)))


def parse_fields(model: type[Model], body: Mapping[str, Any]) -> Model:
    """`parse_body` for what is parsed already: a query string's fields, say."""
    found = (problem for key, value in body.items() if (problem := _field_problem(model, key, value)) is not None)
    problems = list(itertools.islice(found, MAX_PROBLEMS))  # a body may hold a million of them
    kept = {key: value for key, value in body.items() if key in model.model_fields}
    try:
        parsed = model.model_validate(kept)
    except ValidationError as error:
        problems += [_validation_problem(item) for item in error.errors(include_url=False)]
        parsed = None
    if problems or parsed is None:
        raise _invalid(problems)
    return parsed


def merge_extra_body(body: dict[str, Any]) -> dict[str, Any]:
    """Lift the keys of a literal `extra_body` (Python pasted into curl) to the top level, as the client library does."""
    if "extra_body" not in body:
        return body
    merged = {key: value for key, value in body.items() if key != "extra_body"}
    extra = body["extra_body"]
    if extra is None:
        return merged
    if not isinstance(extra, dict):
        raise InvalidRequestError(
            "extra_body: must be an object whose fields belong at the top level.", param="extra_body"
        )
    for key, value in extra.items():
        if key in merged and merged[key] != value:
            raise InvalidRequestError(
                f"{key}: given at the top level and in extra_body with different values. Send it once.", param=key
            )
        merged[key] = value
    return merged


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        body = json.loads(text)
        if "\\u" in text:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            code="invalid_json",
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "The body holds half of a surrogate pair, which is no character. Send whole characters.",
            code="invalid_json",
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8 text (byte {error.start}).", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            "The body cannot be read: a number is too long, or it is nested too deeply.", code="invalid_json"
        ) from error
    if not isinstance(body, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return body


Problem = tuple[str | None, str, str | None]  # param, sentence, code


def _field_problem(model: type[RequestModel], key: str, value: Any) -> Problem | None:
    if key in model.model_fields:
        return None
    if (refusal := model.unsupported.get(key)) is not None:
        if refusal.allows(value):
            return None
        return key, f"{key}: not supported by this server. {refusal.remedy}", "unsupported_parameter"
    name = key[:MAX_NAME]
    return name, f"{name}: unknown field{_suggestion(model, name)}", "unknown_parameter"


def _suggestion(model: type[RequestModel], key: str) -> str:
    """`; did you mean 'x'?` A key that starts with `steer` always gets an answer: a misspelt option must not pass for none."""
    steering = key.lower().startswith("steer")
    known = [name for name in model.model_fields if not steering or name.startswith("steer_")]
    close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.75)
    if not close and steering:
        first = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.0)
        return f"; did you mean {first[0]!r}? There are {', '.join(known)}" if first else ""
    return f"; did you mean {close[0]!r}?" if close else ""


def _validation_problem(item: Mapping[str, Any]) -> Problem:
    at_fault = (item.get("ctx") or {}).get("field") if item["type"] in ("inconsistent", "unsupported") else None
    param = field_path(item["loc"] + (() if at_fault is None else (at_fault,)))
    code = {"extra_forbidden": "unknown_parameter", "unsupported": "unsupported_parameter"}.get(item["type"])
    return param or None, f"{param}: {_sentence(item)}" if param else _sentence(item), code


def field_path(loc: tuple[str | int, ...]) -> str:
    """`("messages", 0, "role")` → `messages[0].role`. A union's member, named in angle brackets, is no part of the path."""
    path = ""
    for part in loc:
        if isinstance(part, str) and part.startswith("<"):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _sentence(item: Mapping[str, Any]) -> str:
    """What is wrong, in our words where pydantic's would puzzle a client."""
    context, given = item.get("ctx") or {}, item.get("input")
    sentences = {
        "missing": "is required",
        "extra_forbidden": "unknown field",
        "finite_number": f"must be a finite number, not {given}",
        "greater_than_equal": f"must be at least {_short(context.get('ge'))}, not {given}",
        "greater_than": f"must be greater than {_short(context.get('gt'))}, not {given}",
        "less_than_equal": f"must be at most {_short(context.get('le'))}, not {given}",
        "less_than": f"must be less than {_short(context.get('lt'))}, not {given}",
        "literal_error": f"must be {context.get('expected')}, not {shown(given)}",
        "int_type": f"must be an integer, not {shown(given)}",
        "float_type": f"must be a number, not {shown(given)}",
        "bool_type": f"must be true or false, not {shown(given)}",
        "string_type": f"must be a string, not {shown(given)}",
        "list_type": f"must be a list, not {shown(given)}",
        "dict_type": f"must be an object, not {shown(given)}",
        "model_type": f"must be an object, not {shown(given)}",
        "too_short": f"must hold at least {context.get('min_length')} item(s)",
        "too_long": f"must hold at most {context.get('max_length')} item(s), not {context.get('actual_length')}",
    }
    return sentences.get(item["type"], item["msg"])


def _short(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def shown(value: Any) -> str:
    """A value as the client wrote it, at most 40 characters of it; lists and objects by their kind only."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[:40] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _invalid(problems: list[Problem]) -> InvalidRequestError:
    sentences = [sentence.removesuffix(".") for _, sentence, _ in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        sentences.append(f"and {len(problems) - MAX_PROBLEMS} more")
    param, _, code = problems[0]
    text = "; ".join(sentences)
    return InvalidRequestError(text if text.endswith("?") else text + ".", param=param, code=code)
