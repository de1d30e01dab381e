"""The trainer's input: JSONL files of preference pairs (`pair_rows` has their forms) and of queries, read strictly. No torch.

Queries' rows have `query`: a string or a list of chat messages. Both kinds may carry `source` (else the file's stem) and
`kind`, pairs also `side`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.errors import TrainingDataError
from steering.training.pair_rows import PAIR_COLUMNS, preference
from steering.training.rows import OPTIONAL, Messages, Query, query_field, read_rows

QUERY_COLUMNS = {"query", *OPTIONAL}


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
        for where, row in read_rows(path, PAIR_COLUMNS):
            query, preferred, undesired = preference(row, where)
            pairs.append(Pair(query, preferred, undesired, row.get("side"), row.get("kind")))
    return pairs


def read_queries(paths: Sequence[Path]) -> list[LabelledQuery]:
    """The files' queries, repeats dropped: a repeat in two folds would be a leak. Raises TrainingDataError."""
    found: dict[Query, LabelledQuery] = {}
    for path in paths:
        for where, row in read_rows(path, QUERY_COLUMNS):
            query = query_field(row, where)
            found.setdefault(query, LabelledQuery(query, row.get("source", path.stem)))
    return list(found.values())


def refuse_overlap(groups: Mapping[str, Sequence[Query]]) -> None:
    """Raise TrainingDataError if a query is in two of the named groups, whose comparison would then prove nothing.

    Case and white space make no difference: such twins are one query to the gate.
    """
    seen: dict[Messages, tuple[str, Query]] = {}
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
