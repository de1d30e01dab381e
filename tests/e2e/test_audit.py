"""The audit log of a real process: killed in mid-traffic, and on a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import httpx

from tests.checkpoint import CALM, FIRING
from tests.serving import launched, process


def options(artifacts, *more: str) -> tuple[str, ...]:
    return (
        *("--model", str(artifacts.model), "--served-model-name", "tiny", "--num-threads", "1"),
        *("--profile", f"safety={artifacts.safety}", *more),
    )


def ask(address: str, text: str, name: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "ignore_eos": True}
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers={"X-Request-Id": name}, timeout=30)


PROMISED = {"version", "strength", "mode", "override"}


def test_a_killed_server_leaves_what_it_answered_and_goes_on(artifacts, tmp_path):
    path, log = tmp_path / "audit", tmp_path / "log"
    answered: list[str] = []

    def traffic(worker: int) -> None:
        for number in range(10_000):
            try:
                ask(address, (FIRING, CALM)[worker][0], f"{worker}-{number}").raise_for_status()
            except httpx.HTTPError:
                return
            answered.append(f"{worker}-{number}")

    with launched(*options(artifacts, "--audit-log", str(path)), log=log) as (_, address):
        threads = [threading.Thread(target=traffic, args=(worker,)) for worker in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(answered) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    # which ends by SIGKILL
    for thread in threads:
        thread.join()
    *whole, end = path.read_bytes().split(b"\n")
    assert end == b"", "a line is written in one piece"
    started, *records = map(json.loads, whole)
    assert started["event"] == "started" and set(started["profiles"]["safety"]) == PROMISED
    found = {record["request"]: record for record in records}
    assert len(found) == len(records)
    missing = set(answered) - set(found)
    assert len(missing) <= 2, "of each client at most the last, which waited when the process was killed"
    assert all(record["applied"] == name.startswith("0") for name, record in found.items())

    os.truncate(path, path.stat().st_size - 40)  # as if it had been killed in the middle of a line
    with process(*options(artifacts, "--audit-log", str(path)), log=log) as address:
        assert ask(address, FIRING[0], "after").status_code == 200
    *before, cut, again, new, end = path.read_bytes().split(b"\n")
    assert before == whole[:-1] and whole[-1].startswith(cut) and end == b""
    assert json.loads(again)["profiles"] == started["profiles"] and json.loads(new)["request"] == "after"


def test_a_full_disk_ends_the_answers_where_they_must_be_audited(artifacts, tmp_path):
    log = tmp_path / "log"
    with process(
        *options(artifacts, "--audit-log", str(tmp_path / "audit"), "--audit-log-required"), log=log
    ) as address:
        (tmp_path / "audit").unlink()
        (tmp_path / "audit").symlink_to("/dev/full")
        ask(address, FIRING[0], "first")
        deadline = time.monotonic() + 20
        while "cannot be written" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        refused = ask(address, FIRING[0], "second")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_log_unavailable")
        assert httpx.get(f"{address}/ready").status_code == 503
    said = [line for line in log.read_text().splitlines() if "ERROR" in line]
    assert "No space left on device" in said[0] and "no new request is answered" in said[0]
    assert "1 records are lost, since the server ends" in said[-1]


def test_a_disk_that_is_full_at_the_start_ends_it_where_answers_must_be_audited(artifacts, tmp_path):
    (tmp_path / "audit").symlink_to("/dev/full")
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    command += options(artifacts, "--audit-log", str(tmp_path / "audit"), "--audit-log-required")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "--audit-log-required: the audit log cannot be written (No space" in ended.stderr
    assert "Traceback" not in ended.stderr
