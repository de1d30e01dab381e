"""The adapters of vLLM's two model runners, over stand-ins that have what they use; that vLLM has it too: `tests/vllm/test_surface.py`."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from server.engine.vllm import runner as common
from server.engine.vllm import tables as tables_module
from server.engine.vllm import v1_runner, v2_runner
from server.engine.vllm.orders import KEY, Addition, Order
from server.engine.vllm.settings import PluginSettings
from steering.errors import ModelError

WIDTH, LAYER = 4, 1


@dataclass
class Output:
    """vLLM's, which is pickled on its way."""

    req_ids: list[str] = field(default_factory=list)


class AsyncOutput:
    def __init__(self, output: Output) -> None:
        self.output = output

    def get_output(self) -> Output:
        return self.output


def config(layers: tuple[int, ...] | None = (LAYER,)):
    return SimpleNamespace(
        additional_config={} if layers is None else PluginSettings(layers).to_config(),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=16),
        model_config=SimpleNamespace(
            get_hidden_size=lambda: WIDTH, dtype=torch.float32, hf_text_config=SimpleNamespace(num_hidden_layers=2)
        ),
    )


class Doubling(nn.Module):
    def forward(self, hidden):
        return 2 * hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Doubling(), Doubling()])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def first_runner():
    """Whose methods are called as those of vLLM's first runner are."""

    class Runner:
        device = "cpu"

        def __init__(self, vllm_config) -> None:
            self.vllm_config = vllm_config
            self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=np.zeros(4, np.int32))

        def load_model(self) -> None:
            self.model = Model()

        def get_model(self):
            return self.model

        def _update_states(self, scheduler_output):
            for i, (_, _, position) in enumerate(scheduler_output.rows):
                self.input_batch.num_computed_tokens_cpu[i] = position
            self.input_batch.req_ids = [name for name, _, _ in scheduler_output.rows]

        def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
            return "inputs"

        def sample_tokens(self, grammar_output):
            return Output(list(self.input_batch.req_ids))

        def step(self, scheduler_output, hidden):
            self._update_states(scheduler_output)
            counts = np.array([count for _, count, _ in scheduler_output.rows], np.int32)
            assert self._prepare_inputs(scheduler_output, counts) == "inputs"
            return self.model(hidden), self.sample_tokens(None)

    return Runner, v1_runner.STEPS


def second_runner():
    """And of the second, whose output comes later."""

    class Runner:
        device = "cpu"

        def __init__(self, vllm_config) -> None:
            self.vllm_config = vllm_config

        def load_model(self, load_dummy_weights=False) -> None:
            self.model = Model()

        def get_model(self):
            return self.model

        def finish_requests(self, scheduler_output) -> None:
            pass

        def prepare_inputs(self, scheduler_output, batch_req_state, batch_desc, num_active_loras):
            names, counts, positions = zip(*scheduler_output.rows, strict=True)
            return SimpleNamespace(
                req_ids=list(names),
                num_scheduled_tokens=np.array(counts, np.int32),
                num_computed_tokens_np=np.array(positions, np.int32),
                num_tokens=sum(counts),
            )

        def sample_tokens(self, grammar_output):
            return AsyncOutput(Output(self.names))

        def step(self, scheduler_output, hidden):
            self.finish_requests(scheduler_output)
            self.names = self.prepare_inputs(scheduler_output, None, None, num_active_loras=0).req_ids
            return self.model(hidden), self.sample_tokens(None)

    return Runner, v2_runner.STEPS


def scheduled(*rows, new=(), finished=(), preempted=None):
    """`rows`: (request, tokens, position); `new`: (request, length of its prompt, order)."""
    return SimpleNamespace(
        rows=rows,
        total_num_scheduled_tokens=sum(count for _, count, _ in rows),
        finished_req_ids=set(finished),
        preempted_req_ids=preempted,
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=[0] * length,
                sampling_params=SimpleNamespace(extra_args=None if order is None else order.to_args()),
            )
            for name, length, order in new
        ],
    )


def vector(value: float) -> np.ndarray:
    return np.full(WIDTH, value, np.float32)


@pytest.fixture(params=[first_runner, second_runner])
def kind(request, monkeypatch):
    monkeypatch.setattr(common, "sends_reports", lambda: True)
    yield request.param()
    tables_module._tables.clear()


def started(kind, layers=(LAYER,)):
    cls, steps = kind
    common.patch((cls,), cls, steps)
    runner = cls(config(layers))
    runner.load_model()
    return runner


def final(output):
    """As another thread gets it, and another process."""
    if hasattr(output, "get_output"):
        with ThreadPoolExecutor(1) as pool:
            output = pool.submit(output.get_output).result()
    return pickle.loads(pickle.dumps(output))


def test_a_step_is_steered_and_its_reports_come_beside_its_output(kind):
    runner = started(kind)
    steer = Order(read=(LAYER,), add=(Addition(LAYER, vector(1.0).tobytes(), vector(3.0).tobytes()),))
    hidden = torch.ones(6, WIDTH)
    step = scheduled(
        ("plain", 2, 0), ("a", 3, 0), ("b", 1, 1), new=[("plain", 2, None), ("a", 4, steer), ("b", 2, steer)]
    )
    found, output = runner.step(step, hidden.clone())
    assert found[:, 0].tolist() == [4, 4, 5, 5, 5, 7]
    output = final(output)
    assert output.req_ids == ["plain", "a", "b"]
    reports = getattr(output, KEY)
    assert set(reports) == {"b"} and reports["b"].added == (LAYER,)
    assert reports["b"].states == {LAYER: vector(4.0).tobytes()}  # before anything is added
    found, output = runner.step(scheduled(("a", 1, 3), finished=["b", "plain"]), hidden[:1].clone())
    assert found[:, 0].tolist() == [7] and set(getattr(final(output), KEY)) == {"a"}
    found, output = runner.step(scheduled(("a", 1, 4)), hidden[:1].clone())
    assert found[:, 0].tolist() == [7] and not hasattr(final(output), KEY)
    found, _ = runner.step(scheduled(("plain", 6, 0), new=[("plain", 6, None)], finished=["a"]), hidden.clone())
    assert found[:, 0].tolist() == [4] * 6


def test_a_request_keeps_its_vector_through_a_preemption_and_loses_it_when_it_is_finished(kind):
    runner = started(kind)
    steer = Order(add=(Addition(LAYER, None, vector(3.0).tobytes()),))
    runner.step(scheduled(("a", 2, 0), new=[("a", 2, steer)]), torch.ones(2, WIDTH))
    others = [(name, 1, steer) for name in "bcde"]  # they take all places
    runner.step(scheduled(*((name, 1, 0) for name in "bcde"), new=others, preempted={"a"}), torch.ones(4, WIDTH))
    again = [("a", 2, steer)] if kind[1] is v2_runner.STEPS else []  # the second runner's come as new
    found, output = runner.step(scheduled(("a", 3, 0), new=again, finished="bcde"), torch.ones(3, WIDTH))
    assert found[:, 0].tolist() == [4, 7, 7] and not hasattr(final(output), KEY)
    found, _ = runner.step(scheduled(("a", 1, 0), new=[("a", 1, None)], finished="a"), torch.ones(1, WIDTH))
    assert found[:, 0].tolist() == [4]


def test_only_the_first_of_those_that_a_layer_is_spread_over_reports(kind, monkeypatch):
    monkeypatch.setattr(common, "sends_reports", lambda: False)
    runner = started(kind)
    _, output = runner.step(scheduled(("a", 1, 0), new=[("a", 1, Order(read=(LAYER,)))]), torch.ones(1, WIDTH))
    assert not hasattr(final(output), KEY)


def test_where_this_server_does_not_run_vllm_nothing_but_the_loading_is_touched(kind):
    cls, _ = kind
    before = dict(vars(cls))
    runner = started(kind, layers=None)
    assert {name for name, value in vars(cls).items() if before.get(name) is not value} == {"load_model"}
    found, output = runner.step(scheduled(("a", 1, 0), new=[("a", 1, None)]), torch.ones(1, WIDTH))
    assert found[:, 0].tolist() == [4] and not hasattr(final(output), KEY)
    assert not any(module._forward_hooks for module in runner.model.modules())


def test_a_runner_beside_a_steered_one_of_the_same_class_is_as_before(kind):
    started(kind)
    tables_module._tables.clear()
    other = kind[0](config(None))
    other.load_model()
    order = Order(read=(LAYER,), add=(Addition(LAYER, None, vector(3.0).tobytes()),))
    found, output = other.step(scheduled(("a", 1, 0), new=[("a", 1, order)]), torch.ones(1, WIDTH))
    assert found[:, 0].tolist() == [4] and not hasattr(final(output), KEY)


def test_patching_twice_is_patching_once(kind):
    cls, steps = kind
    started(kind)
    once = dict(vars(cls))
    common.patch((cls,), cls, steps)
    assert dict(vars(cls)) == once


def test_a_vllm_that_lacks_a_method_is_refused_with_a_sentence(kind):
    cls, steps = kind
    missing = next(name for name in steps if name != "sample_tokens")
    delattr(cls, missing)
    with pytest.raises(ModelError, match=rf"has no .*Runner\.{missing}, which this server steers by. Install vLLM"):
        started(kind)
