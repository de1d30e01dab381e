"""How a server process ends: by a signal, by two, and by none: `pytest tests/e2e/reliability/test_shutdown.py`."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoint import CALM, FIRING
from tests.serving import Artifacts, launched

pytestmark = pytest.mark.slow
PATH = "/v1/chat/completions"
ENDLESS = {"stream": True, "ignore_eos": True, "max_tokens": None, "n": 8}  # 16,000 tokens


def body(text: str, **fields: Any) -> dict:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 12,
    } | fields


def options(artifacts: Artifacts, *more: str) -> tuple[str, ...]:
    return ("--model", str(artifacts.model), "--profile", f"safety={artifacts.safety}", "--num-threads", "1", *more)


def data(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_drains_it_refuses_what_is_new_and_finishes_what_runs(artifacts, tmp_path, number):
    log = tmp_path / "log"
    with launched(*options(artifacts), log=log) as (server, address):
        with httpx.Client(base_url=address, timeout=30) as http, httpx.Client(base_url=address) as other:
            assert other.get("/ready").status_code == 200  # its connection stays open
            asked = body(CALM[0], stream=True, ignore_eos=True, max_tokens=1500)
            with http.stream("POST", PATH, json=asked) as stream:
                events = data(stream.iter_lines())
                next(events)
                server.send_signal(number)
                while other.get("/ready").status_code == 200:
                    time.sleep(0.01)
                ready = other.get("/ready")
                assert (ready.status_code, ready.json()["error"]["code"]) == (503, "shutting_down")
                assert other.get("/health").status_code == 200
                assert "num_requests_running" in other.get("/metrics").text
                for client in (other, httpx):
                    url = PATH if client is other else address + PATH
                    refused = client.post(url, json=body(CALM[1]))
                    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
                assert server.poll() is None
                *_, last, done = events
            assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert server.wait(timeout=10) == 0
    assert "Traceback" not in log.read_text()


def test_what_outlasts_the_timeout_is_told(artifacts, tmp_path):
    log = tmp_path / "log"
    with launched(*options(artifacts, "--shutdown-timeout", "0.3"), log=log) as (server, address):
        found: dict[str, Any] = {}

        def whole() -> None:
            response = httpx.post(address + PATH, json=body(FIRING[0], **(ENDLESS | {"stream": False})), timeout=30)
            found["whole"] = response.status_code, response.json()["error"]["code"]

        thread = threading.Thread(target=whole)
        thread.start()
        with httpx.Client(base_url=address, timeout=30) as http:
            with http.stream("POST", PATH, json=body(CALM[0], **ENDLESS)) as stream:
                events = data(stream.iter_lines())
                next(events)
                begun = time.monotonic()
                server.send_signal(signal.SIGTERM)
                *_, last = events
            error = json.loads(last)["error"]
            assert (error["code"], error["type"]) == ("shutting_down", "server_error")
        thread.join()
        assert found["whole"] == (503, "shutting_down")
        assert server.wait(timeout=10) == 0
        assert 0.2 < time.monotonic() - begun < 5
    assert "Traceback" not in log.read_text()


def test_an_idle_server_ends_at_once(artifacts, tmp_path):
    with launched(*options(artifacts), log=tmp_path / "log") as (server, address), httpx.Client() as http:
        http.get(f"{address}/health")
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        soft, hard = re.search(r"Max open files +(\S+) +(\S+)", limits).groups()
        assert soft == hard, "connections are bounded by the system, not by its default of 1,024"
        begun = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
        assert time.monotonic() - begun < 15, "it waited for the timeout, which is 25 s, though nothing ran"


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_at_once(artifacts, tmp_path, first, second):
    with (
        launched(*options(artifacts), log=tmp_path / "log") as (server, address),
        httpx.Client(base_url=address, timeout=30) as http,
        http.stream("POST", PATH, json=body(CALM[0], **ENDLESS)) as stream,
    ):
        events = data(stream.iter_lines())
        next(events)
        server.send_signal(first)
        while httpx.get(f"{address}/ready").status_code == 200:
            time.sleep(0.01)
        begun = time.monotonic()
        server.send_signal(second)
        assert server.wait(timeout=5) == 128 + second
        assert time.monotonic() - begun < 1
        with pytest.raises(httpx.HTTPError):
            list(events)


def test_killed_and_started_again(artifacts, oracle, tmp_path):
    """Clients hear of it at once, and the same port serves the same answers as before."""
    log = tmp_path / "log"
    with launched(*options(artifacts), log=log) as (server, address):
        port = int(re.search(r":(\d+)$", address)[1])
        with (
            httpx.Client(base_url=address, timeout=30) as http,
            http.stream("POST", PATH, json=body(CALM[0], **ENDLESS)) as stream,
        ):
            events = data(stream.iter_lines())
            next(events)
            begun = time.monotonic()
            server.kill()
            with pytest.raises(httpx.HTTPError):
                list(events)
            assert time.monotonic() - begun < 3
        assert server.wait() == -signal.SIGKILL
    with launched(*options(artifacts), log=tmp_path / "again", port=port) as (_, again):
        assert again == address
        for text, wanted, applied in ((FIRING[0], oracle.steered, True), (CALM[0], oracle.plain, False)):
            answer = httpx.post(again + PATH, json=body(text)).json()
            assert answer["choices"][0]["message"]["content"] == wanted(text)
            assert answer["steering"]["applied"] is applied


def test_the_log_of_a_drained_server_has_every_request(artifacts, tmp_path: Path):
    log = tmp_path / "log"
    with launched(*options(artifacts), log=log) as (server, address):
        assert httpx.post(address + PATH, json=body(CALM[0])).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0
    assert len(re.findall(r"path=/v1/chat/completions status=200", log.read_text())) == 1
