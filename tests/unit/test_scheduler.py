"""The scheduler as a state machine: no row is lost or given twice, everything ends, whatever comes and goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.base import EngineOverloadedError, GenerationRequest, SamplingOptions
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import Phase, SequenceGroup


def group(name="r", length=3, n=1, priority=0):
    asked = GenerationRequest(name, tuple(range(length)), SamplingOptions(max_tokens=4), n=n, priority=priority)
    return SequenceGroup.of(asked, lambda _: None)


def advance(scheduler):
    """Do what a step does to the sequences' phases; returns the batch."""
    batch = scheduler.schedule()
    for admitted in batch.prefill:
        for sequence in admitted.sequences:
            sequence.phase = Phase.DECODE
            sequence.token_ids.append(0)
    for sequence in batch.decode:
        sequence.token_ids.append(0)
    return batch


def test_prompts_share_a_step_up_to_the_token_budget_and_a_longer_one_runs_alone():
    scheduler = Scheduler(8, max_batched_tokens=10, max_waiting=99)
    for name, length in (("a", 6), ("b", 4), ("c", 1), ("long", 50), ("d", 1)):
        scheduler.add(group(name, length))
    batches = [[g.request.request_id for g in advance(scheduler).prefill] for _ in range(4)]
    assert batches == [["a", "b"], ["c"], ["long"], ["d"]]


def test_lower_priority_numbers_first_then_arrival():
    scheduler = Scheduler(1, 10, 99)
    waiting = [group("late", priority=1), group("x"), group("y"), group("first", priority=-1)]
    for g in waiting:
        scheduler.add(g)
    order = []
    while scheduler.has_work:
        for g in advance(scheduler).prefill:
            order.append(g.request.request_id)
            scheduler.abort(g)
    assert order == ["first", "x", "y", "late"]


def test_a_request_waits_until_all_its_completions_fit():
    scheduler = Scheduler(3, 100, 99)
    first, pair = group("one"), group("three", n=3)
    scheduler.add(first)
    scheduler.add(pair)
    assert [g.request.request_id for g in advance(scheduler).prefill] == ["one"]
    scheduler.abort(first)
    assert [g.request.request_id for g in advance(scheduler).prefill] == ["three"]
    assert sorted(s.slot for s in pair.sequences) == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 4)),
            st.tuples(st.just("abort"), st.integers(0, 50), st.just(0)),
            st.tuples(st.just("finish"), st.integers(0, 50), st.just(0)),
            st.tuples(st.just("step"), st.just(0), st.just(0)),
        ),
        max_size=60,
    ),
    st.integers(4, 7),
)
def test_rows_are_neither_lost_nor_shared(actions, rows):
    scheduler = Scheduler(rows, 20, 5)
    groups = []
    for action, number, n in actions:
        alive = [g for g in groups if not g.finished]
        if action == "add":
            candidate = group(str(len(groups)), number, n)
            try:
                scheduler.add(candidate)
                groups.append(candidate)
            except EngineOverloadedError:
                assert scheduler.num_waiting == 5
        elif action == "abort" and alive:
            scheduler.abort(alive[number % len(alive)])
        elif action == "finish" and (held := [s for g in alive for s in g.sequences if s.phase is Phase.DECODE]):
            scheduler.finish(held[number % len(held)])
            scheduler.collect()
        elif action == "step":
            advance(scheduler)
        slots = [s.slot for g in groups for s in g.sequences if s.slot >= 0]
        assert len(slots) == len(set(slots)) == scheduler.num_running <= rows
        assert all(s.slot == -1 for g in groups for s in g.sequences if s.phase is Phase.FINISHED)
    for _ in range(2 * len(groups) + 1):  # with everything that runs leaving after its step, each step admits someone
        advance(scheduler)
        for g in [g for g in groups if any(s.phase is Phase.DECODE for s in g.sequences)]:
            scheduler.abort(g)
    assert all(g.finished for g in groups)
    assert scheduler.num_running == 0 and not scheduler.has_work
