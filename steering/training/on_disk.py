"""Rows of JSONL files that stay on disk: read and checked once, and again whenever one is asked for."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

from steering.errors import TrainingDataError
from steering.training.rows import Line, Messages, Query, read_lines

LABELS = ("source", "side", "kind")
PLACE = np.dtype([(name, "u8") for name in ("file", "line", "offset", "query", "plain", *LABELS)])
BLOCK = 512  # rows read at once where all are gone through


class Example(Protocol):
    """A row's content; it may have the attributes `LABELS`, too."""

    @property
    def query(self) -> Query: ...


T = TypeVar("T")
Parse = Callable[[Path, Line], T]


@dataclass(frozen=True)
class File:
    """A file, and what tells that it has been changed since."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> File:
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Rows(Sequence, Generic[T]):
    """A sequence of which 64 bytes a row are held, whatever the rows' texts. A slice is a list of its rows' content.

    Attributes:
        places: (N,) of dtype `PLACE`: file, line and byte, 64-bit digests of the query as it is and without regard to case and
            white space, and the labels as numbers into `names`.
        parse: makes a row's content of its line.
    """

    files: tuple[File, ...]
    places: np.ndarray
    names: tuple[str | None, ...]
    parse: Parse[T]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, chosen: slice) -> list[T]: ...
    @overload
    def __getitem__(self, chosen: int) -> T: ...
    def __getitem__(self, chosen: int | slice) -> Any:
        """Raises TrainingDataError where the file has changed since it was checked."""
        if isinstance(chosen, slice):
            return list(self._read(self.places[chosen]))
        return next(self._read(self.places[[chosen]]))

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def _read(self, places: np.ndarray) -> Iterator[T]:
        cuts = np.flatnonzero(np.diff(places["file"])) + 1
        for run in np.split(places, cuts) if len(places) else ():
            file = self.files[run["file"][0]]
            try:
                if File.of(file.path) != file:
                    raise TrainingDataError(f"{file.path}: has changed since it was checked. Start again.")
                with file.path.open("rb") as stream:
                    for place in run:
                        stream.seek(int(place["offset"]))
                        text = stream.readline().decode("utf-8")
                        yield self.parse(file.path, Line(int(place["line"]), int(place["offset"]), text))
            except OSError as error:
                raise TrainingDataError(f"{file.path}: cannot be read any more ({error.strerror}).") from error

    def where(self, i: int) -> str:
        """A row's file:line."""
        place = self.places[i]
        return f"{self.files[place['file']].path}:{place['line']}"

    def labels(self, name: str) -> list[str | None]:
        """Each row's `source`, `side` or `kind`."""
        return [self.names[number] for number in self.places[name]]

    def take(self, chosen: np.ndarray | Sequence[int]) -> Rows[T]:
        """The rows of these numbers, or where a mask is true."""
        return replace(self, places=self.places[np.asarray(chosen, dtype=None if len(chosen) else int)])

    def parsed_by(self, parse: Parse) -> Rows:
        """The same rows, something else made of each."""
        return replace(self, parse=parse)

    def __add__(self, others: Rows[T]) -> Rows[T]:
        """These rows and then the others, all parsed as these are."""
        moved = others.places.copy()
        moved["file"] += len(self.files)
        for label in LABELS:
            moved[label] += len(self.names)
        places = np.concatenate([self.places, moved])
        return Rows(self.files + others.files, places, self.names + others.names, self.parse)


def read_on_disk(paths: Sequence[Path], parse: Parse[T]) -> Rows[T]:
    """All rows of the files, checked by `parse`, whose results have a `query` and perhaps labels. Raises TrainingDataError."""
    flat, names, files = array("Q"), {None: 0}, []
    for number, path in enumerate(paths):
        for line in read_lines(path):
            found = parse(path, line)
            labels = [names.setdefault(getattr(found, label, None), len(names)) for label in LABELS]
            messages = found.query.messages
            flat.extend((number, line.number, line.offset, digest(messages), digest(plain(messages)), *labels))
        files.append(File.of(path))
    return Rows(tuple(files), np.frombuffer(flat, PLACE), tuple(names), parse)


def digest(messages: Messages) -> int:
    """64 bits: of ten million different queries two are taken for one in one of 400,000 such sets."""
    return int.from_bytes(hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest(), "little")


def plain(messages: Messages) -> Messages:
    """Without regard to case and white space."""
    return tuple((role, " ".join(content.casefold().split())) for role, content in messages)


def distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows that come first with their digest, (M,) ascending, and for each row which of those is its own, (N,)."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = first.argsort()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]
