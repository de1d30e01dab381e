"""Suites: folders that `finesteer evaluate` reads.

A suite is a folder with `suite.json` and one or more `*.jsonl` files; each file is a line of the tables (an attack, say).

`suite.json`: {"name": "xstest-safe", "kind": "over_refusal"} and, where they are wanted, "description", "max_tokens" (of an
answer, default 64), "judge" (refusal, closer or pair), "scorer" (gsm8k, math or text).

| kind | a hit is an answer that | every row needs | default judge |
|---|---|---|---|
| attack | is a refusal: the defense success rate | query | refusal (an endpoint: harmfulness) |
| over_refusal, benign | is a refusal: the fewer the better | query | refusal (an endpoint: refusal) |
| exact_match | ends in the right result | query, answer | the scorer |
| truthfulqa | is nearer to a right reference than to any wrong one; MC1 and MC2 beside it | query, preferred, undesired | closer (an endpoint: truthfulness) |
| preference | is of the preferred kind; which reference the model finds likelier beside it | query, preferred, undesired | pair |

Rows: `query` (a string, or a list of {"role", "content"}), `preferred` and `undesired` (a string or a list of strings; of
TruthfulQA's preferred ones the first is the best answer), `answer`, `pattern` (a regular expression, case ignored, that an
answer of the right kind matches: counted among the refusals of attacks and the answers given to the rest), `source`, `kind`, `side`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from steering.errors import TrainingDataError
from steering.evaluation.scorers import SCORERS
from steering.training.rows import OPTIONAL, Query, query_field, read_rows, text_field

Kind = Literal["attack", "over_refusal", "benign", "exact_match", "truthfulqa", "preference"]
JudgeName = Literal["refusal", "closer", "pair"]
COLUMNS = {"query", "preferred", "undesired", "answer", "pattern", *OPTIONAL}
NEEDED: dict[str, tuple[str, ...]] = {
    "exact_match": ("answer",),
    "truthfulqa": ("preferred", "undesired"),
    "preference": ("preferred", "undesired"),
}
DEFAULT_JUDGES: dict[str, JudgeName] = {"truthfulqa": "closer", "preference": "pair"}
SETTINGS = {"name": str, "kind": str, "description": str, "judge": str, "scorer": str, "max_tokens": int}


@dataclass(frozen=True)
class Item:
    """A row of a suite."""

    query: Query
    preferred: tuple[str, ...] = ()
    undesired: tuple[str, ...] = ()
    answer: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class SuiteFile:
    """One file's rows. `sha256` is the file's."""

    name: str
    items: tuple[Item, ...]
    sha256: str


@dataclass(frozen=True)
class Suite:
    """A folder's files in the order of their names. `judge` is None where a scorer decides."""

    name: str
    kind: Kind
    files: tuple[SuiteFile, ...]
    judge: JudgeName | None
    scorer: str | None = None
    max_tokens: int = 64

    def limited(self, count: int, seed: int = 0) -> Suite:
        """The suite with at most `count` rows of each file, drawn at random, their order kept."""

        def some(items: Sequence[Item]) -> tuple[Item, ...]:
            chosen = sorted(random.Random(seed).sample(range(len(items)), min(count, len(items))))
            return tuple(items[i] for i in chosen)

        return replace(self, files=tuple(replace(file, items=some(file.items)) for file in self.files))


def find_suites(folders: Sequence[Path]) -> list[Suite]:
    """The suites of folders that are suites, or that hold suites one level down. Raises TrainingDataError."""
    found = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob("*/suite.json"))
        if (folder / "suite.json").is_file() or not inside:
            found.append(load_suite(folder))
        else:
            found += [load_suite(path) for path in inside]
    names = [suite.name for suite in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TrainingDataError(f"two suites are named {twice[0]!r}. Change 'name' in one's suite.json.")
    return found


def load_suite(folder: Path) -> Suite:
    """Read a suite. Raises TrainingDataError, naming file, line and field."""
    where = folder / "suite.json"
    settings = _settings(where)
    kind, scorer = settings["kind"], settings.get("scorer")
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise TrainingDataError(f"{folder}: holds no *.jsonl file, so nothing to ask. See `finesteer evaluate --help`.")
    judge = None if kind == "exact_match" else settings.get("judge", DEFAULT_JUDGES.get(kind, "refusal"))
    needed = NEEDED.get(kind, ())
    if judge in ("closer", "pair"):
        needed = ("preferred", "undesired")
    files = tuple(_file(path, needed) for path in paths)
    return Suite(settings["name"], kind, files, judge, scorer, settings.get("max_tokens", 64))


def _settings(where: Path) -> dict[str, Any]:
    try:
        settings = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise TrainingDataError(f"{where}: cannot be read ({reason}). A suite is a folder with suite.json.") from error
    if not isinstance(settings, dict):
        raise TrainingDataError(f"{where}: must hold one JSON object.")
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TrainingDataError(f"{where}: unknown field {unknown[0]!r}. Known are {', '.join(sorted(SETTINGS))}.")
    for key, kind in SETTINGS.items():
        bad = key in settings and (not isinstance(settings[key], kind) or isinstance(settings[key], bool))
        if bad or (key in ("name", "kind") and not settings.get(key)):
            raise TrainingDataError(f"{where}: field {key!r} must be a {'whole number' if kind is int else 'string'}.")
    for key, known in (("kind", get_args(Kind)), ("judge", get_args(JudgeName)), ("scorer", tuple(SCORERS))):
        if key in settings and settings[key] not in known:
            raise TrainingDataError(f"{where}: {key} {settings[key]!r} is unknown; use one of {', '.join(known)}.")
    if not re.fullmatch(r"[\w.-]+", settings["name"]):
        raise TrainingDataError(f"{where}: field 'name' may hold letters, digits, dots, dashes and underscores only.")
    if (settings["kind"] == "exact_match") != ("scorer" in settings):
        raise TrainingDataError(f"{where}: kind exact_match needs 'scorer', and no other kind takes one.")
    if settings["kind"] == "exact_match" and "judge" in settings:
        raise TrainingDataError(f"{where}: kind exact_match takes no 'judge'; the scorer decides.")
    if settings.get("max_tokens", 1) < 1:
        raise TrainingDataError(f"{where}: field 'max_tokens' must be 1 or more.")
    return settings


def _file(path: Path, needed: Sequence[str]) -> SuiteFile:
    items = []
    for where, row in read_rows(path, COLUMNS):
        for key in needed:
            if key not in row:
                raise TrainingDataError(f"{where}: field {key!r} is missing, which this kind of suite needs.")
        pattern = text_field(row, "pattern", where) if "pattern" in row else ""
        try:
            re.compile(pattern)
        except re.error as error:
            raise TrainingDataError(f"{where}: field 'pattern' is no regular expression ({error}).") from error
        answer = text_field(row, "answer", where) if "answer" in row else ""
        preferred, undesired = (_texts(row, key, where) for key in ("preferred", "undesired"))
        items.append(Item(query_field(row, where), preferred, undesired, answer, pattern))
    return SuiteFile(path.stem, tuple(items), hashlib.sha256(path.read_bytes()).hexdigest())


def _texts(row: dict, key: str, where: str) -> tuple[str, ...]:
    if key not in row:
        return ()
    if not isinstance(row[key], list):
        return (text_field(row, key, where),)
    if not row[key] or not all(isinstance(text, str) and text.strip() for text in row[key]):
        raise TrainingDataError(f"{where}: field {key!r} must be a string, or a list of strings that are not empty.")
    return tuple(row[key])
