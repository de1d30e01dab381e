"""The scheduler as a state machine: no slot and no block is lost or given twice, everything ends, whatever comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.base import EngineOverloadedError, GenerationRequest, SamplingOptions
from server.engine.native.scheduler import Limits, Scheduler
from server.engine.native.sequence import Phase, Sequence, SequenceGroup

BLOCK = 4


def group(name="r", length=3, n=1, priority=0, max_tokens=4):
    options = SamplingOptions(max_tokens=max_tokens)
    asked = GenerationRequest(name, tuple(range(length)), options, n=n, priority=priority)
    return SequenceGroup.of(asked, lambda _: None)


@dataclass
class Ledger:
    """What the KV cache would hold: the blocks of each slot. Refuses what would break it."""

    num_blocks: int
    held: dict[int, int] = field(default_factory=dict)

    def reserve(self, slot: int, length: int) -> None:
        self.held[slot] = max(self.held.get(slot, 0), -(-length // BLOCK))
        assert sum(self.held.values()) <= self.num_blocks, "more blocks than there are"

    def release(self, slot: int) -> None:
        assert slot in self.held, "freed twice, or never held"
        del self.held[slot]

    def has_room(self, sequence: Sequence, length: int) -> bool:
        return self.held.get(sequence.slot, 0) * BLOCK >= length


class Machine:
    """A scheduler, and what `core.step` does to its sequences, with the promises checked at every step.

    Args:
        num_segments: of layers.
        cached: tokens of a sequence that a segment finds in its prefix cache.
    """

    def __init__(self, num_segments=1, cached=lambda sequence, segment: 0, **limits):
        self.limits = Limits(
            **{"max_num_seqs": 8, "max_batched_tokens": 100, "max_waiting": 99, "num_blocks": 1000, "block_size": BLOCK}
            | limits
        )
        self.ledger = Ledger(self.limits.num_blocks)
        self.scheduler = Scheduler(self.limits, self.ledger.reserve, self.ledger.release)
        self.num_segments, self.cached = num_segments, cached
        self.arrived: dict[SequenceGroup, int] = {}
        self.preempted: list[Sequence] = []

    def add(self, *groups: SequenceGroup) -> None:
        for added in groups:
            self.scheduler.add(added)
            self.arrived[added] = len(self.arrived)

    def rank(self, sequence: Sequence) -> tuple[int, int, int]:
        """Priority, then arrival."""
        return sequence.request.priority, self.arrived[sequence.group], sequence.index

    def of(self, *phases: Phase) -> list[Sequence]:
        return [s for g in self.arrived for s in g.sequences if s.phase in phases]

    def step(self) -> tuple[list[str], list[list[tuple[str, int, int]]]]:
        """The names of those whose prefill begins, and each segment's chunks as (name, start, stop)."""
        decoding = self._decoding()
        begun = self._admit()
        ran = [self._prefill(segment) for segment in range(self.num_segments)]
        for sequence in decoding:
            self._append(sequence)
        self.check()
        return begun, ran

    def run(self, most: int) -> None:
        """Step until nothing is left; fails where that takes more than `most` steps."""
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    def check(self) -> None:
        """Slots and blocks are where the sequences are, and nowhere else."""
        holders = [s for s in self.of(*Phase) if s.slot >= 0]
        assert {s.phase for s in holders} <= {Phase.PREFILL, Phase.DECODE}
        assert sorted(s.slot for s in holders) == sorted(self.ledger.held)
        assert len(holders) == len(self.ledger.held) == self.scheduler.num_running <= self.limits.max_num_seqs
        assert self.scheduler.kv_usage == pytest.approx(sum(self.ledger.held.values()) / self.limits.num_blocks)
        assert self.scheduler.has_work == any(not g.finished for g in self.arrived)

    def _decoding(self) -> list[Sequence]:
        before = self.of(Phase.PREFILL, Phase.DECODE)
        decoding = self.scheduler.decoding()
        gone = [s for s in before if s.phase is Phase.WAITING]
        stayed = self.of(Phase.PREFILL, Phase.DECODE)
        assert not gone or max(map(self.rank, stayed)) < min(map(self.rank, gone)), "the last in line makes room"
        assert sorted(decoding, key=lambda s: s.slot) == decoding
        assert set(decoding) == set(self.of(Phase.DECODE)), "every running stream gets its token"
        assert all(self.ledger.has_room(s, len(s.token_ids)) for s in decoding)
        self.preempted += gone
        return decoding

    def _admit(self) -> list[str]:
        begun = self.scheduler.admit()
        assert sorted(begun, key=self.rank) == begun
        waiting = self.of(Phase.WAITING)
        assert not begun or not waiting or self.rank(begun[-1]) < min(map(self.rank, waiting)), "nobody overtakes"
        for sequence in begun:
            assert self.ledger.has_room(sequence, len(sequence.token_ids) + 1)
            assert (sequence.segment, sequence.num_done) == (0, 0)
            sequence.num_done = self.cached(sequence, 0)
        return [s.request.request_id for s in begun]

    def _prefill(self, segment: int) -> list[tuple[str, int, int]]:
        chunks = self.scheduler.chunks(segment)
        assert sum(c.stop - c.start for c in chunks) <= self.limits.max_batched_tokens
        leading = [s for s in self.of(Phase.PREFILL) if s.index == 0 or s.group.prefilled]
        inside = sorted((s for s in leading if s.segment == segment), key=self.rank)
        assert [c.sequence for c in chunks] == inside[: len(chunks)], "who came first goes first"
        assert bool(chunks) == bool(inside), "somebody moves on in every step"
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_done < chunk.stop <= len(sequence.token_ids)
            assert chunk.last == (chunk.stop == len(sequence.token_ids))
            assert self.ledger.has_room(sequence, chunk.stop)
            sequence.num_done = chunk.stop
            if chunk.last and segment + 1 < self.num_segments:
                sequence.segment = segment + 1
                sequence.num_done = self.cached(sequence, segment + 1)
            elif chunk.last:
                heirs = [sequence] if sequence.group.prefilled else sequence.group.sequences
                sequence.group.prefilled = True
                for heir in heirs:
                    heir.phase = Phase.DECODE
                    self._append(heir)
        return [(c.sequence.request.request_id, c.start, c.stop) for c in chunks]

    def _append(self, sequence: Sequence) -> None:
        sequence.token_ids.append(0)
        if sequence.num_completion_tokens == sequence.request.sampling.max_tokens:
            self.scheduler.finish(sequence)


def test_a_prompt_is_cut_to_the_budget_and_what_is_left_of_it_is_the_next_ones():
    machine = Machine(max_batched_tokens=10)
    machine.add(group("a", 6), group("long", 17), group("c", 1))
    steps = [machine.step()[1][0] for _ in range(3)]
    assert steps == [[("a", 0, 6), ("long", 0, 4)], [("long", 4, 14)], [("long", 14, 17), ("c", 0, 1)]]


def test_a_prompt_climbs_from_segment_to_segment_with_a_budget_for_each():
    machine = Machine(num_segments=2, max_batched_tokens=10)
    machine.add(group("a", 15), group("b", 5))
    assert [machine.step()[1] for _ in range(3)] == [
        [[("a", 0, 10)], []],
        [[("a", 10, 15), ("b", 0, 5)], [("a", 0, 10)]],
        [[], [("a", 10, 15), ("b", 0, 5)]],
    ]


def test_what_is_cached_is_not_run_again():
    machine = Machine(num_segments=2, cached=lambda sequence, segment: (8, 4)[segment])
    machine.add(group("a", 15))
    assert machine.step()[1] == [[("a", 8, 15)], [("a", 4, 15)]]


def test_streams_go_on_beside_a_long_prompt():
    machine = Machine(max_batched_tokens=10)
    machine.add(group("stream", 3, max_tokens=30), group("long", 95))
    for step in range(1, 10):
        machine.step()
        assert machine.of(Phase.DECODE)[0].num_completion_tokens == step


def test_lower_priority_numbers_first_then_arrival():
    machine = Machine(max_num_seqs=1)
    machine.add(group("late", priority=1), group("x"), group("y"), group("first", priority=-1))
    order = [name for _ in range(16) for name in machine.step()[0]]
    assert order == ["first", "x", "y", "late"]


def test_a_request_waits_until_all_its_completions_have_a_slot():
    machine = Machine(max_num_seqs=3)
    first, three = group("one", max_tokens=9), group("three", n=3)
    machine.add(first, three)
    assert machine.step()[0] == ["one"]
    assert machine.step()[0] == []
    machine.scheduler.abort(first)
    assert machine.step()[0] == ["three"]
    assert sorted(s.slot for s in three.sequences) == [0, 1, 2]


def test_a_request_waits_until_all_its_completions_have_blocks():
    machine = Machine(num_blocks=7)
    first, three = group("one", 3, max_tokens=9), group("three", 5, n=3)
    machine.add(first, three)
    assert machine.scheduler.fits(3, 5) and not machine.scheduler.fits(4, 5) and not machine.scheduler.fits(1, 28)
    assert machine.scheduler.fits(1, 27)
    assert [machine.step()[0] for _ in range(2)] == [["one"], []]
    machine.scheduler.abort(first)
    assert machine.step()[0] == ["three"]
    assert machine.scheduler.kv_usage == pytest.approx(6 / 7)


def test_the_last_in_line_makes_room_and_comes_back_with_its_tokens():
    machine = Machine(num_blocks=4, max_batched_tokens=5)
    first, second = group("first", 7, max_tokens=8), group("second", 2, max_tokens=8)
    machine.add(first, second)
    [old], [new] = first.sequences, second.sequences
    machine.step()
    machine.step()
    assert new.phase is Phase.DECODE  # two blocks and one; the first one's next token needs a third
    for _ in range(3):
        machine.step()
    kept = list(new.token_ids)
    assert (
        new.phase is Phase.WAITING
        and len(kept) > 2
        and machine.scheduler.num_preemptions == 1
        and machine.scheduler.num_waiting == 1
    )
    for _ in range(4):
        machine.step()
        assert new.token_ids == kept
    assert first.finished
    assert machine.step()[1] == [[("second", 0, 5)]]  # all it has goes through again, in chunks
    machine.run(10)
    assert (old.num_completion_tokens, new.num_completion_tokens) == (8, 8)


def test_a_group_that_is_preempted_before_its_prompt_is_through_starts_over_together():
    machine = Machine(num_blocks=8, max_batched_tokens=1)
    machine.add(group("old", 3, max_tokens=20), pair := group("pair", 9, n=2))
    for _ in range(9):
        machine.step()
    assert machine.scheduler.num_preemptions == 1 and machine.scheduler.num_waiting == 1
    assert [s.phase for s in pair.sequences] == [Phase.WAITING] * 2 and pair.sequences[0].num_done > 0
    machine.run(60)
    assert [s.num_completion_tokens for s in pair.sequences] == [4, 4]


def test_a_full_queue_refuses():
    machine = Machine(max_waiting=2)
    machine.add(group(), group())
    with pytest.raises(EngineOverloadedError, match="2"):
        machine.add(group())
    machine.step()
    machine.add(group())


added = st.tuples(
    st.just("add"), st.integers(1, 20), st.integers(1, 3), st.sampled_from([0, 0, 0, -1, 1]), st.integers(1, 12)
)
other = st.tuples(st.sampled_from(["abort", "step", "step", "step"]), st.integers(0, 50))


@settings(max_examples=400, deadline=None)
@given(
    actions=st.lists(st.one_of(added, other), max_size=60),
    slots=st.integers(3, 6),
    num_blocks=st.integers(9, 16),
    budget=st.integers(1, 25),
    num_segments=st.integers(1, 3),
    luck=st.randoms(use_true_random=False),
)
def test_whatever_comes_and_goes(actions, slots, num_blocks, budget, num_segments, luck):
    """`Machine` checks every step; here besides: all that was not aborted ends, with all of its tokens."""
    machine = Machine(
        num_segments,
        lambda sequence, segment: luck.randrange(len(sequence.token_ids)) // BLOCK * BLOCK,
        max_num_seqs=slots,
        num_blocks=num_blocks,
        max_batched_tokens=budget,
        max_waiting=5,
    )
    aborted = set()
    for action, number, *rest in actions:
        alive = [g for g in machine.arrived if not g.finished]
        if action == "add":
            n, priority, max_tokens = rest
            if not machine.scheduler.fits(n, number) or not machine.scheduler.fits(1, number + max_tokens - 1):
                continue  # the engine refuses these
            try:
                machine.add(group(str(len(machine.arrived)), number, n, priority, max_tokens))
            except EngineOverloadedError:
                assert machine.scheduler.num_waiting >= 5
        elif action == "abort" and alive:
            aborted.add(leaving := alive[number % len(alive)])
            machine.scheduler.abort(leaving)
            machine.scheduler.abort(leaving)  # a client may go twice
            machine.check()
        elif action == "step":
            machine.step()
    # Alone, each needs so many steps at most; and who is last in line loses at most all it had to each one before it.
    work = sum(s.request.sampling.max_tokens + num_segments * 32 for g in machine.arrived for s in g.sequences)
    machine.run(work * (1 + len(machine.preempted)) + 1)
    for g in machine.arrived:
        assert g.finished
        if g not in aborted:
            assert [s.num_completion_tokens for s in g.sequences] == [g.request.sampling.max_tokens] * g.request.n
    assert not machine.ledger.held and machine.scheduler.num_running == machine.scheduler.num_waiting == 0
    assert machine.scheduler.kv_usage == 0 and machine.scheduler.groups == []
