"""One worker's account of its requests' orders, and what follows for each step's tables. Knows no runner of vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from server.engine.vllm.orders import Addition, Order, Report
from server.engine.vllm.tables import SiteTable, put
from steering.decision import ProfileDecision, SteeringOptions


class Span(NamedTuple):
    """One request's part of a step: `num_tokens` rows of the packed states from `row` on, the first at `position` of the request."""

    request_id: str
    row: int
    num_tokens: int
    position: int


class Decider(Protocol):
    """What a worker decides by, in one-pass mode."""

    def read(
        self, layer: int, states: Tensor, options: list[SteeringOptions]
    ) -> list[tuple[tuple[ProfileDecision, ...], Addition | None, float]]:
        """For each of n queries, (n, d): the decisions that the layer reports, what it adds, and the milliseconds that took."""


@dataclass
class _Request:
    """`slots`: layer → row of the answer's vector, the prompt's is the next; empty while the request is not in the batch.
    `cut`: its prompt came in several steps, so a vector that its end decides would miss its beginning.
    """

    order: Order
    num_prompt_tokens: int
    additions: dict[int, Addition]
    slots: dict[int, int] = field(default_factory=dict)
    reported: bool = False
    profiles: list[ProfileDecision] = field(default_factory=list)
    compute_ms: float = 0.0
    cut: bool = False

    def reads(self, layer: int) -> bool:
        return self.order.decide is not None or layer in self.order.read


class WorkerSteering:
    """Writes the tables of one worker before each step and reads them after it.

    Args:
        tables: by layer, with rows for two vectors of each request of a batch.
        reports: whether this worker is the one whose reports are sent.
        decider: for requests whose orders say so.
    """

    def __init__(
        self, tables: Mapping[int, SiteTable], *, reports: bool = True, decider: Decider | None = None
    ) -> None:
        self.tables = tables
        self._reports = reports
        self._decider = decider
        self._requests: dict[str, _Request] = {}
        self._done: set[str] = set()  # reported, and nothing is to be added
        self._free = {layer: list(range(1, len(table.vectors), 2)) for layer, table in tables.items()}
        self._ending: list[tuple[Span, int, _Request]] = []  # prompts that end in this step, with their row
        # The last step's requests, where each had one token of its answer and the rows still hold.
        self._steady: list[str] | None = None

    def arrive(self, request_id: str, num_prompt_tokens: int, order: Order | None) -> None:
        """A request is new here; or it comes anew after it was preempted, and what was decided about it holds."""
        if order is not None and request_id not in self._requests and request_id not in self._done:
            additions = {addition.layer: addition for addition in order.add}
            self._requests[request_id] = _Request(order, num_prompt_tokens, additions)

    def depart(self, request_id: str) -> None:
        """It is finished."""
        self.pause(request_id)
        self._requests.pop(request_id, None)
        self._done.discard(request_id)

    def pause(self, request_id: str) -> None:
        """It has lost its place in the batch."""
        request = self._requests.get(request_id)
        if request is not None:
            for layer, slot in request.slots.items():
                self._free[layer].append(slot)
            request.slots.clear()
            self._steady = None

    def begin(self, spans: Iterable[Span], num_rows: int) -> None:
        """Before a step of `num_rows` tokens, which the spans fill."""
        self._ending.clear()
        if not self._requests:
            if self._steady != []:
                for table in self.tables.values():
                    table.clear()
                self._steady = []
            return
        spans = list(spans)
        names = [span.request_id for span in spans]
        if names == self._steady and num_rows == len(names):
            return
        rows = {layer: np.zeros(num_rows, np.int32) for layer in self.tables}
        answering = num_rows == len(names)
        for span in spans:
            request = self._requests.get(span.request_id)
            if request is None:
                continue
            here = request.num_prompt_tokens - 1 - span.position  # the prompt's last token, from the span's start
            answering = answering and here <= 0  # a prompt may come one token at a time, too
            request.cut = request.cut or here >= span.num_tokens  # its end is not in this step
            if 0 <= here < span.num_tokens and not request.reported:
                self._ending.append((span, span.row + here, request))
            for layer in request.additions:
                self._hold(request, layer)
                _fill(rows[layer], span, here, request.slots[layer])
        self._write(rows)
        self._steady = names if answering and not self._ending else None

    def _hold(self, request: _Request, layer: int) -> None:
        """Have what a layer adds to a request in its table."""
        if layer in request.slots:
            return
        vectors, addition = self.tables[layer].vectors, request.additions[layer]
        slot = request.slots[layer] = self._free[layer].pop()
        for row, raw in ((slot, addition.answer), (slot + 1, addition.prompt)):
            if raw is None:
                vectors[row].zero_()
            else:
                put(vectors[row], torch.frombuffer(bytearray(raw), dtype=vectors.dtype))

    def _write(self, rows: Mapping[int, np.ndarray]) -> None:
        deciding = any(request.order.decide is not None for _, _, request in self._ending)
        for layer, table in self.tables.items():
            table.write_rows(rows[layer], self._decide if deciding else None)
            table.write_queries([row for _, row, request in self._ending if request.reads(layer)])

    def _decide(self, layer: int, states: Tensor) -> None:
        """Amid the pass: decide for those who ask for it, and have their vectors act in this very step."""
        reading = [(span, request) for span, _, request in self._ending if request.reads(layer)]
        asking = [i for i, (_, request) in enumerate(reading) if request.order.decide is not None]
        if not asking:
            return
        table = self.tables[layer]
        found = self._decider.read(layer, states[asking], [reading[i][1].order.decide for i in asking])
        for i, (profiles, addition, compute_ms) in zip(asking, found, strict=True):
            span, request = reading[i]
            request.profiles += profiles
            request.compute_ms += compute_ms
            if addition is not None:
                request.additions[layer] = addition
                self._hold(request, layer)
                rows = np.zeros(span.num_tokens, np.int32)
                here = request.num_prompt_tokens - 1 - span.position
                _fill(rows, span._replace(row=0), here, request.slots[layer])
                table.row_of_token[span.row : span.row + span.num_tokens] = torch.from_numpy(rows)
                table.adds = True

    def end(self) -> Callable[[], dict[str, Report]] | None:
        """After a step: what gives its reports, by request; None where no prompt ended. It waits for the device, and may be called
        in another thread when the next step is under way."""
        if not self._ending:
            return None
        ending, self._ending = [(span.request_id, request) for span, _, request in self._ending], []
        taken: dict[int, tuple[list[str], Callable[[], Tensor]]] = {}
        for layer, table in self.tables.items():
            reading = [name for name, request in ending if request.reads(layer)]
            if self._reports and any(layer in request.order.read for _, request in ending):
                taken[layer] = reading, table.take()
            table.write_queries([])
            table.decide = None
        facts = [
            (
                name,
                r.order.read,
                tuple(r.additions),
                None if r.order.decide is None or r.cut else (tuple(r.profiles), r.compute_ms),
            )
            for name, r in ending
        ]
        for name, request in ending:
            request.reported = True
            if not request.additions:
                del self._requests[name]
                self._done.add(name)
        if not self._reports:
            return None

        def reports() -> dict[str, Report]:
            states = {layer: dict(zip(names, take(), strict=True)) for layer, (names, take) in taken.items()}
            return {
                name: Report({layer: states[layer][name].numpy().tobytes() for layer in read}, added, decided)
                for name, read, added, decided in facts
            }

        return reports


def _fill(rows: np.ndarray, span: Span, here: int, slot: int) -> None:
    """The prompt's vector for a span's tokens before the prompt's last, which is its `here`-th, the answer's from there on."""
    answer = span.row + min(max(here, 0), span.num_tokens)
    rows[span.row : answer] = slot + 1
    rows[answer : span.row + span.num_tokens] = slot
