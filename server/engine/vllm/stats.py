"""vLLM's own counts, as this server's metrics take them."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.base import EngineStats


class StatsKeeper:
    """Sums up what each of vLLM's engine processes (data parallelism has several) last told.

    vLLM caches all layers of a prompt together, so both parts of `EngineStats` have the same counts.
    """

    def __init__(self) -> None:
        self._running: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._usage: dict[int, float] = {}
        self._queries = self._hits = self._preemptions = 0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """A logger for one engine process: what AsyncLLM takes as a factory."""
        keeper = self

        class Logger(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                keeper.record(engine_index, scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger()

    def record(self, engine: int, scheduler: Any, iteration: Any) -> None:
        """Take note of a step."""
        if scheduler is not None:
            self._running[engine] = scheduler.num_running_reqs
            self._waiting[engine] = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._usage[engine] = scheduler.kv_cache_usage
            self._queries += scheduler.prefix_cache_stats.queries
            self._hits += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            self._preemptions += iteration.num_preempted_reqs

    def stats(self, num_open: int) -> EngineStats:
        """`num_open`: requests that somebody waits for; those that no engine process has counted yet are waiting."""
        running, waiting = sum(self._running.values()), sum(self._waiting.values())
        usage = sum(self._usage.values()) / max(len(self._usage), 1)
        if num_open == 0:  # after an abort nothing is told until the next step
            running, waiting, usage = 0, 0, 0.0
        return EngineStats(
            num_running=running,
            num_waiting=max(waiting, num_open - running),
            kv_cache_usage=usage,
            num_preemptions=self._preemptions,
            prefix_cache_queries=(self._queries, self._queries),
            prefix_cache_hits=(self._hits, self._hits),
        )
