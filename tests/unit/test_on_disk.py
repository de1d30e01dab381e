"""Rows that stay in their files: the same as if they were held, and not held."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest

from steering.errors import TrainingDataError
from steering.training.data import bare, read_pairs, read_queries, refuse_overlap
from steering.training.on_disk import distinct


def write(path, queries):
    path.write_text("".join(json.dumps({"query": q}) + "\n" for q in queries), encoding="utf-8")
    return path


def texts(rows):
    return [row.query.messages[-1][1] for row in rows]


def test_rows_are_read_by_number_slice_mask_and_in_turn(tmp_path):
    wanted = [f"question {i} – ü" for i in range(1200)]
    rows = read_queries([write(tmp_path / "a.jsonl", wanted[:700]), write(tmp_path / "b.jsonl", wanted[700:])])
    assert len(rows) == 1200 and texts(rows) == wanted
    assert texts(rows[690:710]) == wanted[690:710] and texts([rows[-1], rows[3]]) == [wanted[-1], wanted[3]]
    assert texts(rows.take([5, 1199, 5])) == [wanted[5], wanted[1199], wanted[5]]
    assert texts(rows.take(np.arange(1200) % 2 == 1)) == wanted[1::2] and list(rows.take([])) == []
    assert rows.where(700) == f"{tmp_path / 'b.jsonl'}:1" == rows[700].query.where
    assert rows.labels("source") == ["a"] * 700 + ["b"] * 500 and set(rows.labels("side")) == {None}
    with pytest.raises(IndexError):
        rows[1200]


def test_lines_are_numbered_as_an_editor_does_whatever_ends_them(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes('\r\n{"query": "ä"}\r\n  \n\u2028{"query": "b"}'.encode())
    with pytest.raises(TrainingDataError, match=r"w.jsonl:4: not valid JSON"):
        read_queries([path])
    path.write_bytes('\r\n{"query": "ä"}\r\n  \n{"query": "b"}'.encode())
    rows = read_queries([path])
    assert texts(rows) == ["ä", "b"] and [rows.where(i).rpartition(":")[2] for i in (0, 1)] == ["2", "4"]


def test_a_byte_order_mark_and_broken_text_are_refused_by_place(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "a"}')
    with pytest.raises(TrainingDataError, match=r"w.jsonl:1: not valid JSON \(.*BOM"):
        read_queries([path])
    path.write_bytes(b'{"query": "a"}\n{"query": "\xff"}')
    with pytest.raises(TrainingDataError, match=r"not UTF-8 text \(byte 26\)"):
        read_queries([path])


def test_joined_rows_keep_their_files_and_labels(tmp_path):
    pairs = tmp_path / "p.jsonl"
    pairs.write_text(json.dumps({"prompt": "c", "chosen": "x", "rejected": "y", "side": "s"}) + "\n")
    queries = read_queries([write(tmp_path / "q.jsonl", ["a", "b"])])
    both = bare(queries + read_pairs([pairs]))
    assert [q.messages[0][1] for q in both] == ["a", "b", "c"] and both.labels("side") == [None, None, "s"]
    assert both.labels("source") == ["q", "q", None] and both.where(2) == f"{pairs}:1"


def test_a_file_that_changed_since_it_was_checked_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    rows = read_queries([path])
    stat = path.stat()
    write(path, ["b", "a"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(TrainingDataError, match="has changed since"):
        rows[0]
    path.unlink()
    with pytest.raises(TrainingDataError, match="cannot be read any more"):
        rows[0]


def test_what_is_held_does_not_depend_on_the_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", (f"{i} " + "word " * 200 for i in range(5000)))
    tracemalloc.start()
    rows = read_queries([path])
    for _ in rows:
        pass
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 5e6 and len(rows) == 5000
    assert held < 200 * 5000 and peak < 500 * 5000 + 2e6  # a block of 512 rows' texts is half a megabyte


def test_distinct_finds_first_rows_in_order():
    first, number = distinct(np.array([9, 4, 9, 1, 4], dtype="u8"))
    assert first.tolist() == [0, 1, 3] and number.tolist() == [0, 1, 0, 2, 1]


def test_a_leak_is_told_by_its_first_row_of_the_later_group(tmp_path):
    names = ("IR", "general", "calibration")
    groups = {n: read_queries([write(tmp_path / f"{n}.jsonl", [f"{n} 0", f"{n} 1", f"{n} 2"])]) for n in names}
    refuse_overlap(groups)
    groups["calibration"] = read_queries([write(tmp_path / "calibration.jsonl", ["x", "General  2", "ir 1"])])
    with pytest.raises(TrainingDataError, match=r"calibration.jsonl:2: .*\(calibration\).*general.jsonl:3 \(general\)"):
        refuse_overlap(groups)
