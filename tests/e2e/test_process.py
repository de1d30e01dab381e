"""The process itself: how it starts, refuses to start, and stops."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from tests.checkpoint import FIRING
from tests.serving import process


def test_the_terminal_says_what_is_served(artifacts, tmp_path):
    log = tmp_path / "log"
    options = ("--model", str(artifacts.model), "--served-model-name", "org/tiny", "--num-threads", "1")
    with process(
        *options, "--profile", f"safety={artifacts.safety}", "--profile-mode", "safety=shadow", log=log
    ) as address:
        shown = log.read_text()
        for part in (f"{address}/v1", "org/tiny", "safety", "layer 1", "strength 6", "quantile", "shadow", "curl"):
            assert part in shown
        httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": "org/tiny", "messages": [{"role": "user", "content": FIRING[0]}], "max_tokens": 3},
        )
    lines = [line for line in log.read_text().splitlines() if "request=" in line]
    assert len(lines) == 1
    assert re.search(
        r"status=200 seconds=\S+ model=org/tiny prompt_tokens=30 completion_tokens=3 .*reason=shadow", lines[0]
    )
    assert "Traceback" not in log.read_text()


def test_the_key_from_the_environment_is_asked_for(artifacts, tmp_path):
    with process("--model", str(artifacts.model), log=tmp_path / "log", FINESTEER_API_KEY="k") as address:
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny", "tiny:unsteered"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_ends_cleanly(artifacts, tmp_path, number):
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        "--port",
        "0",
        "--model",
        str(artifacts.model),
        "--num-threads",
        "1",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            deadline = time.monotonic() + 60
            while not (found := re.search(r"(http://\S+)/v1", log.read_text())) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert found, log.read_text()
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="x", max_retries=0)
            stream = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                extra_body={"ignore_eos": True, "max_tokens": 200},
            )
            chunks = [next(iter(stream))]
            threading.Timer(0.01, server.send_signal, (number,)).start()
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason == "length"
            assert server.wait(timeout=20) == 0
        finally:
            server.kill()
    assert "Traceback" not in log.read_text()
