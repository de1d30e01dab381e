"""Rounds → numbers → table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from tests.benchmarks.engines import REFERENCE
from tests.benchmarks.protocol import RoundReply


@dataclass(frozen=True)
class Round:
    """One engine's reply in one repeat."""

    model: str
    concurrency: int
    engine: str
    repeat: int
    reply: RoundReply


@dataclass(frozen=True)
class Summary:
    """A row of the table: medians over the repeats, TTFT over all requests of all repeats.

    The last three say how many times as fast as this engine ours is: the median over the repeats of the quotient within a
    repeat; None where ours did not run.
    """

    model: str
    concurrency: int
    engine: str
    repeats: int
    decode_per_wall_s: float
    decode_per_cpu_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    ours_decode_wall: float | None
    ours_decode_cpu: float | None
    ours_ttft: float | None


def summarise(rounds: Iterable[Round]) -> list[Summary]:
    """One summary for each model, concurrency and engine, in the order of their first rounds."""
    groups: dict[tuple[str, int, str], dict[int, RoundReply]] = {}
    for entry in rounds:
        groups.setdefault((entry.model, entry.concurrency, entry.engine), {})[entry.repeat] = entry.reply
    return [_summary(*key, replies, groups.get((*key[:2], REFERENCE), {})) for key, replies in groups.items()]


def table(model: str, summaries: Iterable[Summary]) -> Table:
    """The summaries of one model."""
    grid = Table(title=model)
    for heading in (
        "c",
        "engine",
        "decode tok/s, wall",
        "tok/s, CPU",
        "TTFT p50 ms",
        "p99 ms",
        "ours ×: wall",
        "CPU",
        "TTFT",
    ):
        grid.add_column(heading, justify="left" if heading == "engine" else "right")
    concurrency = None
    for row in summaries:
        if row.model != model:
            continue
        if concurrency not in (None, row.concurrency):
            grid.add_section()
        concurrency = row.concurrency
        rates = (row.decode_per_wall_s, row.decode_per_cpu_s, row.ttft_p50_ms, row.ttft_p99_ms)
        ratios = (row.ours_decode_wall, row.ours_decode_cpu, row.ours_ttft)
        grid.add_row(
            str(row.concurrency),
            row.engine,
            *(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in rates),
            *("–" if value is None else f"{value:.2f}" for value in ratios),
        )
    return grid


def _summary(
    model: str, concurrency: int, engine: str, replies: dict[int, RoundReply], ours: dict[int, RoundReply]
) -> Summary:
    paired = [(ours[repeat], reply) for repeat, reply in replies.items() if repeat in ours]

    def advantage(speed: Callable[[RoundReply], float]) -> float | None:
        return float(np.median([speed(mine) / speed(theirs) for mine, theirs in paired])) if paired else None

    ttft_ms = 1e3 * np.concatenate([reply.ttft_s for reply in replies.values()])
    return Summary(
        model,
        concurrency,
        engine,
        repeats=len(replies),
        decode_per_wall_s=float(np.median([_wall(reply) for reply in replies.values()])),
        decode_per_cpu_s=float(np.median([_cpu(reply) for reply in replies.values()])),
        ttft_p50_ms=float(np.percentile(ttft_ms, 50)),
        ttft_p99_ms=float(np.percentile(ttft_ms, 99)),
        ours_decode_wall=advantage(_wall),
        ours_decode_cpu=advantage(_cpu),
        ours_ttft=advantage(_promptness),
    )


def _wall(reply: RoundReply) -> float:
    return reply.decode_tokens / reply.decode_s


def _cpu(reply: RoundReply) -> float:
    return reply.decode_tokens / reply.decode_cpu_s


def _promptness(reply: RoundReply) -> float:
    return 1 / float(np.median(reply.ttft_s))
