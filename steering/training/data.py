"""The trainer's input: JSONL files of preference pairs (`pair_rows` has their forms) and of queries, read strictly. No torch.

Queries' rows have `query`: a string or a list of chat messages. Both kinds may carry `source` (else the file's stem) and
`kind`, pairs also `side`. Rows stay on disk (`on_disk`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steering.errors import TrainingDataError
from steering.training.on_disk import Rows, distinct, read_on_disk
from steering.training.pair_rows import PAIR_COLUMNS, preference
from steering.training.rows import OPTIONAL, Line, Query, parse_row, query_field

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


def read_pairs(paths: Sequence[Path]) -> Rows[Pair]:
    """All pairs of the files, in order; a query may come several times (paraphrased answers). Raises TrainingDataError."""
    return read_on_disk(paths, _pair)


def read_queries(paths: Sequence[Path]) -> Rows[LabelledQuery]:
    """The files' queries, repeats dropped: a repeat in two folds would be a leak. Raises TrainingDataError."""
    rows = read_on_disk(paths, _labelled)
    return rows.take(distinct(rows.places["query"])[0])


def bare(rows: Rows) -> Rows[Query]:
    """The queries of rows of either kind."""
    return rows.parsed_by(_query)


def refuse_overlap(groups: Mapping[str, Rows]) -> None:
    """Raise TrainingDataError if a query is in two of the named groups, whose comparison would then prove nothing.

    Case and white space make no difference: such twins are one query to the gate.
    """
    digests = np.concatenate([rows.places["plain"] for rows in groups.values()])
    owners = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups.values()])
    starts = np.cumsum([0, *(len(rows) for rows in groups.values())])
    first, number = distinct(digests)
    leaks = np.flatnonzero(owners[first[number]] != owners)

    def at(row: int) -> tuple[str, str]:
        name = list(groups)[owners[row]]
        return name, groups[name].where(row - starts[owners[row]])

    if len(leaks):
        (name, where), (other, other_where) = at(leaks[0]), at(first[number[leaks[0]]])
        raise TrainingDataError(
            f"{where}: field 'query' of this row ({name}) is also at {other_where} ({other}): held-out figures would be "
            "worthless. Remove it from one of the files."
        )


def file_record(paths: Sequence[Path], num_rows: int) -> dict[str, Any]:
    """What a profile remembers of its data: file names (never folders), their sha256, and the rows used."""
    return {"files": [path.name for path in paths], "sha256": [file_sha256(path) for path in paths], "rows": num_rows}


def file_sha256(path: Path) -> str:
    """Of the file's bytes, read piece by piece. Raises TrainingDataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TrainingDataError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error


def _pair(path: Path, line: Line) -> Pair:
    where = f"{path}:{line.number}"
    row = parse_row(line.text, PAIR_COLUMNS, where)
    return Pair(*preference(row, where), row.get("side"), row.get("kind"))


def _labelled(path: Path, line: Line) -> LabelledQuery:
    where = f"{path}:{line.number}"
    row = parse_row(line.text, QUERY_COLUMNS, where)
    return LabelledQuery(query_field(row, where), row.get("source", path.stem))


def _query(path: Path, line: Line) -> Query:
    where = f"{path}:{line.number}"
    row = parse_row(line.text, PAIR_COLUMNS, where)
    return query_field(row, where) if set(row) <= QUERY_COLUMNS else preference(row, where)[0]
