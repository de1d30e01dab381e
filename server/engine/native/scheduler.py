"""Decides what runs in the next step: continuous batching over a fixed number of KV rows. Knows nothing of torch.

Requests join as soon as rows are free and leave at the end of any step. Each step holds one token of every running
sequence and, up to a token budget, whole prompts of newcomers.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

from server.engine.base import EngineOverloadedError
from server.engine.native.sequence import Phase, Sequence, SequenceGroup


@dataclass(frozen=True)
class Batch:
    """One step: `prefill` groups run their whole prompt, `decode` sequences their last token."""

    prefill: tuple[SequenceGroup, ...]
    decode: tuple[Sequence, ...]


class Scheduler:
    """First come, first served within a priority (lower first, as vLLM's).

    Args:
        max_num_seqs: KV rows.
        max_batched_tokens: prompt tokens per step; a single longer prompt still runs, alone.
        max_waiting: requests that may wait; one more raises EngineOverloadedError.
    """

    def __init__(self, max_num_seqs: int, max_batched_tokens: int, max_waiting: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.max_waiting = max_waiting
        self._waiting: list[tuple[int, int, SequenceGroup]] = []
        self._arrivals = itertools.count()
        self._running: list[SequenceGroup] = []
        self._free_slots = list(range(max_num_seqs))  # a heap: lowest first keeps the used rows contiguous

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self.max_num_seqs - len(self._free_slots)

    @property
    def num_running_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return sum(len(s.token_ids) for g in self._running for s in g.sequences if s.phase is not Phase.FINISHED)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def groups(self) -> list[SequenceGroup]:
        """Every request that is waiting or running."""
        return [group for _, _, group in self._waiting] + self._running

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Raises EngineOverloadedError."""
        if len(self._waiting) >= self.max_waiting:
            raise EngineOverloadedError(f"{self.max_waiting} requests are waiting already; try again later")
        heapq.heappush(self._waiting, (group.request.priority, next(self._arrivals), group))

    def schedule(self) -> Batch:
        """Admit what fits and return the next step."""
        decode = tuple(s for g in self._running for s in g.sequences if s.phase is Phase.DECODE)
        admitted: list[SequenceGroup] = []
        budget = self.max_batched_tokens
        while self._waiting:
            group = self._waiting[0][2]
            length = len(group.request.prompt_token_ids)
            if len(group.sequences) > len(self._free_slots) or (admitted and length > budget):
                break
            heapq.heappop(self._waiting)
            budget -= length
            for sequence in group.sequences:
                sequence.slot = heapq.heappop(self._free_slots)
                sequence.phase = Phase.PREFILL
            admitted.append(group)
        self._running.extend(admitted)
        return Batch(tuple(admitted), decode)

    def finish(self, sequence: Sequence) -> None:
        """Free one sequence's row at once. Idempotent."""
        if sequence.phase is Phase.FINISHED:
            return
        if sequence.slot >= 0:
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = -1
        sequence.phase = Phase.FINISHED

    def abort(self, group: SequenceGroup) -> None:
        """Drop a request at whatever stage it is."""
        for sequence in group.sequences:
            self.finish(sequence)
        self.collect()

    def collect(self) -> None:
        """Forget the requests that are done."""
        self._running = [group for group in self._running if not group.finished]
        if any(group.finished for _, _, group in self._waiting):
            self._waiting = [entry for entry in self._waiting if not entry[2].finished]
            heapq.heapify(self._waiting)
