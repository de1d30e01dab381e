"""The trainer's input: JSONL files of preference pairs and of queries, read strictly. No torch.

Pairs: `query`, `preferred`, `undesired`, and optionally `side`. Queries: `query`. Both may carry `source` (else the file's
stem) and `kind`. A query is a string or a list of chat messages. Every refusal names file, line, field and remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.errors import TrainingDataError

OPTIONAL = {"source": str, "side": str, "kind": str}
PAIR_COLUMNS = {"query", "preferred", "undesired", *OPTIONAL}
QUERY_COLUMNS = {"query", *OPTIONAL}
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Query:
    """One query. `messages`: (role, content) pairs. Equal if the messages are; `where` is file:line, for messages."""

    messages: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class LabelledQuery:
    """A query and the `source` that reports count it under."""

    query: Query
    source: str


@dataclass(frozen=True)
class Pair:
    """A query with the answer that is wanted and the one that is not. `side`: say "harmful" or "borderline"; `kind`: a label."""

    query: Query
    preferred: str
    undesired: str
    side: str | None = None
    kind: str | None = None


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """All pairs of the files, in order; a query may come several times (paraphrased answers). Raises TrainingDataError."""
    pairs = []
    for path in paths:
        for where, row in _rows(path, PAIR_COLUMNS):
            query = _query(row, where)
            preferred, undesired = (_text(row, key, where) for key in ("preferred", "undesired"))
            if preferred.strip() == undesired.strip():
                raise TrainingDataError(
                    f"{where}: 'preferred' and 'undesired' are the same answer, so there is no shift to learn. "
                    "Change one of them or remove the row."
                )
            pairs.append(Pair(query, preferred, undesired, row.get("side"), row.get("kind")))
    return pairs


def read_queries(paths: Sequence[Path]) -> list[LabelledQuery]:
    """The files' queries, repeats dropped: a repeat in two folds would be a leak. Raises TrainingDataError."""
    found: dict[Query, LabelledQuery] = {}
    for path in paths:
        for where, row in _rows(path, QUERY_COLUMNS):
            query = _query(row, where)
            found.setdefault(query, LabelledQuery(query, row.get("source", path.stem)))
    return list(found.values())


def refuse_overlap(groups: Mapping[str, Sequence[Query]]) -> None:
    """Raise TrainingDataError if a query is in two of the named groups, whose comparison would then prove nothing.

    Case and white space make no difference: such twins are one query to the gate.
    """
    seen: dict[tuple[tuple[str, str], ...], tuple[str, Query]] = {}
    for name, queries in groups.items():
        for query in queries:
            plain = tuple((role, " ".join(content.casefold().split())) for role, content in query.messages)
            other, first = seen.setdefault(plain, (name, query))
            if other != name:
                raise TrainingDataError(
                    f"{query.where}: field 'query' of this {name} row is also at {first.where}, an {other} row: "
                    "held-out figures would be worthless. Remove it from one of the files."
                )


def file_record(paths: Sequence[Path], num_rows: int) -> dict[str, Any]:
    """What a profile remembers of its data: file names (never folders), their sha256, and the rows used."""
    return {
        "files": [path.name for path in paths],
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        "rows": num_rows,
    }


def _rows(path: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) for each non-blank line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingDataError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    empty = True
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        empty, where = False, f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainingDataError(f"{where}: not valid JSON ({error.msg}). Write one object per line.") from error
        if not isinstance(row, dict):
            raise TrainingDataError(f"{where}: holds a {type(row).__name__}, must be one JSON object.")
        if unknown := sorted(set(row) - columns):
            raise TrainingDataError(
                f"{where}: unknown field {unknown[0]!r}. Known are {', '.join(sorted(columns))}; rename or remove it."
            )
        for key, kind in OPTIONAL.items():
            if key in row and (not isinstance(row[key], kind) or not row[key]):
                raise TrainingDataError(f"{where}: field {key!r} must be a non-empty string. Fill it in or remove it.")
        yield where, row
    if empty:
        raise TrainingDataError(f"{path}: holds no rows. Give a JSONL file with one object per line.")


def _text(row: dict, key: str, where: str) -> str:
    if key not in row:
        raise TrainingDataError(f"{where}: field {key!r} is missing. Add it or remove the row.")
    if not isinstance(row[key], str) or not row[key].strip():
        raise TrainingDataError(f"{where}: field {key!r} must be a non-empty string. Fill it in or remove the row.")
    return row[key]


def _query(row: dict, where: str) -> Query:
    query = row.get("query")
    if not isinstance(query, list):
        return Query((("user", _text(row, "query", where)),), where)
    messages = []
    for i, message in enumerate(query):
        ok = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in ROLES
        if not ok or not isinstance(message["content"], str):
            raise TrainingDataError(
                f"{where}: field 'query[{i}]' must be {{'role': one of {', '.join(ROLES)}, 'content': a string}}."
            )
        messages.append((message["role"], message["content"]))
    if not messages or not messages[-1][1].strip() or messages[-1][0] == "assistant":
        raise TrainingDataError(
            f"{where}: field 'query' must end with a message that asks something (role user or tool, not empty)."
        )
    return Query(tuple(messages), where)
