"""What the orchestrator and an engine's process say to each other: one JSON object a line, over stdin and stdout.

The process says `READY` once it has loaded, then answers each request with the times of one round. Standard library only:
peers run in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Literal

READY = {"ready": True}
CONTEXT_LENGTH = 1024
NUM_SPECIAL_TOKENS = 3

Steering = Literal["off", "open", "closed"]


@dataclass(frozen=True)
class RoundRequest:
    """`concurrency` prompts that arrive at once; each gets exactly `new_tokens` greedy tokens. Peers know no `steering`."""

    concurrency: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    steering: Steering = "off"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Distinct prompts of random ordinary tokens, the same for the same seed."""
        source = random.Random(self.seed)
        tokens = range(NUM_SPECIAL_TOKENS, vocab_size)
        return [source.choices(tokens, k=self.prompt_tokens) for _ in range(self.concurrency)]


@dataclass(frozen=True)
class RoundReply:
    """Times of one round, as one who reads the tokens sees them; CPU time is the process's, all threads and children.

    Attributes:
        ttft_s: per request, from the arrival of all to its first token.
        decode_s, decode_cpu_s, decode_tokens: from the moment at which every request has its first token to the end.
        wall_s, cpu_s, tokens: of the whole round.
    """

    ttft_s: list[float]
    decode_s: float
    decode_cpu_s: float
    decode_tokens: int
    wall_s: float
    cpu_s: float
    tokens: int


class Stopwatch:
    """Started when the requests arrive, told of each token, asked for the reply at the end."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._first: dict[int, float] = {}
        self._tokens = 0
        self._cpu = cpu_seconds()
        self._start = time.perf_counter()
        self._decode_from: tuple[float, float, int] | None = None

    def count(self, index: int, tokens: int = 1) -> None:
        """`tokens` new tokens of request `index` are here."""
        self._tokens += tokens
        if index not in self._first:
            now = time.perf_counter()
            self._first[index] = now - self._start
            if len(self._first) == self._concurrency:
                self._decode_from = (now, cpu_seconds(), self._tokens)

    def reply(self) -> RoundReply:
        """The round's times, with now as its end."""
        end, cpu = time.perf_counter(), cpu_seconds()
        if self._decode_from is None:
            raise RuntimeError(f"{len(self._first)} of {self._concurrency} requests got a token")
        decode_start, decode_cpu, decode_seen = self._decode_from
        return RoundReply(
            ttft_s=[self._first[index] for index in range(self._concurrency)],
            decode_s=end - decode_start,
            decode_cpu_s=cpu - decode_cpu,
            decode_tokens=self._tokens - decode_seen,
            wall_s=end - self._start,
            cpu_s=cpu - self._cpu,
            tokens=self._tokens,
        )


def cpu_seconds() -> float:
    """CPU time of this process, its threads, and the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def arguments() -> argparse.ArgumentParser:
    """The options of every engine's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-concurrency", type=int, required=True)
    return parser


def serve(load: Callable[[], AbstractContextManager[Callable[[RoundRequest], RoundReply]]]) -> None:
    """Load the engine and play rounds until stdin ends. What libraries print goes to stderr, stdout is the protocol's."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with load() as play:
        print(json.dumps(READY), file=answers)
        for line in sys.stdin:
            print(json.dumps(asdict(play(RoundRequest(**json.loads(line))))), file=answers)
