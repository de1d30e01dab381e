"""JSONL rows and their fields, read strictly. Every refusal names file, line, field and remedy. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from steering.errors import TrainingDataError

OPTIONAL = ("source", "side", "kind")
ROLES = ("system", "user", "assistant", "tool", "developer")
MESSAGE = f"{{'role': one of {', '.join(ROLES)}, 'content': a string}}"

Messages = tuple[tuple[str, str], ...]  # (role, content) pairs


@dataclass(frozen=True)
class Query:
    """One query. `messages`: (role, content) pairs. Equal if the messages are; `where` is file:line, for messages."""

    messages: Messages
    where: str = field(default="", compare=False)

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.messages]


class Line(NamedTuple):
    """A line that is not blank: its number, from 1, the byte it starts at, and its text."""

    number: int
    offset: int
    text: str


def read_lines(path: Path) -> Iterator[Line]:
    """The file's lines, one at a time. Raises TrainingDataError if it cannot be read, is not UTF-8, or has no rows."""
    empty, offset = True, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8")
                if text.strip():
                    empty = False
                    yield Line(number, offset, text)
                offset += len(line)
    except OSError as error:
        raise TrainingDataError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{path}: not UTF-8 text (byte {offset + error.start}). Save it as UTF-8.") from error
    if empty:
        raise TrainingDataError(f"{path}: holds no rows. Give a JSONL file with one object per line.")


def read_rows(path: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) for each non-blank line."""
    for line in read_lines(path):
        where = f"{path}:{line.number}"
        yield where, parse_row(line.text, columns, where)


def parse_row(text: str, columns: set[str], where: str) -> dict[str, Any]:
    """The object that a line holds, its optional labels checked."""
    try:
        row = json.loads(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise TrainingDataError(
            f"{where}: holds half of a surrogate pair, which is no text. Mend or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it is nested too deeply, or holds too large a number"
        raise TrainingDataError(f"{where}: not valid JSON ({reason}). Write one object per line.") from error
    if not isinstance(row, dict):
        raise TrainingDataError(f"{where}: holds a {type(row).__name__}, must be one JSON object.")
    if unknown := sorted(set(row) - columns):
        raise TrainingDataError(
            f"{where}: unknown field {unknown[0]!r}. Known are {', '.join(sorted(columns))}; rename or remove it."
        )
    for key in OPTIONAL:
        if key in row and (not isinstance(row[key], str) or not row[key]):
            raise TrainingDataError(f"{where}: field {key!r} must be a non-empty string. Fill it in or remove it.")
    return row


def text_field(row: dict, key: str, where: str) -> str:
    """A field that must be there, as a string that is not blank."""
    if key not in row:
        raise TrainingDataError(f"{where}: field {key!r} is missing. Add it or remove the row.")
    if not isinstance(row[key], str) or not row[key].strip():
        raise TrainingDataError(f"{where}: field {key!r} must be a non-empty string. Fill it in or remove the row.")
    return row[key]


def messages_field(row: dict, key: str, where: str) -> Messages:
    """A field that is a list of chat messages."""
    found = []
    for i, message in enumerate(row[key]):
        ok = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in ROLES
        if not ok or not isinstance(message["content"], str):
            raise TrainingDataError(f"{where}: field '{key}[{i}]' must be {MESSAGE}.")
        found.append((message["role"], message["content"]))
    return tuple(found)


def query_field(row: dict, where: str, key: str = "query") -> Query:
    """A query: a string, or a list of messages whose last one asks something."""
    if not isinstance(row.get(key), list):
        return Query((("user", text_field(row, key, where)),), where)
    messages = messages_field(row, key, where)
    if not asks(messages):
        raise TrainingDataError(
            f"{where}: field {key!r} must end with a message that asks something (role user or tool, not empty)."
        )
    return Query(messages, where)


def asks(messages: Messages) -> bool:
    """Whether the last message is one that an answer may follow."""
    return bool(messages) and messages[-1][0] != "assistant" and bool(messages[-1][1].strip())
