"""Decides what runs in the next step: continuous batching with chunked prefill. Knows nothing of torch.

Requests join as soon as a slot and KV blocks are free and leave at the end of any step. A prompt climbs the segments of
layers one after the other, all of its tokens through one before the first enters the next; each segment takes at most
`max_batched_tokens` a step, so running streams never wait for more than that many tokens of somebody's prompt.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.base import EngineOverloadedError
from server.engine.native.sequence import Phase, Sequence, SequenceGroup


@dataclass(frozen=True)
class Chunk:
    """Positions `start` to `stop` of a sequence, through the segment that it is in."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the segment is then done with the sequence's tokens."""
        return self.stop == len(self.sequence.token_ids)


@dataclass(frozen=True)
class Limits:
    """What may be in flight.

    Attributes:
        max_num_seqs: slots.
        max_batched_tokens: prompt tokens in one step, per segment of layers.
        max_waiting: requests that may queue; one more raises EngineOverloadedError.
        num_blocks, block_size: KV blocks of `block_size` positions that running sequences may hold.
    """

    max_num_seqs: int
    max_batched_tokens: int
    max_waiting: int
    num_blocks: int
    block_size: int


class Scheduler:
    """First come, first served within a priority (lower first, as vLLM's).

    Where running sequences outgrow the KV blocks, the one that is last in that order goes back to the queue, keeps its tokens
    and its steering, and is prefilled again later.

    Args:
        reserve: called with a slot and the positions it needs, before they are written.
        release: called with a slot that is free again.
    """

    def __init__(self, limits: Limits, reserve: Callable[[int, int], None], release: Callable[[int], None]) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._reserve, self._release = reserve, release
        self._waiting: list[tuple[int, int, int, tuple[Sequence, ...]]] = []
        self._running: list[Sequence] = []  # in order of (priority, arrival)
        self._order: dict[SequenceGroup, tuple[int, int]] = {}
        self._arrivals = itertools.count()
        self._free_slots = list(range(limits.max_num_seqs))  # a heap: lowest first keeps the used rows contiguous
        self._blocks: dict[Sequence, int] = {}
        self._free_blocks = limits.num_blocks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self.limits.max_num_seqs - len(self._free_slots)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that are held, 0 to 1."""
        return 1 - self._free_blocks / self.limits.num_blocks

    @property
    def has_work(self) -> bool:
        return bool(self._order)

    @property
    def groups(self) -> list[SequenceGroup]:
        """Every request that is waiting or running."""
        return list(self._order)

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Raises EngineOverloadedError."""
        if len(self._waiting) >= self.limits.max_waiting:
            raise EngineOverloadedError(f"{self.limits.max_waiting} requests are waiting already; try again later")
        self._order[group] = (group.request.priority, next(self._arrivals))
        self._queue(group.sequences)

    def fits(self, num_sequences: int, num_prompt_tokens: int) -> bool:
        """Whether so many completions of such a prompt can ever be admitted together."""
        return num_sequences * self._blocks_for(num_prompt_tokens + 1) <= self.limits.num_blocks

    def admit(self) -> list[Sequence]:
        """Give slots and blocks to whoever is first in the queue; returns those whose prefill begins.

        A new request's completions are admitted together: the first is prefilled, the others wait in their slots for its result.
        """
        begun = []
        while self._waiting:
            sequences = self._waiting[0][-1]
            # One block each besides for those that run, so that a newcomer does not at once push somebody out.
            needed = len(sequences) * self._blocks_for(len(sequences[0].token_ids) + 1)
            headroom = len(self._running)
            if len(sequences) > len(self._free_slots) or needed + headroom > self._free_blocks:
                break
            heapq.heappop(self._waiting)
            for sequence in sequences:
                sequence.slot = heapq.heappop(self._free_slots)
                sequence.phase = Phase.PREFILL
                sequence.segment = sequence.num_done = 0
                self._hold(sequence, len(sequence.token_ids) + 1)
            self._running.extend(sequences)
            group = sequences[0].group
            if group.queue_s is None:
                group.queue_s = time.perf_counter() - group.arrived_s
            begun.append(sequences[0])
        self._running.sort(key=self._rank)
        return begun

    def decoding(self) -> list[Sequence]:
        """The sequences that get a token in this step, each with room for it, in the order of their slots."""
        for sequence in list(self._running):
            while sequence.phase is Phase.DECODE and not self._hold(sequence, len(sequence.token_ids)):
                self._preempt(self._running[-1])
        return sorted((s for s in self._running if s.phase is Phase.DECODE), key=lambda s: s.slot)

    def chunks(self, segment: int) -> list[Chunk]:
        """What runs through one segment in this step: who came first goes first, up to the token budget."""
        budget = self.limits.max_batched_tokens
        chunks = []
        for sequence in self._running:
            if sequence.phase is not Phase.PREFILL or sequence.segment != segment or self._follows(sequence):
                continue
            stop = min(len(sequence.token_ids), sequence.num_done + budget)
            if stop > sequence.num_done:
                chunks.append(Chunk(sequence, sequence.num_done, stop))
                budget -= stop - sequence.num_done
        return chunks

    def finish(self, sequence: Sequence) -> None:
        """Free one sequence's slot and blocks at once. Idempotent."""
        if sequence.phase is Phase.FINISHED:
            return
        self._drop(sequence)
        sequence.phase = Phase.FINISHED
        group = sequence.group
        if group.finished:
            self._order.pop(group, None)
            if any(s.group is group for *_, sequences in self._waiting for s in sequences):
                self._waiting = [entry for entry in self._waiting if entry[-1][0].group is not group]
                heapq.heapify(self._waiting)

    def abort(self, group: SequenceGroup) -> None:
        """Drop a request at whatever stage it is."""
        for sequence in group.sequences:
            self.finish(sequence)

    def _rank(self, sequence: Sequence) -> tuple[int, int, int]:
        return (*self._order[sequence.group], sequence.index)

    def _queue(self, sequences: list[Sequence]) -> None:
        heapq.heappush(self._waiting, (*self._rank(sequences[0]), tuple(sequences)))

    def _follows(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for its group's first one to be prefilled for both."""
        return sequence.index > 0 and not sequence.group.prefilled

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _hold(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the blocks that a sequence's first `num_tokens` positions need beyond those it has; False if there are too few."""
        missing = self._blocks_for(num_tokens) - self._blocks.get(sequence, 0)
        if missing > self._free_blocks:
            return False
        if missing > 0:
            self._free_blocks -= missing
            self._blocks[sequence] = self._blocks.get(sequence, 0) + missing
            self._reserve(sequence.slot, num_tokens)
        return True

    def _drop(self, sequence: Sequence) -> None:
        """Take back what a sequence holds, if anything."""
        self._free_blocks += self._blocks.pop(sequence, 0)
        if sequence.slot >= 0:
            self._release(sequence.slot)
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = -1
            self._running.remove(sequence)

    def _preempt(self, victim: Sequence) -> None:
        """Back to the queue: a sequence that generates alone, one whose prompt is still being prefilled with its whole group."""
        together = [victim] if victim.group.prefilled else victim.group.sequences
        for sequence in together:
            self._drop(sequence)
            sequence.phase = Phase.WAITING
        self._queue(together)
        self.num_preemptions += 1
