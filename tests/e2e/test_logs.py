"""What the process really writes: one line a request, JSON where asked, no prompt and no secret."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import pytest

from tests.checkpoint import FIRING
from tests.serving import process

KEY, ADMIN, WRONG = "sk-client-key-4711", "sk-admin-key-0815", "sk-wrong-key-1234"
PROMPT = FIRING[0]


def options(artifacts, *more: str) -> tuple[str, ...]:
    return (
        *("--model", str(artifacts.model), "--served-model-name", "tiny", "--num-threads", "1"),
        *("--profile", f"safety={artifacts.safety}", "--log-level", "debug", *more),
    )


def traffic(address: str) -> None:
    """Six requests that have a line each, and two that have none."""
    client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "ignore_eos": True}
    chat = "/v1/chat/completions"
    assert client.post(chat, json=body, headers={"X-Request-Id": "r-1"}).status_code == 200
    assert client.post(chat, json=body | {"stream": True}, headers={"X-Request-Id": "r-2"}).status_code == 200
    refused = client.post(chat, json=body, headers={"X-Request-Id": "r-3", "Authorization": f"Bearer {WRONG}"})
    assert refused.status_code == 401
    assert client.post(chat, json=body | {"mood": PROMPT}, headers={"X-Request-Id": "r-4"}).status_code == 400
    with client.stream(
        "POST", chat, json=body | {"stream": True, "max_tokens": 1500}, headers={"X-Request-Id": "r-5"}
    ) as stream:
        next(stream.iter_bytes())
    administered = client.post(
        "/v1/steering/profiles/unload",
        json={"name": "x"},
        headers={"X-Request-Id": "r-6", "Authorization": f"Bearer {ADMIN}"},
    )
    assert administered.status_code == 404
    assert client.get("/health").status_code == 200
    assert client.get("/metrics").status_code == 200


def run(artifacts, log: Path, *more: str) -> list[str]:
    """All that a server wrote under `traffic`."""
    environment = {"FINESTEER_API_KEY": KEY, "FINESTEER_ADMIN_KEY": ADMIN}
    with process(*options(artifacts, *more), log=log, **environment) as address:
        traffic(address)
        deadline = time.monotonic() + 20
        while "r-5" not in log.read_text() and time.monotonic() < deadline:  # until the server has noticed that it left
            time.sleep(0.05)
    text = log.read_text()
    for secret in (KEY, ADMIN, WRONG):
        assert secret not in text
    return text.splitlines()


def test_json(artifacts, tmp_path):
    lines = [json.loads(line) for line in run(artifacts, tmp_path / "log", "--log-format", "json")]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("debug", "info", "warning", "error") and line["logger"] and line["message"]
    [serving] = [line for line in lines if line["message"] == "serving"]
    assert serving["model"] == "tiny" and list(serving["profiles"]) == ["safety"]
    requests = {line["request"]: line for line in lines if line["message"] == "request"}
    assert sorted(requests) == ["r-1", "r-2", "r-3", "r-4", "r-5", "r-6"]
    assert len(requests) == sum("request" in line for line in lines), "a line each, and none for /health and /metrics"
    whole = requests["r-1"]
    assert (whole["path"], whole["status"], whole["key"], whole["model"]) == (
        "/v1/chat/completions",
        200,
        "key-1",
        "tiny",
    )
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish"]) == (30, 3, ["length"])
    assert (whole["steered"], whole["reason"], whole["fired"]) == (True, ["gate_open"], ["safety"])
    assert 0 < whole["first_token_s"] < whole["seconds"] < 60
    assert {k: v for k, v in requests["r-2"].items() if k in ("steered", "finish", "completion_tokens")} == {
        "steered": True,
        "finish": ["length"],
        "completion_tokens": 3,
    }
    assert (requests["r-3"]["status"], requests["r-4"]["status"], requests["r-6"]["status"]) == (401, 400, 404)
    assert "key" not in requests["r-3"] and "model" not in requests["r-4"]
    assert requests["r-6"]["key"] == "admin"
    assert requests["r-5"]["finish"] == ["abort"] and 0 < requests["r-5"]["completion_tokens"] < 1500
    assert "house" not in json.dumps(lines)


def test_for_people(artifacts, tmp_path):
    lines = [line for line in run(artifacts, tmp_path / "log") if "request=" in line]
    assert len(lines) == 6
    assert re.search(
        r" INFO +finesteer request=r-1 path=/v1/chat/completions status=200 seconds=\S+ key=key-1 model=tiny "
        r"prompt_tokens=30 completion_tokens=3 first_token_s=\S+ finish=length steered=true reason=gate_open fired=safety$",
        lines[0],
    )
    assert not any("house" in line for line in (tmp_path / "log").read_text().splitlines() if "curl" not in line)


@pytest.mark.parametrize("log_format", ["json", "human"])
def test_prompts_when_asked(artifacts, tmp_path, log_format):
    lines = run(artifacts, tmp_path / "log", "--log-format", log_format, "--log-prompts")
    [line] = [line for line in lines if "r-1" in line]
    conversation = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    if log_format == "json":
        assert json.loads(line)["prompt"] == [conversation]
    else:
        assert line.endswith(f"prompt={json.dumps(conversation)}")
    [refused] = [line for line in lines if "r-4" in line]
    assert "house" not in refused
