"""What a second server behind docker/fleet's nginx adds, and what nginx itself costs: `python -m tests.benchmarks.fleet`.

Demo servers of one thread each, one and two of them in turn, so that a busy machine slows both; beside them one of two
threads, asked directly. Clients and nginx share the cores. Needs nginx.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.fleet import balancer
from tests.serving import launched

SECOND = "server 127.0.0.1:8002 max_conns"
BODY = {"model": "demo", "max_tokens": 64, "ignore_eos": True, "temperature": 0}
numbers = itertools.count()


def ask(http: httpx.Client, tokens: int = BODY["max_tokens"]) -> int:
    """A question that nobody has asked; its tokens."""
    messages = [{"role": "user", "content": f"{next(numbers)}: what is the water cycle?"}]
    answer = http.post("/v1/chat/completions", json=BODY | {"messages": messages, "max_tokens": tokens})
    return answer.raise_for_status().json()["usage"]["completion_tokens"]


def tokens_per_second(url: str, clients: int, seconds: float) -> float:
    done: list[int] = []
    end = time.monotonic() + seconds

    def work() -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while time.monotonic() < end:
                done.append(ask(http))

    begun = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - begun)


def milliseconds(url: str, count: int) -> list[float]:
    """Of answers of one token, one at a time."""
    with httpx.Client(base_url=url, timeout=60) as http:
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            ask(http, 1)
            times.append(1e3 * (time.perf_counter() - begun))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement")
    parser.add_argument("--clients", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)

        def start(name: str, threads: int) -> str:
            options = ("--num-threads", str(threads), "--no-ui")
            running = launched(*options, log=folder / f"{name}.log", OMP_NUM_THREADS=str(threads))
            return stack.enter_context(running)[1]

        alone, other = start("first", 1), start("second", 1)
        names = [url.removeprefix("http://") for url in (alone, other)]
        only = (SECOND, SECOND.replace("max_conns", "down max_conns"))
        ways = {
            "one server": stack.enter_context(balancer(folder / "one", names, only)).url,
            "two servers": stack.enter_context(balancer(folder / "two", names)).url,
            "one of two threads": start("wide", threads=2),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        direct, through = [], []
        for number in range(given.rounds):
            for way in sorted(ways, reverse=number % 2 == 1):
                rates[way].append(tokens_per_second(ways[way], given.clients, given.seconds))
            direct += milliseconds(alone, 20)
            through += milliseconds(ways["one server"], 20)
        for way, found in rates.items():
            ratios = sorted(rate / one for rate, one in zip(found, rates["one server"], strict=True))
            said = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{way}: {statistics.median(found):,.0f} tok/s; of one server's {said}")
        print(
            f"one token, direct {statistics.median(direct):.1f} ms, through nginx {statistics.median(through):.1f} ms; "
            f"the fastest {min(direct):.1f} and {min(through):.1f}"
        )


if __name__ == "__main__":
    main()
