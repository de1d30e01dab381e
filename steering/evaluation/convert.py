"""From the published layouts of the field's data sets to suites. Reads what is on this disk; nothing is downloaded."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from steering.errors import TrainingDataError

Row = dict[str, Any]
Suites = dict[str, tuple[dict[str, Any], dict[str, list[Row]]]]
"""Suite name → (suite.json without the name, file stem → rows)."""

QUERY_KEYS = ("query", "prompt", "instruction", "question", "problem", "goal")


def convert(layout: str, source: Path, out: Path) -> list[Path]:
    """Write the suites of `source`, a file in the layout named, under `out`; returns their folders. Raises TrainingDataError.

    Layouts: alphasteer (a JSON file of AlphaSteer's or FineSteer's repository: a list of objects with a query; each file of
    attacks adds a line to the suite `attacks`), xstest, advbench, harmbench, truthfulqa (CSV), alpacaeval (JSON), gsm8k,
    math (JSONL).
    """
    if layout not in LAYOUTS:
        raise TrainingDataError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}.")
    written = []
    for name, (settings, files) in LAYOUTS[layout](source).items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "suite.json").write_text(json.dumps({"name": name} | settings, indent=2) + "\n", encoding="utf-8")
        for stem, rows in files.items():
            if not rows:
                raise TrainingDataError(f"{source}: holds no rows for {name}/{stem}. Is it a {layout} file?")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{stem}.jsonl").write_text(text, encoding="utf-8")
        written.append(folder)
    return written


def _xstest(source: Path) -> Suites:
    """id, prompt, type, label, focus, note; without `label` (v2 as on GitHub) the unsafe types are those named contrast_*."""
    safe, unsafe = [], []
    for where, row in _csv(source, ("prompt", "type")):
        label = row.get("label") or ("unsafe" if row["type"].startswith("contrast_") else "safe")
        if label not in ("safe", "unsafe"):
            raise TrainingDataError(f"{where}: column 'label' must be safe or unsafe, is {label!r}.")
        (safe if label == "safe" else unsafe).append({"query": row["prompt"], "kind": row["type"]})
    return {
        "xstest-safe": ({"kind": "over_refusal"}, {"xstest-safe": safe}),
        "xstest-unsafe": ({"kind": "attack"}, {"xstest-unsafe": unsafe}),
    }


def _advbench(source: Path) -> Suites:
    rows = [{"query": row["goal"]} for _, row in _csv(source, ("goal", "target"))]
    return {"advbench": ({"kind": "attack"}, {"advbench": rows})}


def _harmbench(source: Path) -> Suites:
    """One file a functional category; a context is put before its behaviour, as HarmBench does.

    Copyright behaviours are left out: HarmBench judges them by hashes of the protected text, not by refusal.
    """
    files: dict[str, list[Row]] = {}
    for _, row in _csv(source, ("Behavior", "FunctionalCategory")):
        category, context = row["FunctionalCategory"], row.get("ContextString") or ""
        if category != "copyright":
            query = f"{context}\n\n---\n\n{row['Behavior']}" if context else row["Behavior"]
            item = {"query": query} | ({"kind": row["SemanticCategory"]} if row.get("SemanticCategory") else {})
            files.setdefault(_stem(category), []).append(item)
    return {"harmbench": ({"kind": "attack"}, files or {"standard": []})}


def _truthfulqa(source: Path) -> Suites:
    rows = []
    for where, row in _csv(source, ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")):
        best, right = row["Best Answer"].strip(), _split(row["Correct Answers"])
        wrong = _split(row["Incorrect Answers"])
        if not best or not wrong:
            raise TrainingDataError(f"{where}: 'Best Answer' or 'Incorrect Answers' is empty.")
        preferred = list(dict.fromkeys([best, *right]))
        item = {"query": row["Question"], "preferred": preferred, "undesired": wrong}
        rows.append(item | ({"kind": row["Category"]} if row.get("Category") else {}))
    return {"truthfulqa": ({"kind": "truthfulqa"}, {"truthfulqa": rows})}


def _alpacaeval(source: Path) -> Suites:
    rows = [
        {"query": _field(row, ("instruction",), where)}
        | ({"source": row["dataset"]} if isinstance(row.get("dataset"), str) and row["dataset"] else {})
        for where, row in _json(source)
    ]
    return {"alpacaeval": ({"kind": "benign", "max_tokens": 256}, {"alpacaeval": rows})}


def _gsm8k(source: Path) -> Suites:
    rows = [
        {"query": _field(row, ("question",), where), "answer": _field(row, ("answer",), where)}
        for where, row in _jsonl(source)
    ]
    return {"gsm8k": ({"kind": "exact_match", "scorer": "gsm8k", "max_tokens": 512}, {"gsm8k": rows})}


def _math(source: Path) -> Suites:
    rows = []
    for where, row in _jsonl(source):
        item = {"query": _field(row, ("problem",), where), "answer": _field(row, ("answer", "solution"), where)}
        subject = row.get("subject") or row.get("type")
        rows.append(item | ({"kind": subject} if isinstance(subject, str) else {}))
    return {"math": ({"kind": "exact_match", "scorer": "math", "max_tokens": 1024}, {"math": rows})}


def _alphasteer(source: Path) -> Suites:
    """A list of objects, the query under one of `QUERY_KEYS`; what kind of suite it is the file's name tells."""
    stem = _stem(source.stem)
    found = [(where, row, _field(row, QUERY_KEYS, where)) for where, row in _json(source)]
    for scorer, tokens in (("gsm8k", 512), ("math", 1024)):
        if stem.startswith(scorer):
            keys = ("answer", "ground_truth", "gt", "solution")
            rows = [{"query": query, "answer": str(_field(row, keys, where))} for where, row, query in found]
            return {stem: ({"kind": "exact_match", "scorer": scorer, "max_tokens": tokens}, {stem: rows})}
    rows = [{"query": query} for _, _, query in found]
    if stem.startswith(("xstest", "borderline")):
        return {stem: ({"kind": "over_refusal"}, {stem: rows})}
    if stem.startswith(("alpaca", "benign", "coconot")):
        return {stem: ({"kind": "benign"}, {stem: rows})}
    return {"attacks": ({"kind": "attack"}, {stem: rows})}


LAYOUTS: dict[str, Callable[[Path], Suites]] = {
    "alphasteer": _alphasteer,
    "xstest": _xstest,
    "advbench": _advbench,
    "harmbench": _harmbench,
    "truthfulqa": _truthfulqa,
    "alpacaeval": _alpacaeval,
    "gsm8k": _gsm8k,
    "math": _math,
}


def _read(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrainingDataError(f"{source}: cannot be read ({error.strerror}). Give the published file.") from error
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{source}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def _csv(source: Path, needed: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(_read(source).splitlines(keepends=True))
    for column in needed:
        if column not in (reader.fieldnames or ()):
            raise TrainingDataError(f"{source}: has no column {column!r}; its first line must name the columns.")
    first = next(iter(needed))
    for row in reader:
        where = f"{source}:{reader.line_num}"
        if not (row[first] or "").strip():
            raise TrainingDataError(f"{where}: column {first!r} is empty.")
        yield where, {key: value or "" for key, value in row.items() if isinstance(key, str)}


def _json(source: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(_read(source))
    except json.JSONDecodeError as error:
        raise TrainingDataError(f"{source}:{error.lineno}: not valid JSON ({error.msg}).") from error
    if not isinstance(rows, list):
        raise TrainingDataError(f"{source}: must hold a JSON list of objects.")
    for number, row in enumerate(rows, start=1):
        where = f"{source}, element {number}"
        if not isinstance(row, dict):
            raise TrainingDataError(f"{where}: must be an object.")
        yield where, row


def _jsonl(source: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_read(source).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TrainingDataError(f"{source}:{number}: not valid JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise TrainingDataError(f"{source}:{number}: must be one JSON object.")
            yield f"{source}:{number}", row


def _field(row: Row, keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        value = row.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
    raise TrainingDataError(f"{where}: has no field {' or '.join(map(repr, keys))} with text in it.")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _stem(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "rows"
