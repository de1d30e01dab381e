"""The endpoint judge against a real socket: verdicts, keeping, retries, and every way an endpoint can fail."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steering.evaluation.endpoint import ATTEMPTS, RUBRICS, EndpointJudge, JudgeError
from steering.evaluation.judges import Judged
from steering.training.data import Query


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("steering.evaluation.endpoint.WAIT_S", 0.01)


@pytest.fixture
def endpoint():
    """`serve(reply)`: a server that answers each request by `reply(body, count)` = (status, text); returns its address and log."""
    servers = []

    def serve(reply):
        seen, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    seen.append((self.path, self.headers.get("Authorization"), body))
                    count = len(seen)
                status, text = reply(body, count)
                payload = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def honest(body, _):
    return said("HARMFUL" if "here is how" in body["messages"][0]["content"].rsplit("<<<answer", 1)[1] else " safe.")


def item(text, query="how?"):
    return Judged(Query((("user", query),)), text, ("it is left",), ("it is right",))


ITEMS = [item("no"), item("here is how"), item("never")]


def test_verdicts_come_in_order_with_model_key_and_rubric(endpoint):
    url, seen = endpoint(honest)
    judge = EndpointJudge(url, "m", "harmfulness", api_key="secret")
    assert judge(ITEMS) == [True, False, True]
    assert {(path, key) for path, key, _ in seen} == {("/v1/chat/completions", "Bearer secret")}
    bodies = [body for *_, body in seen]
    assert all(body["model"] == "m" and body["temperature"] == 0 for body in bodies)
    assert all(RUBRICS["harmfulness"].text in body["messages"][0]["content"] for body in bodies)
    assert judge.name == "m, rubric harmfulness" and "it is left" not in bodies[0]["messages"][0]["content"]
    assert "it is left" in EndpointJudge(url, "m", "truthfulness").prompt(ITEMS[0])


def test_no_key_is_sent_where_there_is_none(endpoint):
    url, seen = endpoint(honest)
    EndpointJudge(url + "/chat/completions", "m", "harmfulness")(ITEMS[:1])
    assert seen[0][:2] == ("/v1/chat/completions", None)


def test_verdicts_are_kept_and_not_asked_for_again(endpoint, tmp_path):
    url, seen = endpoint(honest)
    keep = tmp_path / "v" / "harmfulness.jsonl"
    assert EndpointJudge(url, "m", "harmfulness", keep=keep)(ITEMS) == [True, False, True]
    with keep.open("a") as file:
        file.write('{"key": "cut sho')
    assert EndpointJudge(url, "m", "harmfulness", keep=keep)([*ITEMS, ITEMS[1]]) == [True, False, True, False]
    assert len(seen) == 3
    EndpointJudge(url, "other", "harmfulness", keep=keep)(ITEMS)
    assert len(seen) == 6


def test_a_busy_endpoint_is_asked_again(endpoint):
    url, seen = endpoint(
        lambda body, count: honest(body, count) if count > 2 else ((500, "oops"), (429, "slow"))[count - 1]
    )
    assert EndpointJudge(url, "m", "harmfulness")(ITEMS[:1]) == [True]
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, "oops"), "HTTP 500"),
        ((200, "<html>"), "no chat completion"),
        ((200, '{"choices": []}'), "no chat completion"),
        ((200, "[1]"), "no chat completion"),
        ((401, "bad key"), "HTTP 401: bad key"),
    ],
)
def test_an_endpoint_that_fails_is_named_and_partial_work_kept(endpoint, tmp_path, reply, message):
    url, _ = endpoint(lambda body, count: honest(body, count) if "here is how" in str(body) else reply)
    keep = tmp_path / "kept.jsonl"
    EndpointJudge(url, "m", "harmfulness", keep=keep)(ITEMS[1:2])
    judge = EndpointJudge(url, "m", "harmfulness", keep=keep)
    with pytest.raises(JudgeError, match=f"{message}.* 1 verdicts are kept in kept.jsonl.*run the same command again"):
        judge(ITEMS)
    assert len(keep.read_text().splitlines()) == 1


def test_an_endpoint_that_is_down_is_named():
    with pytest.raises(JudgeError, match=r"127.0.0.1:9/v1/chat/completions gave no verdict \(ConnectError"):
        EndpointJudge("http://127.0.0.1:9/v1", "m", "harmfulness")(ITEMS)
    with pytest.raises(JudgeError, match=r"gave no verdict|no address"):
        EndpointJudge("nonsense", "m", "harmfulness")(ITEMS)


@pytest.mark.parametrize("text", ["perhaps", "SAFE or HARMFUL, who knows", "", "UNSAFE"])
def test_a_reply_without_one_label_is_no_verdict_and_is_asked_again_next_time(endpoint, tmp_path, text):
    url, seen = endpoint(lambda *_: said(text))
    for turn in (1, 2):
        judge = EndpointJudge(url, "m", "harmfulness", keep=tmp_path / "k.jsonl")
        assert judge(ITEMS[:1]) == [None] and len(seen) == turn * ATTEMPTS


@pytest.mark.parametrize("rubric", RUBRICS)
def test_every_rubrics_labels_are_told_apart(rubric):
    judge, found = EndpointJudge("http://x/v1", "m", rubric), RUBRICS[rubric]
    assert judge._parse(found.yes.title()) is True and judge._parse(f"**{found.no}**") is False
    assert found.yes in judge.prompt(ITEMS[0]) and found.no in judge.prompt(ITEMS[0])
