"""One worker's tables over made-up steps: who gets which vector at which of its tokens, and what is reported.

Expected: by each token's own position, from what its request was told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from server.engine.vllm.orders import Addition, Order
from server.engine.vllm.tables import SiteTable
from server.engine.vllm.worker import Span, WorkerSteering
from steering.decision import ProfileActivation, ProfileDecision, SteeringOptions, decide_profile

WIDTH = 8
MOST = 4  # requests of a batch
LAYERS = (1, 3)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def adding(layer: int, prompt: int | None, answer: int) -> Addition:
    return Addition(layer, None if prompt is None else vector(prompt).tobytes(), vector(answer).tobytes())


@dataclass
class Worker:
    """A `WorkerSteering` whose model is nothing but its sites, and what each request is to get."""

    reports: bool = True
    decider: object = None
    orders: dict[str, tuple[int, Order | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = {layer: SiteTable(WIDTH, 2 * MOST, MOST, 64, torch.float32, "cpu") for layer in LAYERS}
        self.steering = WorkerSteering(self.tables, reports=self.reports, decider=self.decider)
        self.random = np.random.default_rng(0)

    def arrive(self, name: str, num_prompt_tokens: int, order: Order | None) -> None:
        self.orders[name] = num_prompt_tokens, order
        self.steering.arrive(name, num_prompt_tokens, order)

    def step(self, *parts: tuple[str, int, int], residual: bool = True):
        """Run (request, position, number of tokens) parts; check all that is added. Returns the reports, and by layer the states as
        they came."""
        num_rows = sum(count for _, _, count in parts)
        spans, row = [], 0
        for name, position, count in parts:
            spans.append(Span(name, row, count, position))
            row += count
        self.steering.begin(iter(spans), num_rows)
        came = {}
        for layer, table in self.tables.items():
            hidden, rest = (
                torch.from_numpy(self.random.standard_normal((num_rows, WIDTH)).astype(np.float32)) for _ in "hr"
            )
            before, rest_before = hidden.clone(), rest.clone()
            came[layer] = hidden + rest if residual else before
            table.run(hidden, rest if residual else None, layer)
            assert torch.equal(rest, rest_before), "the vector goes to `hidden` alone"
            for span in spans:
                for i in range(span.num_tokens):
                    added = self.wanted(span.request_id, span.position + i, layer)
                    found = (hidden - before)[span.row + i].numpy()
                    np.testing.assert_allclose(
                        found, added, atol=1e-5, err_msg=f"{span.request_id} at {span.position + i}"
                    )
        ready = self.steering.end()
        return {} if ready is None else ready(), came

    def wanted(self, name: str, position: int, layer: int) -> np.ndarray:
        num_prompt_tokens, order = self.orders.get(name, (0, None))
        for addition in () if order is None else order.add:
            if addition.layer == layer:
                raw = addition.prompt if position < num_prompt_tokens - 1 else addition.answer
                return np.zeros(WIDTH, np.float32) if raw is None else np.frombuffer(raw, np.float32)
        return np.zeros(WIDTH, np.float32)


def state(report, layer: int) -> np.ndarray:
    return np.frombuffer(report.states[layer], np.float32)


@pytest.mark.parametrize("order", [Order(add=(adding(1, 1, 2),)), Order(add=(adding(1, None, 2), adding(3, 3, 3)))])
@pytest.mark.parametrize("chunks", [(7,), (3, 3, 1), (6, 1), (1, 1, 1, 1, 1, 1, 1), (4, 3)])
def test_a_prompt_in_chunks_and_its_answer(order, chunks):
    worker, position = Worker(), 0
    worker.arrive("a", 7, order)
    for count in (*chunks, 1, 1, 1):
        told, _ = worker.step(("a", position, count))
        assert list(told) == (["a"] if position < 7 <= position + count else []), "once, when the prompt ends"
        if told:
            assert sorted(told["a"].added) == sorted(addition.layer for addition in order.add)
        position += count


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_read_is_the_prompts_last_state_before_anything_is_added(residual):
    worker = Worker()
    worker.arrive("a", 5, Order(read=(1, 3), add=(adding(1, 1, 2),)))
    worker.arrive("b", 2, Order(read=(3,)))
    worker.arrive("c", 9, Order(read=(1,)))
    told, came = worker.step(("c", 0, 4), ("a", 2, 3), ("plain", 0, 6), ("b", 0, 2), residual=residual)
    assert set(told) == {"a", "b"}, "c's prompt goes on"
    np.testing.assert_array_equal(state(told["a"], 1), came[1][6].numpy())
    np.testing.assert_array_equal(state(told["a"], 3), came[3][6].numpy())
    np.testing.assert_array_equal(state(told["b"], 3), came[3][14].numpy())
    assert set(told["b"].states) == {3} and told["a"].added == (1,) and told["b"].added == ()
    told, came = worker.step(("c", 4, 5), ("a", 5, 1), ("plain", 6, 1), ("b", 2, 1))
    np.testing.assert_array_equal(state(told["c"], 1), came[1][4].numpy())
    assert set(told) == {"c"}


def test_reports_are_of_their_step_when_they_are_called_for_later():
    worker = Worker()
    for name in "ab":
        worker.arrive(name, 1, Order(read=(1,)))
    worker.steering.begin([Span("a", 0, 1, 0)], 1)
    worker.tables[1].run(torch.full((1, WIDTH), 5.0), None, 1)
    first = worker.steering.end()
    worker.steering.begin([Span("b", 0, 1, 0)], 1)
    worker.tables[1].run(torch.full((1, WIDTH), 7.0), None, 1)
    second = worker.steering.end()
    assert state(first()["a"], 1).tolist() == [5.0] * WIDTH and state(second()["b"], 1).tolist() == [7.0] * WIDTH


def test_mixed_batches_at_several_layers():
    worker = Worker()
    worker.arrive("a", 4, Order(add=(adding(1, 1, 1),)))
    worker.arrive("b", 6, Order(add=(adding(1, 2, 3), adding(3, None, 4))))
    worker.arrive("c", 3, Order(read=(1, 3)))
    worker.step(("a", 0, 4), ("plain", 0, 5), ("b", 0, 2))
    worker.step(("a", 4, 1), ("plain", 5, 1), ("b", 2, 4), ("c", 0, 3))
    for i in range(4):
        worker.step(("a", 5 + i, 1), ("plain", 6 + i, 1), ("b", 6 + i, 1), ("c", 3 + i, 1))
    worker.step(("c", 7, 1), ("b", 10, 1), ("plain", 10, 1), ("a", 9, 1))  # in other rows


def test_a_steady_batch_writes_nothing_until_it_changes(monkeypatch):
    worker, written = Worker(), []
    write = SiteTable.write_rows
    monkeypatch.setattr(SiteTable, "write_rows", lambda table, *rest: written.append(table) or write(table, *rest))
    worker.arrive("a", 2, Order(add=(adding(1, 1, 2),)))
    worker.step(("a", 0, 2), ("plain", 0, 1))
    worker.step(("a", 2, 1), ("plain", 1, 1))
    written.clear()
    for i in range(5):
        worker.step(("a", 3 + i, 1), ("plain", 2 + i, 1))
    assert not written
    worker.step(("plain", 7, 1), ("a", 8, 1))
    assert written
    worker.step(("plain", 8, 1), ("a", 9, 1), ("another", 0, 1))
    worker.step(("plain", 9, 1), ("a", 10, 1), ("another", 1, 3))
    worker.step(("plain", 10, 1), ("a", 11, 1))


def test_a_prompt_that_comes_one_token_at_a_time_is_no_steady_batch():
    worker = Worker()
    worker.arrive("a", 3, Order(add=(adding(1, 1, 2),)))
    worker.arrive("b", 5, Order(read=(1,), add=(adding(1, None, 4),)))
    told = [worker.step(("a", 3 + i, 1), ("b", i, 1))[0] for i in range(7)]
    assert [list(t) for t in told] == [[], [], [], [], ["b"], [], []]


def test_another_request_of_the_same_name():
    worker = Worker()
    for seed in (1, 5):
        worker.arrive("a", 1, Order(read=(1,), add=(adding(1, None, seed),)))
        assert set(worker.step(("a", 0, 1))[0]) == {"a"}
        worker.step(("a", 1, 1))
        worker.step(("a", 2, 1))
        worker.steering.depart("a")


def test_none_is_steered_once_all_who_were_are_gone():
    worker = Worker()
    worker.arrive("a", 20, Order(add=(adding(1, 1, 2),)))
    worker.step(("a", 0, 20))
    worker.steering.depart("a")
    del worker.orders["a"]
    worker.step(("plain", 0, 3))
    worker.step(("plain", 3, 1), ("another", 0, 17))  # in rows that were the first's
    worker.arrive("b", 2, Order(add=(adding(1, 3, 3),)))
    worker.step(("another", 17, 1), ("b", 0, 2))


def test_who_is_preempted_is_steered_from_its_start_again_and_not_reported_again():
    worker = Worker()
    worker.arrive("a", 4, Order(read=(1,), add=(adding(1, 1, 2),)))
    worker.arrive("b", 3, Order(read=(1,)))
    told, _ = worker.step(("a", 0, 4), ("b", 0, 3))
    assert set(told) == {"a", "b"}
    worker.step(("a", 4, 1), ("b", 3, 1))
    worker.steering.pause("a")
    worker.arrive("c", 1, Order(add=(adding(1, 5, 6),)))  # has its rows meanwhile
    worker.step(("b", 4, 1), ("c", 0, 1))
    told, _ = worker.step(("b", 5, 1), ("c", 1, 1), ("a", 0, 3))
    assert not told
    told, _ = worker.step(("b", 6, 1), ("c", 2, 1), ("a", 3, 3))  # the rest of its prompt, and of its answer
    assert not told
    worker.step(("b", 7, 1), ("c", 3, 1), ("a", 6, 1))


def test_who_is_preempted_in_its_prompt_is_reported_when_that_ends():
    worker = Worker()
    worker.arrive("a", 4, Order(read=(1,), add=(adding(1, 1, 2),)))
    assert not worker.step(("a", 0, 2))[0]
    worker.steering.pause("a")
    worker.step(("plain", 0, 2))
    assert not worker.step(("plain", 2, 1), ("a", 0, 3))[0]
    assert set(worker.step(("plain", 3, 1), ("a", 3, 1))[0]) == {"a"}


def test_rows_are_given_back():
    """Many more requests than rows, of which some are never run, some are preempted, and some leave amid their prompt."""
    worker = Worker()
    for i in range(40):
        name = str(i)
        worker.arrive(name, 3, Order(read=(1,), add=(adding(1, None if i % 2 else i, i + 100), adding(3, i, i))))
        if i % 5:
            worker.step((name, 0, 2))
        if i % 3 == 0:
            worker.steering.pause(name)
        if i % 5 and i % 3:
            worker.step((name, 2, 1))
        worker.steering.depart(name)
        worker.steering.depart(name)  # told twice, or of one that was never here
    names = [f"last {i}" for i in range(MOST)]
    for i, name in enumerate(names):
        worker.arrive(name, 2, Order(add=(adding(1, i, i + 50), adding(3, None, i))))
    worker.step(*((name, 0, 2) for name in names))
    worker.step(*((name, 2, 1) for name in names))


def test_a_worker_whose_reports_are_not_sent_does_all_else():
    worker = Worker(reports=False)
    worker.arrive("a", 3, Order(read=(1,), add=(adding(1, 1, 2),)))
    assert worker.step(("a", 0, 3))[0] == {}
    worker.step(("a", 3, 1))


# -- workers that decide by themselves ---------------------------------------------------------------------------------------


class Decider:
    """Fires where a state's first number is positive, with that number's sign as the seed of a vector."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, np.ndarray, list[SteeringOptions]]] = []

    def read(self, layer, states, options):
        self.asked.append((layer, states.numpy().copy(), options))
        found = []
        for row, option in zip(states, options, strict=True):
            fires = bool(row[0] > 0)
            [activation] = option.activations
            addition = Addition(
                layer, None if activation.positions == "last" else vector(layer).tobytes(), vector(layer + 20).tobytes()
            )
            found.append(((decision(activation, fires, layer),), addition if fires else None, 0.5))
        return found


def decision(activation: ProfileActivation, fires: bool, layer: int) -> ProfileDecision:
    return decide_profile(
        activation, version="v", method="caa", layer=layer, gate=float(fires), vector_norm=1.0, state_norm=2.0
    )


@pytest.mark.parametrize("positions", ["all", "last"])
def test_workers_that_decide_steer_the_very_step_and_all_that_follow(positions):
    decider = Decider()
    worker = Worker(decider=decider)
    options = SteeringOptions((ProfileActivation("p", 1.0, positions=positions),))
    worker.arrive("given", 2, Order(add=(adding(1, 7, 8),)))
    worker.step(("given", 0, 2))
    for name in "ab":
        worker.steering.arrive(name, 3, Order(decide=options))
    spans = [Span("given", 0, 1, 2), Span("a", 1, 3, 0), Span("plain", 4, 2, 0), Span("b", 6, 3, 0)]
    worker.steering.begin(spans, 9)
    signs = {1: (1.0, -1.0), 3: (1.0, 1.0)}  # of a's and of b's query, by layer
    expected = {}
    for layer, table in worker.tables.items():
        hidden = torch.zeros(9, WIDTH)
        hidden[3, 0], hidden[8, 0] = signs[layer]
        before = hidden.clone()
        table.run(hidden, None, layer)
        added = torch.zeros(9, WIDTH)
        if layer == 1:
            added[0] = torch.from_numpy(vector(8))
        for start, sign in ((1, signs[layer][0]), (6, signs[layer][1])):
            if sign > 0:
                if positions == "all":
                    added[start : start + 2] = torch.from_numpy(vector(layer))
                added[start + 2] = torch.from_numpy(vector(layer + 20))
        torch.testing.assert_close(hidden - before, added)
        expected[layer] = added
    told = worker.steering.end()()
    assert sorted(told["a"].added) == [1, 3] and told["b"].added == (3,)
    for name, fired in (("a", [True, True]), ("b", [False, True])):
        profiles, compute_ms = told[name].decided
        assert [p.fired for p in profiles] == fired and compute_ms == 1.0
    assert "given" not in told
    assert [layer for layer, *_ in decider.asked] == [1, 3]
    worker.orders |= {
        "a": (3, Order(add=tuple(Addition(n, None, vector(n + 20).tobytes()) for n in LAYERS))),
        "b": (3, Order(add=(Addition(3, None, vector(23).tobytes()),))),
    }
    for i in range(3):
        worker.step(("given", 3 + i, 1), ("a", 3 + i, 1), ("plain", 2 + i, 1), ("b", 3 + i, 1))
    assert len(decider.asked) == 2


def test_what_a_worker_decided_holds_when_the_request_was_preempted():
    worker = Worker(decider=Decider())
    options = SteeringOptions((ProfileActivation("p", 1.0),))
    worker.steering.arrive("a", 2, Order(decide=options))
    worker.steering.begin([Span("a", 0, 2, 0)], 2)
    for layer, table in worker.tables.items():
        table.run(torch.ones(2, WIDTH), None, layer)
    assert sorted(worker.steering.end()()["a"].added) == [1, 3]
    worker.orders["a"] = 2, Order(add=tuple(Addition(n, vector(n).tobytes(), vector(n + 20).tobytes()) for n in LAYERS))
    worker.step(("a", 2, 1))
    worker.steering.pause("a")
    assert not worker.step(("a", 0, 4))[0]
    worker.step(("a", 4, 1))


@pytest.mark.parametrize(("chunks", "told"), [([3], True), ([2, 1], False), ([1, 1, 1], False)])
def test_workers_that_decide_do_not_tell_of_a_prompt_that_was_cut(chunks, told):
    """Its beginning had no vector: the server must not take it for steered."""
    worker, position = Worker(decider=Decider()), 0
    worker.steering.arrive("a", 3, Order(decide=SteeringOptions((ProfileActivation("p", 1.0),))))
    for count in chunks:
        worker.steering.begin([Span("a", 0, count, position)], count)
        for layer, table in worker.tables.items():
            table.run(torch.ones(count, WIDTH), None, layer)
        reports = worker.steering.end()
        position += count
    assert (reports()["a"].decided is not None) == told
