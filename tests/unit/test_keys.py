"""Key files, and what a key's limits let through, on a clock of the test's own."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from server.access.keys import Access, ApiKey, KeyFileError, digest, read_keys
from server.access.limits import Usage
from server.cli import app
from server.errors import RateLimitError

GOOD = {"name": "team-a", "sha256": digest("one"), "requests_per_minute": 6}


def write(path, rows):
    path.write_text(json.dumps({"keys": rows}))
    return path


def test_a_file_of_keys(tmp_path):
    keys = read_keys(write(tmp_path / "k.json", [GOOD, {"name": "b", "sha256": digest("two")}]))
    assert keys == (ApiKey("team-a", digest("one"), 6), ApiKey("b", digest("two")))
    access = Access(keys)
    assert access.holder("two").name == "b" and access.holder("") is None and access.holder(digest("two")) is None
    assert digest("one") not in repr(access)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"keys": []}', "at least one key"),
        ('{"keys": [1]}', "keys[0] must be an object"),
        ("[]", "must be an object"),
        ([GOOD, GOOD], "name 'team-a' is given twice"),
        ([GOOD, GOOD | {"name": "b"}], "is given twice"),
        ([GOOD | {"rpm": 3}], "unknown field 'rpm'"),
        ([GOOD | {"sha256": "one"}], "keys[0].sha256 must be 64"),
        ([{"name": "a"}], "keys[0].sha256 must be 64"),
        ([GOOD | {"name": "a b"}], "keys[0].name must be"),
        ([GOOD | {"max_concurrent": 0}], "keys[0].max_concurrent must be a whole number above 0"),
        ([GOOD | {"tokens_per_minute": True}], "keys[0].tokens_per_minute must be"),
    ],
)
def test_a_bad_file_is_refused_by_its_entry(tmp_path, content, message):
    path = tmp_path / "k.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"keys": content}))
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    assert message in str(error.value) and str(path) in str(error.value)
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_keys(tmp_path / "none.json")


def test_the_key_command_makes_an_entry_that_the_file_takes(tmp_path):
    said = CliRunner().invoke(app, ["key", "team-b"])
    key, _, entry = said.stdout.strip().partition("\n")
    [found] = read_keys(write(tmp_path / "k.json", [json.loads(entry)]))
    assert found.name == "team-b" and Access((found,)).holder(key) == found and len(key) > 40
    assert CliRunner().invoke(app, ["key", "team-b"]).stdout != said.stdout


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def allowed(usage):
    try:
        usage.begin()
    except RateLimitError as error:
        return error.retry_after_s
    return None


def test_requests_a_minute():
    clock = Clock()
    usage = Usage(ApiKey("a", "", requests_per_minute=3), clock)
    assert [allowed(usage) for _ in range(3)] == [None] * 3
    assert allowed(usage) == pytest.approx(20) and usage.headers()["x-ratelimit-remaining-requests"] == "0"
    clock.now = 19.9
    assert allowed(usage) is not None
    clock.now = 20.1
    assert allowed(usage) is None and allowed(usage) is not None
    clock.now = 1000.0  # no more than a minute's worth is saved up
    assert [allowed(usage) for _ in range(4)].count(None) == 3


def test_tokens_a_minute_are_known_afterwards():
    clock = Clock()
    usage = Usage(ApiKey("a", "", tokens_per_minute=60), clock)
    assert allowed(usage) is None
    usage.end(100)
    assert allowed(usage) == pytest.approx(41)  # a debt of 40, and one token
    clock.now = 41.5
    assert allowed(usage) is None and usage.headers()["x-ratelimit-remaining-tokens"] == "1"


def test_requests_at_once():
    usage = Usage(ApiKey("a", "", max_concurrent=2), Clock())
    assert [allowed(usage), allowed(usage), allowed(usage)] == [None, None, 1]
    usage.end(0)
    assert allowed(usage) is None


def test_a_request_that_is_refused_costs_nothing():
    clock = Clock()
    usage = Usage(ApiKey("a", "", requests_per_minute=2, max_concurrent=1), clock)
    assert allowed(usage) is None
    assert [allowed(usage) for _ in range(5)] == [1] * 5
    usage.end(0)
    assert allowed(usage) is None
