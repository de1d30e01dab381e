"""What docker/fleet's nginx does with a request, seen by servers that are stand-ins: `pytest tests/e2e/test_fleet_nginx.py`."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn

from server.api.dependencies import MAX_BODY_BYTES
from server.config import ServerConfig
from server.connection import MAX_HEAD_BYTES
from tests.fleet import CONFIGURATION, NGINX, Balancer, balancer

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx)")
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
Answer = Callable[[socket.socket], None]
numbers = itertools.count()


def whole(status: int, body: bytes = b"{}") -> Answer:
    headers = {"content-length": len(body), "content-type": "application/json", "connection": "close"}
    head = "".join([f"HTTP/1.1 {status} -\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items()), "\r\n"]).encode()
    return lambda client: client.sendall(head + body)


def begun_and_broken(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata: \r\n")


def gone(client: socket.socket) -> None:
    """Not a byte of an answer."""


@dataclass
class StandIn:
    """A server that reads whole requests and answers each in the same way; then the connection ends."""

    answer: Answer = field(default_factory=lambda: whole(200))
    requests: list[bytes] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
            yield f"127.0.0.1:{listener.getsockname()[1]}"

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as reader, contextlib.suppress(OSError):
            head = b"".join(iter(reader.readline, b"\r\n"))
            length = re.search(rb"content-length: (\d+)", head, re.I)
            self.requests.append(head + reader.read(int(length[1]) if length else 0))
            self.answer(client)


@dataclass
class Stage:
    """nginx before two stand-ins."""

    balancer: Balancer
    servers: dict[str, StandIn]

    def send(self, body: object = None, path: str = CHAT, method: str = "POST", **headers: str) -> httpx.Response:
        """With an id that is new."""
        content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        headers = {"X-Request-Id": f"test-{next(numbers)}"} | headers
        return httpx.request(method, self.balancer.url + path, content=content, headers=headers, timeout=30)

    def entry(self, *arguments: object, **options: str) -> dict:
        """What the access log says of such a request."""
        return self.balancer.entry(self.send(*arguments, **options).request.headers["X-Request-Id"])

    def key(self, *arguments: object, **options: str) -> str:
        return self.entry(*arguments, **options)["key"]

    def first(self, path: str = CHAT) -> tuple[bytes, StandIn, StandIn]:
        """A body, the server that it goes to, and the other one."""
        body = json.dumps({"messages": [user(f"question {next(numbers)}")]}).encode()
        [asked] = self.entry(body, path)["server"]
        [other] = set(self.servers) - {asked}
        return body, self.servers[asked], self.servers[other]


@pytest.fixture
def stage(tmp_path) -> Iterator[Stage]:
    with stage_with(tmp_path / "nginx") as found:
        yield found


@contextlib.contextmanager
def stage_with(folder: Path, *changes: tuple[str, str]) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        servers = {}
        for _ in range(2):
            server = StandIn()
            servers[stack.enter_context(server.listening())] = server
        found = Stage(stack.enter_context(balancer(folder, tuple(servers), *changes)), servers)
        yield found
        for server in servers.values():
            server.requests.clear()


def user(text: object) -> dict:
    return {"role": "user", "content": text}


# ---- the key ---------------------------------------------------------------------------------------------------------

KIND = {"role": "system", "content": "You are kind."}
TURNS = [user("Hello"), {"role": "assistant", "content": 'I said "role":"user"'}, user("More")]
SAME = {
    "one turn": {"model": "demo", "messages": [KIND, TURNS[0]]},
    "three turns": {"model": "demo", "messages": [KIND, *TURNS], "stream": True},
    "messages first": {"messages": [KIND, TURNS[0]], "model": "demo"},
    "content first": {"messages": [{k: m[k] for k in ("content", "role")} for m in (KIND, *TURNS)]},
    "parts": {"messages": [KIND, user([{"type": "text", "text": "Hello"}])]},
    "parts, text first": {"messages": [KIND, user([{"text": "Hello", "type": "text"}])]},
    "parts, all turned around": {
        "messages": [{"content": [{"text": m["content"], "type": "text"}], "role": m["role"]} for m in (KIND, TURNS[0])]
    },
    "names": {"messages": [{"role": "system", "name": "x", "content": "You are kind."}, user("Hello")]},
    "developer": {"messages": [KIND | {"role": "developer"}, user("Hello")]},
    "tools before it": {
        "tools": [{"type": "function", "function": {"name": "f", "description": '"role": "user", "content": "no"'}}],
        "messages": [KIND, user("Hello")],
    },
    "steering": {"steer_strength": 2, "messages": [KIND, user("Hello")], "steer_metadata": "full"},
    "another model name": {"model": "demo:unsteered", "messages": [KIND, user("Hello")]},
    "input items": {
        "input": [{"type": "message", "role": "developer", "content": "You are kind."}, user("Hello")],
        "store": False,
    },
    "instructions": {"input": "Hello", "instructions": "You are kind.", "store": False},
    "input parts": {
        "instructions": "You are kind.",
        "store": False,
        "input": [user([{"type": "input_text", "text": "Hello"}])],
    },
}
OTHER = {
    "another question": {"messages": [KIND, user("Hello!")]},
    "another system prompt": {"messages": [{"role": "system", "content": "You are curt."}, user("Hello")]},
    "no system prompt": {"messages": [user("Hello")]},
    "the system's text in the question": {"messages": [user("You are kind.|Hello, you")]},
}


def path_of(body: dict) -> str:
    return RESPONSES if "input" in body else CHAT


def test_what_begins_alike_has_one_key_however_it_is_written(stage):
    for name, body in SAME.items():
        assert stage.key(body, path_of(body)) == "You are kind.|Hello", name
        assert stage.key(json.dumps(body, indent=2).encode(), path_of(body)) == "You are kind.|Hello", (
            f"{name}, indented"
        )
    for name, body in OTHER.items():
        assert stage.key(body) != "You are kind.|Hello", name


def test_text_completions_have_the_first_prompts_beginning(stage):
    long = "x" * 300
    for body, key in (
        ({"prompt": "Once"}, "|Once"),
        ({"model": "demo", "prompt": ["Once", "Twice"]}, "|Once"),
        ({"prompt": long + "a"}, "|" + 256 * "x"),
        ({"prompt": [5, 6, 7], "n": 1}, "|5, 6, 7"),
        ({"prompt": [[5, 6, 7], [8]]}, "|5, 6, 7"),
    ):
        assert stage.key(body, TEXT) == key


def test_long_texts_count_by_their_beginning_and_escapes_do_not_end_them(stage):
    for text in ("ä" * 3000, 'say "no"\n' * 400, "\\" * 3000, '\\"' * 2000):
        written = json.dumps(text, ensure_ascii=False)[1:-1]
        for message in (user(text), {"content": text, "role": "user"}):
            key = stage.key({"messages": [{"role": "system", "content": text}, message]})
            beginning = key.partition("|")[0].encode(errors="replace").decode()
            assert written.startswith(beginning.rstrip("�")) and 500 < len(beginning) <= 2048
            assert key.count("|") == 1 and key.partition("|")[0] == key.partition("|")[2]


def test_a_client_may_name_what_belongs_together(stage):
    asked = {"messages": [user("a")], "prompt_cache_key": "tenant 7"}
    assert stage.key(asked) == stage.key(asked | {"messages": [user("b")]}) == "named: tenant 7"
    assert stage.key(asked | {"prompt_cache_key": None}) == "|a"


def test_what_holds_no_prompt_goes_anywhere(stage):
    for body, path, method in (({"a": 1}, CHAT, "POST"), (None, "/v1/models", "GET"), (b"no json", TEXT, "POST")):
        keys = {stage.key(body, path, method) for _ in range(5)}
        assert len(keys) == 5 and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_responses_that_are_stored_go_by_their_api_key(stage):
    alice = {"Authorization": "Bearer alice"}
    said = {"input": "Hello"}
    assert stage.key(said, RESPONSES, **alice) == "key: Bearer alice"
    assert stage.key(said | {"store": True}, RESPONSES, **alice) == "key: Bearer alice"
    assert stage.key(said | {"store": False}, RESPONSES, **alice) == "|Hello"
    for reference in ({"previous_response_id": "resp_1"}, {"input": [{"type": "item_reference", "id": "msg_1"}]}):
        assert stage.key(said | {"store": False} | reference, RESPONSES, **alice) == "key: Bearer alice"
    for path in (f"{RESPONSES}/resp_1", f"{RESPONSES}/resp_1/input_items"):
        assert stage.key(None, path, "GET", **alice) == "key: Bearer alice"
    assert stage.key({"messages": [user("Hello")]}, **alice) == "|Hello"


def test_bodies_up_to_the_servers_limit_have_their_key_and_none_is_slow(stage):
    room = MAX_BODY_BYTES - 200
    text = "y" * room
    assert stage.key({"messages": [user(text)]}) == stage.key({"messages": [{"content": text, "role": "user"}]})
    assert len(stage.key({"messages": [user(text)]})) == 1025
    for piece in (
        '"content":"',
        '"role":"user","name":"a",',
        '"content":"a","name":"b",',
        "[",
        " ",
        '"content":' + 99 * " ",
    ):
        hostile = (piece * (room // len(piece))).encode()
        begun = time.monotonic()
        assert re.fullmatch("[0-9a-f]{32}", stage.key(hostile))
        assert time.monotonic() - begun < 5, f"{piece!r}: the search for the key takes long"


def test_a_body_sent_in_pieces_has_its_key_too(stage):
    body = json.dumps({"messages": [user("Hello")]}).encode()
    pieces = (body[n : n + 7] for n in range(0, len(body), 7))
    headers = {"X-Request-Id": f"test-{next(numbers)}", "Content-Type": "application/json"}
    assert httpx.post(stage.balancer.url + CHAT, content=pieces, headers=headers).status_code == 200
    assert stage.balancer.entry(headers["X-Request-Id"])["key"] == "|Hello"


def test_two_balancers_choose_alike(stage, tmp_path):
    with balancer(tmp_path / "another", tuple(stage.servers)) as another:
        for number in range(20):
            body = {"messages": [user(f"question {number}")]}
            assert stage.entry(body)["server"] == Stage(another, stage.servers).entry(body)["server"]


# ---- what passes ---------------------------------------------------------------------------------------------------


def received(stage: Stage) -> dict[str, str]:
    """The headers of the last request that any server has got."""
    [request] = [server.requests[-1] for server in stage.servers.values() if server.requests]
    lines = request.split(b"\r\n\r\n")[0].decode().splitlines()[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if ": " in line)}


def test_headers_say_who_asked_and_by_which_id(tmp_path):
    for number, (sent, kept) in enumerate((("abc-1", "abc-1"), ("not sane", None), (None, None))):
        with stage_with(tmp_path / f"{number}") as stage:
            for server in stage.servers.values():
                server.requests.clear()
            headers = {"X-Forwarded-For": "10.1.1.1", "Authorization": "Bearer k", "Host": "llm.example.com"}
            httpx.post(stage.balancer.url + CHAT, json={}, headers=headers | ({"X-Request-Id": sent} if sent else {}))
            got = received(stage)
            assert got["x-request-id"] == kept or (kept is None and re.fullmatch("[0-9a-f]{32}", got["x-request-id"]))
            assert got["x-forwarded-for"] == "10.1.1.1, 127.0.0.1" and got["x-forwarded-proto"] == "http"
            assert got["x-forwarded-host"] == got["host"] == "llm.example.com"
            assert got["authorization"] == "Bearer k" and "connection" not in got


def test_limits_are_the_servers(stage):
    assert stage.send(b"x" * MAX_BODY_BYTES).status_code == 200
    refused = stage.send(b"x" * (MAX_BODY_BYTES + 1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert refused.headers["X-Request-Id"] == refused.request.headers["X-Request-Id"]
    assert stage.send({}, **{"X-Long": "a" * (MAX_HEAD_BYTES - 1000)}).status_code == 200


def test_the_numbers_are_the_servers_own():
    text, config = CONFIGURATION.read_text(), ServerConfig(model="m", served_model_name="m")

    def said(directive: str) -> int:
        """In seconds, or bytes."""
        [(number, unit)] = re.findall(rf"^ *{directive} (?:\d+ )?(\d+)([smk])?;", text, re.M)
        return int(number) * {"": 1, "s": 1, "m": 2**20, "k": 2**10}[unit]

    assert said("client_max_body_size") == said("client_body_buffer_size") == MAX_BODY_BYTES
    assert said("large_client_header_buffers") == MAX_HEAD_BYTES
    assert said("client_header_timeout") == said("client_body_timeout") == config.read_timeout_s
    assert said("send_timeout") == config.stall_timeout_s
    assert said("proxy_next_upstream_timeout") == config.request_timeout_s < said("proxy_read_timeout")
    [idle] = re.findall(r"upstream finesteer \{.*?keepalive_timeout (\d+)s;", text, re.S)
    assert int(idle) < uvicorn.Config(app=lambda: None).timeout_keep_alive
    for limit in re.findall(r"max_conns=(\d+)", text):
        assert config.max_num_seqs < int(limit) < config.max_num_seqs + config.max_waiting


ADMINISTRATION = (
    "/v1/steering/profiles/load",
    "/v1/steering/profiles/unload",
    "/v1/steering/defaults",
    "/v1/steering/defaults/",
    "/v1//steering/defaults",
    "/v1/steering/profiles/%6coad",
    "/v1/steering%2fdefaults",
    "/v1/x/../steering/defaults",
    "/v1/steering/./defaults",
    "/v1/steering/defaults?x=1",
    "/v1/steering/defaults%0a",
    "/v1/steering/defaults;x",
    "/metrics",
    "/v1/../metrics",
    "/v1/%2e%2e/metrics",
    "/metrics/",
    "/",
    "/page/watch.js",
    "/redoc",
)


def test_what_is_not_for_clients_reaches_no_server(stage):
    for server in stage.servers.values():
        server.requests.clear()
    for path in ADMINISTRATION:
        for method in ("GET", "PUT", "POST"):
            connection = http.client.HTTPConnection(
                stage.balancer.url.removeprefix("http://")
            )  # sends paths as they are
            connection.request(method, path, body=b"{}", headers={"Authorization": "Bearer boss"})
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (404, "unknown_url"), path
            connection.close()
    assert not any(server.requests for server in stage.servers.values())


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/steering/profiles/loader", "/v1/steering/profiles/safety/report", "/v1/steering/score", "/v1/responses"),
        *("/v1/models/demo", "/tokenize", "/detokenize", "/docs", "/openapi.json", "/health", "/ready", "/version"),
    ],
)
def test_what_is_for_clients_does(stage, path):
    assert stage.send({}, path).status_code == 200


# ---- a second try --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "told"), [(gone, "502"), (whole(503), "503")])
def test_what_was_refused_or_broke_off_is_sent_to_the_other_server_once(stage, answer, told):
    body, ill, well = stage.first()
    ill.answer = answer
    for server in (ill, well):
        server.requests.clear()
    response = stage.send(body)
    assert response.status_code == 200 and (len(ill.requests), len(well.requests)) == (1, 1)
    assert ill.requests[0].partition(b"\r\n\r\n")[2] == well.requests[0].partition(b"\r\n\r\n")[2]
    entry = stage.balancer.entry(response.request.headers["X-Request-Id"])
    assert entry["server_status"] == f"{told}, 200"


def test_both_are_asked_and_no_more(stage):
    body, ill, other = stage.first()
    ill.answer = other.answer = gone
    ill.requests.clear()
    other.requests.clear()
    response = stage.send(body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert response.headers["Retry-After"] == "1"
    assert (len(ill.requests), len(other.requests)) == (1, 1)


def test_never_after_a_part_of_the_answer(stage):
    body, ill, well = stage.first()
    ill.answer = begun_and_broken
    well.requests.clear()
    with pytest.raises(httpx.RemoteProtocolError):
        stage.send(body)
    assert not well.requests


@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 500, 504])
def test_other_answers_are_the_clients(stage, status):
    body, server, other = stage.first()
    server.answer = whole(status, b'{"error": "its own"}')
    other.requests.clear()
    response = stage.send(body)
    assert (response.status_code, response.json()) == (status, {"error": "its own"}) and not other.requests


def test_a_stored_response_is_looked_for_everywhere(stage):
    path = "/v1/responses/resp_1"
    [asked] = stage.entry(None, path, "GET")["server"]
    server, other = stage.servers[asked], *(s for name, s in stage.servers.items() if name != asked)
    server.answer = whole(404)
    assert stage.send(None, path, "GET").status_code == 200 and other.requests
    other.answer = whole(404, b'{"error": "nowhere"}')
    assert stage.send(None, path, "GET").json() == {"error": "nowhere"}


def test_an_ill_server_is_left_alone_for_a_while(stage):
    body, ill, _ = stage.first()
    ill.answer = gone
    ill.requests.clear()
    assert {stage.send(body).status_code for _ in range(20)} == {200}
    assert len(ill.requests) == 3  # max_fails
    ill.answer = whole(200)
    time.sleep(5.5)  # fail_timeout
    assert stage.send(body).status_code == 200 and len(ill.requests) == 4


def test_a_beginning_that_all_share_overflows(tmp_path):
    """At max_conns the next server is asked, and where all are full the client is told to come again."""
    with stage_with(tmp_path / "nginx", *((f"800{n} max_conns=256", f"800{n} max_conns=2") for n in (1, 2))) as stage:
        hold = threading.Event()

        def slow(client: socket.socket) -> None:
            hold.wait(20)
            whole(200)(client)

        for server in stage.servers.values():
            server.answer = slow
            server.requests.clear()
        statuses: list[int] = []
        asking = [
            threading.Thread(target=lambda: statuses.append(stage.send({"messages": [user("same")]}).status_code))
            for _ in range(4)
        ]
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + 10
        while sum(len(s.requests) for s in stage.servers.values()) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [len(server.requests) for server in stage.servers.values()] == [2, 2]
        full = stage.send({"messages": [user("same")]})
        hold.set()
        for thread in asking:
            thread.join()
        assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
        assert statuses == [200] * 4
