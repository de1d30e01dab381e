"""Log lines: one line whatever is in them."""

from __future__ import annotations

import json
import logging
import sys

from server.observability.logging import JsonFormatter, log_fields

HOSTILE = 'a\nb "c" =\u2028\ud800\x1b[31m'


def test_hostile_text_stays_on_one_line(caplog):
    with caplog.at_level("INFO", logger="finesteer"):
        log_fields("request", {"path": HOSTILE, "status": 200, "none": None, "list": ["a", "b c"]})
    [record] = caplog.records
    assert len(record.getMessage().splitlines()) == 1
    assert record.getMessage() == f'path={json.dumps(HOSTILE)} status=200 list="a,b c"'
    line = JsonFormatter().format(record)
    assert line.isascii() and "\n" not in line
    read = json.loads(line)
    assert (read["message"], read["path"], read["list"]) == ("request", HOSTILE, ["a", "b c"])
    assert "none" not in read


def test_a_traceback_is_a_field():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    read = json.loads(line)
    assert (read["level"], read["message"]) == ("error", "it broke")
    assert "Traceback" in read["exception"] and "two\nlines" in read["exception"]


def test_nothing_is_put_together_for_nobody(caplog):
    class Costly:
        def __str__(self):
            raise AssertionError("it was written out")

    with caplog.at_level("WARNING", logger="finesteer"):
        log_fields("request", {"value": Costly()})
    assert not caplog.records
