"""A worker's tables as a CUDA graph uses them: the pass is recorded once, with empty tables, and replayed for every step.

There is no device here. The operation is traced into a list of tensor operations instead, which is then run without any of our
Python, on rows that are padded as vLLM pads them. Expected: each token's state plus what its request was to get, by its position.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from server.engine.vllm import tables as tables_module
from server.engine.vllm.orders import Addition, Order
from server.engine.vllm.tables import SiteTable, install
from server.engine.vllm.worker import Span, WorkerSteering

WIDTH, LAYER = 4, 1
MAX_NUM_SEQS, MAX_ROWS = 4, 16
SIZES = (1, 2, 4, 8, MAX_ROWS)  # of the recorded passes
DEVICE_OPS = {"index_select", "slice", "add", "add_", "copy_"}


def make_table(*, recorded: bool) -> SiteTable:
    table = SiteTable(WIDTH, 2 * MAX_NUM_SEQS, MAX_NUM_SEQS, MAX_ROWS, torch.float32, "cpu")
    table._skips = not recorded
    return table


def record(table: SiteTable, size: int):
    def passed(hidden, residual):
        table.run(hidden, residual, LAYER)
        return hidden

    return make_fx(passed)(torch.zeros(size, WIDTH), torch.zeros(size, WIDTH))


class Recorded:
    """A worker whose passes are replayed."""

    def __init__(self) -> None:
        self.table = make_table(recorded=True)
        self.graphs = {size: record(self.table, size) for size in SIZES}
        self.worker = WorkerSteering({LAYER: self.table})

    def step(self, spans: list[Span], hidden: torch.Tensor, residual: torch.Tensor):
        self.worker.begin(spans, len(hidden))
        size = min(size for size in SIZES if size >= len(hidden))
        padding = torch.full((size - len(hidden), WIDTH), float("nan"))
        found = self.graphs[size](torch.cat([hidden, padding]), torch.cat([residual, padding]))
        return found[: len(hidden)], self.worker.end()


class Skipping:
    """A worker as on a CPU."""

    def __init__(self) -> None:
        self.table = make_table(recorded=False)
        self.worker = WorkerSteering({LAYER: self.table})

    def step(self, spans: list[Span], hidden: torch.Tensor, residual: torch.Tensor):
        self.worker.begin(spans, len(hidden))
        hidden = hidden.clone()
        self.table.run(hidden, residual, LAYER)
        return hidden, self.worker.end()


def vector(value: float) -> np.ndarray:
    return np.arange(1, WIDTH + 1, dtype=np.float32) * value


class Traffic:
    """Requests that come, are cut into chunks, preempted, aborted and finished at random, as vLLM's second runner is told."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.requests: dict[str, dict] = {}
        self.count = 0

    def change(self, *workers: WorkerSteering) -> None:
        for name, request in list(self.requests.items()):
            fate = self.random.random()
            if fate < 0.1:  # finished or aborted
                del self.requests[name]
                for worker in workers:
                    worker.depart(name)
            elif fate < 0.2:  # preempted, and back at once
                request["position"] = 0
                for worker in workers:
                    worker.pause(name)
                    worker.arrive(name, request["length"], request["order"])
        while len(self.requests) < MAX_NUM_SEQS and self.random.random() < 0.5:
            name, self.count = f"r{self.count}", self.count + 1
            kind = self.random.integers(3)
            answer = vector(float(self.random.normal()))
            prompt = None if self.random.random() < 0.3 else vector(float(self.random.normal()))
            raw = None if prompt is None else prompt.tobytes()
            order = None
            if kind == 1:
                order = Order(read=(LAYER,))
            elif kind == 2:
                order = Order(read=(LAYER,), add=(Addition(LAYER, raw, answer.tobytes()),))
            zero = vector(0.0)
            self.requests[name] = {
                "length": int(self.random.integers(1, 12)),
                "position": 0,
                "order": order,
                "prompt": zero if kind != 2 or prompt is None else prompt,
                "answer": zero if kind != 2 else answer,
                "reads": order is not None,
                "reported": False,
            }
            for worker in workers:
                worker.arrive(name, self.requests[name]["length"], order)

    def spans(self) -> Iterator[Span]:
        row = 0
        for name, request in self.requests.items():
            room = MAX_ROWS - row
            left = request["length"] - request["position"]
            count = 1 if left <= 0 else int(self.random.integers(1, left + 1))
            if not 0 < count <= room:
                continue
            yield Span(name, row, count, request["position"])
            request["position"] += count
            row += count

    def expected(self, spans: list[Span], hidden: torch.Tensor, residual: torch.Tensor):
        """By position, one token at a time."""
        hidden, reports = hidden.clone(), {}
        for span in spans:
            request = self.requests[span.request_id]
            for i in range(span.num_tokens):
                before, last = span.position + i < request["length"] - 1, span.position + i == request["length"] - 1
                if last and request["reads"] and not request["reported"]:
                    request["reported"] = True
                    reports[span.request_id] = (hidden[span.row + i] + residual[span.row + i]).numpy().tobytes()
                hidden[span.row + i] += torch.from_numpy(request["prompt"] if before else request["answer"])
        return hidden, reports


@pytest.mark.parametrize("seed", range(5))
def test_a_recorded_pass_does_for_every_step_what_each_token_is_to_get(seed):
    recorded, skipping, traffic = Recorded(), Skipping(), Traffic(seed)
    steered = reported = 0
    for _ in range(150):
        traffic.change(recorded.worker, skipping.worker)
        spans = list(traffic.spans())
        num_rows = sum(span.num_tokens for span in spans)
        if not num_rows:
            continue
        hidden, residual = torch.randn(2, num_rows, WIDTH)
        expected, reports = traffic.expected(spans, hidden, residual)
        for worker in (recorded, skipping):
            found, report = worker.step(spans, hidden.clone(), residual)
            assert torch.equal(found, expected), type(worker).__name__
            told = {} if report is None else {name: r.states[LAYER] for name, r in report().items()}
            assert told == reports, type(worker).__name__
        steered += int(not torch.equal(expected, hidden))
        reported += len(reports)
    assert steered > 30 and reported > 10


def test_what_is_recorded_is_done_by_the_device_alone():
    table = make_table(recorded=True)
    for size in SIZES:
        nodes = [node for node in record(table, size).graph.nodes if node.op == "call_function"]
        names = {node.target.__name__.split(".")[0] for node in nodes}
        assert names <= DEVICE_OPS, names
        assert {"index_select", "add_", "copy_"} <= names
        read = next(node for node in nodes if node.target.__name__.startswith("index_select"))
        assert len(read.meta["val"]) == min(size, MAX_NUM_SEQS)  # no more than can end in so few tokens


def test_a_step_that_reads_is_set_aside_before_the_next_one_begins():
    worker = Recorded()
    worker.worker.arrive("a", 2, Order(read=(LAYER,)))
    worker.worker.arrive("b", 1, Order(read=(LAYER,)))
    first, second = torch.randn(2, 2, WIDTH)
    _, report = worker.step([Span("a", 0, 2, 0)], first.clone(), torch.zeros(2, WIDTH))
    worker.step([Span("a", 0, 1, 2), Span("b", 1, 1, 0)], second.clone(), torch.zeros(2, WIDTH))
    assert report()["a"].states[LAYER] == first[1].numpy().tobytes()


def test_what_was_decided_about_a_request_holds_when_it_comes_anew_after_a_preemption():
    """Its prompt's keys may be found in the cache by then, and its prompt's end is not seen again."""
    worker = Recorded()
    order = Order(read=(LAYER,), add=(Addition(LAYER, None, vector(2.0).tobytes()),))
    worker.worker.arrive("a", 3, order)
    worker.step([Span("a", 0, 3, 0)], torch.zeros(3, WIDTH), torch.zeros(3, WIDTH))
    worker.worker.pause("a")
    worker.worker.arrive("a", 3, order)
    found, report = worker.step([Span("a", 0, 2, 2)], torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))
    assert torch.equal(found, torch.from_numpy(vector(2.0)).expand(2, WIDTH)) and report is None


def test_a_request_reports_once_through_preemptions_and_another_one_of_its_name_reports_anew():
    worker = Recorded()

    def run():
        worker.worker.arrive("a", 3, Order(read=(LAYER,)))
        return worker.step([Span("a", 0, 3, 0)], torch.zeros(3, WIDTH), torch.zeros(3, WIDTH))[1]

    assert set(run()()) == {"a"}
    worker.worker.pause("a")
    assert run() is None
    worker.worker.depart("a")
    assert set(run()()) == {"a"}


class Layered(nn.Module):
    """Layers as vLLM's: (hidden, residual) → (hidden, residual), whose sum is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return self.linear(residual), residual


@pytest.fixture
def no_sites_left():
    yield
    tables_module._tables.clear()


@pytest.mark.parametrize("recorded", [False, True])
def test_the_operation_is_traced_into_a_whole_graph_and_its_tables_act_from_outside(recorded, no_sites_left):
    torch.manual_seed(0)
    model = Layered().eval().requires_grad_(False)
    table = make_table(recorded=recorded)
    install(model.layers, {LAYER: table})
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(MAX_ROWS, WIDTH))  # compiled while the tables are empty
    worker = WorkerSteering({LAYER: table})
    addition = Addition(LAYER, vector(1.0).tobytes(), vector(3.0).tobytes())
    worker.arrive("a", 3, Order(read=(LAYER,), add=(addition,)))
    for spans, num_rows, expected in (
        ([Span("plain", 0, 2, 0), Span("a", 2, 3, 0)], 5, {2: 1.0, 3: 1.0, 4: 3.0}),
        ([Span("a", 0, 1, 3), Span("plain", 1, 1, 2)], 2, {0: 3.0}),
    ):
        inputs = torch.randn(num_rows, WIDTH)
        with torch.no_grad():
            worker.begin(spans, num_rows)
            found = compiled(inputs)
            report = worker.end()
        below, above = [layer.linear.weight.T for layer in model.layers[:2]], model.layers[2].linear.weight.T
        stream = inputs.clone()
        for weight in below:
            stream = stream + stream @ weight
        if 4 in expected:
            read = torch.from_numpy(np.frombuffer(report()["a"].states[LAYER], np.float32).copy())
            torch.testing.assert_close(read, stream[4])
        for row, value in expected.items():
            stream[row] += torch.from_numpy(vector(value))
        torch.testing.assert_close(found, stream + stream @ above)
    worker.depart("a")
    inputs = torch.randn(MAX_ROWS, WIDTH)
    worker.begin([Span("plain", 0, MAX_ROWS, 0)], MAX_ROWS)
    bare = Layered()
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(inputs), bare(inputs).detach())
