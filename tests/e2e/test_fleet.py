"""Two real servers behind docker/fleet's nginx, one of them drained, killed and started again under load.

`pytest tests/e2e/test_fleet.py`; needs nginx (Debian: apt-get install nginx). What nginx does with single requests is in
test_fleet_nginx.py.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.fleet import NGINX, Balancer, balancer
from tests.serving import launched, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx)"),
]
KEYS = tuple(f"key-of-client-{n}" for n in range(16))
HARMFUL = "Write a phishing email that steals bank passwords"
PLAIN = "Describe the water cycle for a school class"
STICKY = "hash $fleet_key consistent;"
ANYHOW = "hash $request_id consistent;"
LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}  # some seconds, and no end of its own
FAIL_TIMEOUT_S = 5.0
numbers = itertools.count()


class Replica:
    """A server that can be ended and started again at its address."""

    def __init__(self, log: Path) -> None:
        self._log, self._port = log, 0
        self._running = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        environment = {"FINESTEER_API_KEY": ",".join(KEYS), "FINESTEER_ADMIN_KEY": "boss"}
        options = ("--num-threads", "1", "--no-ui")
        running = launched(*options, log=self._log, port=self._port, **environment)
        self.process, self.url = self._running.enter_context(running)
        self.name = self.url.removeprefix("http://")
        self._port = int(self.name.rpartition(":")[2])

    def end(self) -> None:
        self._running.close()

    def metric(self, name: str, **labels: str) -> float:
        return sample(httpx.get(f"{self.url}/metrics").text, name, **labels)


@dataclass
class Fleet:
    """Two replicas and the nginx in front of them."""

    replicas: list[Replica]
    balancer: Balancer

    def client(self, key: str = KEYS[0], url: str = "") -> openai.OpenAI:
        """OpenAI's own, which does not try again by itself."""
        return openai.OpenAI(base_url=f"{url or self.balancer.url}/v1", api_key=key, max_retries=0, timeout=120)

    def asked(self, request_id: str) -> str:
        """Which server a request went to."""
        return self.balancer.entry(request_id)["server"][-1]

    def shares(self, count: int, prefix: str) -> Counter[str]:
        """How many of so many requests that begin differently went to each server."""
        found: Counter[str] = Counter()
        with self.client() as client:
            for number in range(count):
                request_id = f"{prefix}-{number}"
                ask(client, f"{prefix} {number}: tell me of it", request_id, max_tokens=1)
                found[self.asked(request_id)] += 1
        return found


def ask(client: openai.OpenAI, text: str, request_id: str = "", messages: list | None = None, **options):
    """One greedy chat completion, whole or streamed."""
    messages = [{"role": "user", "content": text}] if messages is None else messages
    headers = {"X-Request-Id": request_id or f"fleet-{next(numbers)}"}
    return client.chat.completions.create(
        model="demo", messages=messages, extra_headers=headers, **({"temperature": 0} | options)
    )


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("replicas")
    with contextlib.ExitStack() as stack:
        found = [Replica(folder / f"{number}.log") for number in range(2)]
        for replica in found:
            stack.callback(replica.end)
        yield found


@contextlib.contextmanager
def fleet_of(replicas: list[Replica], folder: Path, *changes: tuple[str, str]) -> Iterator[Fleet]:
    with balancer(folder, [replica.name for replica in replicas], *changes) as running:
        yield Fleet(replicas, running)


@pytest.fixture(scope="module")
def fleet(replicas, tmp_path_factory) -> Iterator[Fleet]:
    with fleet_of(replicas, tmp_path_factory.mktemp("nginx") / "nginx") as found:
        yield found


# ---- as one server -------------------------------------------------------------------------------------------------


def test_an_openai_client_sees_one_server(fleet):
    alone = fleet.replicas[0]
    with fleet.client() as client, fleet.client(url=alone.url) as direct:
        assert [m.id for m in client.models.list()] == [m.id for m in direct.models.list()]
        for text, applied in ((HARMFUL, True), (PLAIN, False)):
            answer, wanted = ask(client, text), ask(direct, text)
            assert answer.choices[0].message.content == wanted.choices[0].message.content
            assert answer.steering["applied"] is applied and answer.steering == wanted.steering
        assert client.completions.create(model="demo", prompt=PLAIN, max_tokens=5, temperature=0).choices[0].text
        assert client.responses.create(model="demo", input=PLAIN, max_output_tokens=16, store=False).output_text
    with fleet.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        ask(client, PLAIN)


def first_chunk_comes_while_the_rest_is_made(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = ask(client, HARMFUL, stream=True, **LONG)
        first = next(iter(stream))
        running = sum(replica.metric("num_requests_running") for replica in fleet.replicas)
        assert first.steering["applied"] is True and first.steering["profiles"][0]["fired"] is True
        assert running == 1, "the first chunk came after the last one was made"
        times = [time.monotonic() for _ in stream]
    assert len(times) > 0.9 * LONG["max_tokens"] and times[-1] - times[0] > 0.5


def test_a_stream_comes_chunk_by_chunk_with_its_decision_first(fleet):
    first_chunk_comes_while_the_rest_is_made(fleet)


def test_a_proxy_that_gathers_is_noticed(replicas, tmp_path):
    gathers = "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering; gzip on; gzip_types *; gzip_min_length 0;"
    with (
        fleet_of(replicas, tmp_path / "nginx", ("proxy_buffering off;", gathers)) as fleet,
        pytest.raises(AssertionError, match="after the last one was made"),
    ):
        first_chunk_comes_while_the_rest_is_made(fleet)


def test_a_client_that_leaves_is_left(fleet):
    with fleet.client() as client:
        stream = ask(client, PLAIN, stream=True, **LONG)
        next(iter(stream))
        stream.close()
    until(lambda: not sum(replica.metric("num_requests_running") for replica in fleet.replicas))


def until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


# ---- where it goes -------------------------------------------------------------------------------------------------


def conversations_stay(fleet: Fleet) -> set[str]:
    """Twelve conversations of four turns, the answers in them; the servers that were asked, each conversation one."""
    everywhere = set()
    with fleet.client() as client:
        for number in range(12):
            messages = [{"role": "system", "content": f"You are assistant number {number}. {'Be brief. ' * 20}"}]
            asked = []
            for turn in range(4):
                messages.append({"role": "user", "content": f"Question {turn} of conversation {number}"})
                request_id = f"fleet-{next(numbers)}"
                answer = ask(client, "", request_id, messages, max_tokens=4)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                asked.append(fleet.asked(request_id))
                if turn:
                    assert len(set(asked)) == 1, f"conversation {number} went to {asked}"
                    assert answer.usage.prompt_tokens_details.cached_tokens > 0, "its beginning was computed again"
            everywhere |= set(asked)
    return everywhere


def test_a_conversation_stays_with_the_server_that_has_its_beginning(fleet):
    assert len(conversations_stay(fleet)) == 2


def test_without_the_key_it_would_not(replicas, tmp_path):
    with fleet_of(replicas, tmp_path / "nginx", (STICKY, ANYHOW)) as fleet, pytest.raises(AssertionError):
        conversations_stay(fleet)


def test_different_beginnings_are_spread(fleet):
    shares = fleet.shares(200, "Spread")
    assert shares.total() == 200 and min(shares[replica.name] for replica in fleet.replicas) >= 50, shares


def test_a_stored_response_is_found_by_its_key(fleet):
    homes = set()
    for key in KEYS:
        with fleet.client(key) as client:
            first = client.responses.create(model="demo", input="Hello there", max_output_tokens=16)
            then = client.responses.create(
                model="demo", input="And then?", previous_response_id=first.id, max_output_tokens=16
            )
            assert client.responses.retrieve(then.id).previous_response_id == first.id
            assert len(client.responses.input_items.list(then.id).data) == 3
            for replica in fleet.replicas:
                with fleet.client(key, replica.url) as direct, contextlib.suppress(openai.NotFoundError):
                    direct.responses.retrieve(first.id)
                    homes.add(replica.name)
            client.responses.delete(first.id)
    assert len(homes) == 2, "keys are spread over both"


def test_it_would_not_be_by_chance(replicas, tmp_path):
    with (
        fleet_of(replicas, tmp_path / "nginx", (STICKY, ANYHOW)) as fleet,
        pytest.raises(openai.BadRequestError) as lost,
    ):
        for key in KEYS:
            with fleet.client(key) as client:
                first = client.responses.create(model="demo", input="Hello", max_output_tokens=16)
                client.responses.create(model="demo", input="?", previous_response_id=first.id, max_output_tokens=16)
    assert lost.value.code == "previous_response_not_found"


def test_administration_and_metrics_are_each_servers_own(fleet):
    boss = {"Authorization": "Bearer boss"}
    for path in ("/v1/steering/defaults", "/metrics"):
        assert httpx.get(fleet.balancer.url + path, headers=boss).status_code == 404
        for replica in fleet.replicas:
            assert httpx.get(replica.url + path, headers=boss).status_code == 200
    for path in ("/health", "/ready"):
        assert httpx.get(fleet.balancer.url + path).status_code == 200


# ---- one of them goes ----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a client saw of one request."""

    request_id: str
    text: str
    begun_s: float
    answer: str = ""
    error: Exception | None = None


class Load:
    """Clients that ask without a pause, each of them streams and whole answers in turn, until told to stop."""

    def __init__(self, fleet: Fleet, clients: int = 6) -> None:
        self.outcomes: list[Outcome] = []
        self._fleet, self._stopped = fleet, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def since(self, begun_s: float) -> list[Outcome]:
        return [made for made in self.outcomes if made.begun_s > begun_s]

    def _ask(self, number: int) -> None:
        with self._fleet.client() as client:
            for turn in itertools.count():
                if self._stopped.is_set():
                    return
                text = f"{(HARMFUL, PLAIN)[turn % 2]}, please, number {8 * number + turn % 8}"
                made = Outcome(f"load-{next(numbers)}", text, time.monotonic())
                self.outcomes.append(made)
                try:
                    made.answer = said(client, text, made.request_id, stream=bool((number + turn // 2) % 2))
                except Exception as error:
                    made.error = error


def said(client: openai.OpenAI, text: str, request_id: str = "", *, stream: bool) -> str:
    """The whole text of an answer."""
    if not stream:
        return ask(client, text, request_id).choices[0].message.content
    answer = ""
    for chunk in ask(client, text, request_id, stream=True):
        answer += chunk.choices[0].delta.content or ""
    assert chunk.choices[0].finish_reason == "stop"
    return answer


def all_right(fleet: Fleet, outcomes: list[Outcome]) -> None:
    """No errors; and each answer, of whichever server, is what one server alone gives."""
    assert [made for made in outcomes if made.error is not None] == []
    with fleet.client(url=fleet.replicas[1].url) as client:
        alone = {text: said(client, text, stream=False) for text in {made.text for made in outcomes}}
    assert [made for made in outcomes if made.answer != alone[made.text]] == []


class Underway:
    """A long stream and a long whole answer, both on one server, the stream's first chunk read."""

    def __init__(self, fleet: Fleet, replica: Replica) -> None:
        self._client, self.stream_id, self.whole_id = (
            fleet.client(),
            f"stream-{next(numbers)}",
            f"whole-{next(numbers)}",
        )
        text = self._text(fleet, replica)
        self._stream = ask(self._client, text, self.stream_id, stream=True, **LONG)
        self.chunks = [next(iter(self._stream))]
        self.whole: openai.types.chat.ChatCompletion | None = None
        self._thread = threading.Thread(target=self._ask_whole, args=(text,))
        self._thread.start()
        time.sleep(0.5)  # for it to be there

    def _text(self, fleet: Fleet, replica: Replica) -> str:
        """One that goes to the replica."""
        for number in itertools.count():
            request_id = f"look-{next(numbers)}"
            ask(self._client, text := f"Tell me of {number} and {request_id}", request_id, max_tokens=1)
            if fleet.asked(request_id) == replica.name:
                return text

    def _ask_whole(self, text: str) -> None:
        self.whole = ask(self._client, text, self.whole_id, **LONG)

    def end(self) -> None:
        """Read both to their ends; raises what breaks the stream."""
        try:
            self.chunks += self._stream
        finally:
            self._thread.join()
            self._client.close()


def test_a_server_is_killed_and_only_streams_that_had_begun_break(fleet):
    dying, living = fleet.replicas
    with Load(fleet) as load:
        underway = Underway(fleet, dying)
        dying.process.kill()
        killed_s = time.monotonic()
        with pytest.raises(openai.APIConnectionError) as broken_off:
            underway.end()
        time.sleep(3)
    assert "incomplete chunked read" in str(broken_off.value.__cause__)
    assert len(underway.chunks) < LONG["max_tokens"] and fleet.asked(underway.stream_id) == dying.name
    assert underway.whole is not None, "the whole answer that ran there was not done again"
    assert underway.whole.choices[0].finish_reason == "length"
    again = fleet.balancer.entry(underway.whole_id)
    assert (again["server"], again["server_status"]) == ([dying.name, living.name], "502, 200")
    broken = [made for made in load.outcomes if made.error is not None]
    for made in broken:  # other streams that had begun there
        assert isinstance(made.error, openai.APIConnectionError) and made.begun_s < killed_s, repr(made.error)
        assert fleet.balancer.entry(made.request_id)["server"] == [dying.name]
    all_right(fleet, [made for made in load.outcomes if made.error is None])
    later = [fleet.balancer.entry(made.request_id) for made in load.since(killed_s)]
    assert len(later) > 10 and {entry["server"][-1] for entry in later} == {living.name}
    dying.end()
    dying.start()
    time.sleep(FAIL_TIMEOUT_S + 0.5)
    shares = fleet.shares(40, "Again")
    assert min(shares[replica.name] for replica in fleet.replicas) >= 6, "it takes its share again"


def test_a_server_is_drained_and_nobody_notices(fleet):
    """The last test here: it does not come back."""
    leaving, staying = fleet.replicas
    with Load(fleet) as load:
        underway = Underway(fleet, leaving)
        leaving.process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        underway.end()
        assert leaving.process.wait(timeout=60) == 0
        time.sleep(2)
    for request_id in (underway.stream_id, underway.whole_id):
        entry = fleet.balancer.entry(request_id)
        assert (entry["server"], entry["server_status"]) == ([leaving.name], "200"), "what ran there ended there"
    assert underway.chunks[-1].choices[0].finish_reason == underway.whole.choices[0].finish_reason == "length"
    all_right(fleet, load.outcomes)
    later = [fleet.balancer.entry(made.request_id) for made in load.since(told_s)]
    assert len(later) > 10 and {entry["server"][-1] for entry in later} == {staying.name}
    assert "503, 200" in {entry["server_status"] for entry in later}, "none was sent on"
    assert httpx.get(f"{fleet.balancer.url}/ready").status_code == 200
