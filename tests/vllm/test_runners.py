"""The adapters on vLLM's own runners, as far as that goes without a GPU.

`surface`: all that they use is there, by name and by argument. The second runner cannot run here (its kernels need Triton), but
the way of a step through it can be walked: its own methods over a toy model, with stand-ins for the kernels, the attention and
the sampler. Its device memory, streams and CUDA graphs are not tested.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed here")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu import model_runner as second
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

from server.engine.vllm import runner as common
from server.engine.vllm import tables as tables_module
from server.engine.vllm import v1_runner, v2_runner
from server.engine.vllm.orders import KEY, Addition, Order
from server.engine.vllm.settings import PluginSettings

Second = second.GPUModelRunner
WIDTH, LAYER, MAX_NUM_SEQS, MAX_ROWS = 4, 1, 4, 16


def arguments(function) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def test_surface_of_the_runners():
    for owner, steps in ((First, v1_runner.STEPS), (Second, v2_runner.STEPS)):
        assert {"load_model", "get_model", *steps} <= set(vars(owner))
    assert "load_model" in vars(CPUModelRunner) and not set(v1_runner.STEPS) & set(vars(CPUModelRunner))
    assert arguments(First._update_states) == arguments(Second.finish_requests) == ["scheduler_output"]
    assert arguments(First._prepare_inputs) == ["scheduler_output", "num_scheduled_tokens"]
    assert inspect.signature(Second.prepare_inputs).return_annotation is InputBatch


def test_surface_of_the_data():
    fields = {cls: {f.name for f in dataclasses.fields(cls)} for cls in (InputBatch, NewRequestData, SchedulerOutput)}
    assert {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np", "num_tokens"} <= fields[InputBatch]
    assert {"req_id", "prompt_token_ids", "sampling_params"} <= fields[NewRequestData]
    used = {"finished_req_ids", "preempted_req_ids", "scheduled_new_reqs", "total_num_scheduled_tokens"}
    assert used <= fields[SchedulerOutput]
    assert "kv_transfer_params" in EngineCoreOutput.__annotations__


def test_surface_of_the_outputs_and_the_schedulers():
    output = ModelRunnerOutput([], {})
    setattr(output, KEY, 1)  # no slots
    for cls in (AsyncOutput, AsyncGPUModelRunnerOutput):
        assert issubclass(cls, AsyncModelRunnerOutput) and "__slots__" not in vars(cls)
        assert arguments(cls.get_output) == []
    for cls in (Scheduler, AsyncScheduler):
        assert arguments(cls.update_from_output) == ["scheduler_output", "model_runner_output"]


def test_the_order_of_a_step_in_each_runner():
    """Who goes, who comes, which rows; then the model."""
    for execute, calls in (
        (First.execute_model, ("self._update_states(", "self._prepare_inputs(", "self._model_forward(")),
        (
            Second.execute_model,
            ("self.finish_requests(", "self.add_requests(", "self.prepare_inputs(", ".run_fullgraph(", "self.model("),
        ),
    ):
        places = [inspect.getsource(execute).index(call) for call in calls]
        assert places == sorted(places)


class Doubling(nn.Module):
    def forward(self, hidden, residual):
        return 2 * hidden, residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Doubling(), Doubling()])

    def forward(self, input_ids, **_):
        hidden, residual = torch.ones(len(input_ids), WIDTH), torch.zeros(len(input_ids), WIDTH)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual

    compute_logits = None  # the sampler's


class LateOutput(AsyncModelRunnerOutput):
    """The runner's, without its streams."""

    def __init__(self, model_runner_output, **_) -> None:
        self.model_runner_output = model_runner_output

    def get_output(self):
        return self.model_runner_output


@pytest.fixture
def runner(monkeypatch):
    """vLLM's second runner, its model loaded; `full` replays a graph of `MAX_ROWS` rows where it is set."""
    monkeypatch.setattr(common, "sends_reports", lambda: True)
    monkeypatch.setattr(Second, "load_model", lambda self: None)  # the model is there
    for name in v2_runner.STEPS:
        monkeypatch.setattr(Second, name, getattr(Second, name))  # undone afterwards
    for name, value in {
        "set_forward_context": lambda *_, **__: nullcontext(),
        "build_slot_mappings_by_layer": lambda *_: {},
        "prepare_prefill_inputs": lambda *_: None,
        "prepare_pos_seq_lens": lambda *_: None,
        "combine_sampled_and_draft_tokens": lambda ids, _, __, starts, *___: starts[1:] - 1,
        "AsyncOutput": LateOutput,
        "async_tensor_h2d": async_tensor_h2d,
    }.items():
        monkeypatch.setattr(second, name, value)
    monkeypatch.setattr(StagedWriteTensor, "apply_write", lambda self: None)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    v2_runner.patch()
    made = object.__new__(Second)
    for name in [
        "pp_handler",
        "pooling_runner",
        "encoder_cache",
        "adaptive_verification",
        "aux_output_connector",
        "pcp_manager",
        "lora_config",
        "fast_prefill",
        "ubatch_runner",
        "speculator",
        "batch_sharder",
        "execute_model_state",
    ]:
        setattr(made, name, None)
    for name in [
        "block_tables",
        "lora_state",
        "sampler",
        "prompt_logprobs_worker",
        "kv_connector",
        "ec_connector",
        "eplb",
        "step_timing",
        "kv_cache_config",
        "observability_config",
        "main_stream",
        "output_copy_stream",
        "attn_groups",
    ]:
        made.__dict__[name] = MagicMock()
    made.observability_config.cudagraph_metrics = False
    made.block_tables.gather_block_tables.return_value = made.block_tables.compute_slot_mappings.return_value = ()
    made.model_state = MagicMock(num_new_sampled_tokens_per_step=1)
    made.model_state.prepare_inputs.return_value = {}
    made.parallel_config = SimpleNamespace(data_parallel_size=1, data_parallel_rank=0)
    made.model_config = SimpleNamespace(
        rswa_window=None,
        get_hidden_size=lambda: WIDTH,
        dtype=torch.float32,
        hf_text_config=SimpleNamespace(num_hidden_layers=2),
    )
    made.vllm_config = SimpleNamespace(
        additional_config=PluginSettings((LAYER,)).to_config(),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_ROWS),
        model_config=made.model_config,
    )
    made.device = torch.device("cpu")
    made.is_encoder_decoder = made.use_pp = made.uses_inputs_embeds = made.use_aux_hidden_state_outputs = False
    made.check_ep_fault = False
    made.is_first_pp_rank = made.is_last_pp_rank = True
    made.dcp_size = made.decode_query_len = 1
    made.num_speculative_steps = 0
    made.max_num_reqs = MAX_NUM_SEQS
    made.max_num_tokens = MAX_ROWS
    made.input_buffers = InputBuffers(MAX_NUM_SEQS, MAX_ROWS, made.device)
    made.req_states = RequestState(MAX_NUM_SEQS, 64, MAX_ROWS, 0, 32, made.device)
    made.sample = lambda hidden, batch, grammar: (SimpleNamespace(sampled_token_ids=None), None, None)
    made.postprocess_sampled = lambda *_: None
    made.model = Model()
    made.full = False

    def dispatch(num_reqs, num_tokens, *_, **__):
        if made.full:
            return BatchExecutionDescriptor(second.CUDAGraphMode.FULL, MAX_ROWS, MAX_NUM_SEQS)
        return BatchExecutionDescriptor(second.CUDAGraphMode.NONE, num_tokens, num_reqs)

    made.cudagraph_manager = SimpleNamespace(
        dispatch=dispatch, run_fullgraph=lambda _: made.model(made.input_buffers.input_ids)
    )
    made.load_model()
    table = tables_module._tables[LAYER]
    table._skips = False
    yield made
    tables_module._tables.clear()


def async_tensor_h2d(data, device=None, dtype=None, out=None):
    found = torch.as_tensor(data, dtype=dtype)
    return found if out is None else out.copy_(found)


def step(runner, *rows, new=(), finished=(), preempted=None):
    """`rows`: (request, tokens); `new`: (request, prompt, tokens that are computed, all its tokens, order)."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = dict(rows)
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    output.finished_req_ids, output.preempted_req_ids = set(finished), preempted
    output.scheduled_new_reqs = [
        NewRequestData(
            name,
            [1] * length,
            [],
            SimpleNamespace(extra_args=None if order is None else order.to_args(), max_tokens=9),
            None,
            ([1],),
            computed,
            None,
            prefill_token_ids=[1] * total,
        )
        for name, length, computed, total, order in new
    ]
    runner.computed = {
        name: n for name, n in getattr(runner, "computed", {}).items() if name not in output.finished_req_ids
    }
    runner.computed |= {name: computed for name, _, computed, _, _ in new}
    cached = CachedRequestData.make_empty()
    cached.req_ids = [name for name, _ in rows if name not in {n[0] for n in new}]
    cached.num_computed_tokens = [runner.computed[name] for name in cached.req_ids]
    cached.new_block_ids = [None] * len(cached.req_ids)
    output.scheduled_cached_reqs = cached
    for name, count in rows:
        runner.computed[name] += count
    assert runner.execute_model(output) is None
    state = runner.execute_model_state
    found = runner.sample_tokens(None).get_output()
    names, starts = state.input_batch.req_ids, state.input_batch.query_start_loc_np
    assert found.req_ids == names
    values = state.hidden_states[:, 0].tolist()
    assert values[state.input_batch.num_tokens :] == [4.0] * (len(values) - state.input_batch.num_tokens)  # padding
    return {name: values[starts[i] : starts[i + 1]] for i, name in enumerate(names)}, getattr(found, KEY, {})


def order(prompt: float, answer: float) -> Order:
    raw = [torch.full((WIDTH,), float(value)).numpy().tobytes() for value in (prompt, answer)]
    return Order(read=(LAYER,), add=(Addition(LAYER, *raw),))


@pytest.mark.parametrize("full", [False, True])
def test_a_step_of_the_second_runner_is_steered_as_its_requests_say(runner, full):
    """It sorts a step's requests by their number of tokens: rows are not in the scheduler's order."""
    runner.full = full
    rows, reports = step(
        runner, ("long", 5), ("plain", 3), ("short", 1),
        new=[("long", 7, 0, 7, order(1, 3)), ("plain", 3, 0, 3, None), ("short", 1, 0, 1, order(5, 9))],
    )  # fmt: skip
    assert rows == {"short": [13], "plain": [4] * 3, "long": [5] * 5} and set(reports) == {"short"}
    assert reports["short"].states[LAYER] == torch.full((WIDTH,), 4.0).numpy().tobytes()
    rows, reports = step(runner, ("long", 2), ("plain", 1), ("short", 1))
    assert rows == {"long": [5, 7], "plain": [4], "short": [13]} and set(reports) == {"long"}
    for _ in range(2):
        rows, reports = step(runner, ("long", 1), ("plain", 1), ("short", 1))
        assert rows == {"long": [7], "plain": [4], "short": [13]} and not reports
    rows, _ = step(runner, ("plain", 1), ("new", 9), new=[("new", 9, 0, 9, None)], finished=["long", "short"])
    assert rows == {"plain": [4], "new": [4] * 9}


def test_a_request_that_is_preempted_comes_anew_and_is_steered_by_its_prompt_s_length(runner):
    step(runner, ("a", 3), ("b", 1), new=[("a", 3, 0, 3, order(1, 3)), ("b", 1, 0, 1, None)])
    step(runner, ("a", 1), ("b", 1))
    step(runner, ("b", 1), preempted={"a"})
    rows, reports = step(runner, ("a", 4), ("b", 1), new=[("a", 3, 1, 5, order(1, 3))])  # its answer is prefilled too
    assert rows == {"a": [5, 7, 7, 7], "b": [4]} and not reports


def test_a_dummy_run_is_no_step(runner, monkeypatch):
    begun = []
    step(runner, ("a", 3), new=[("a", 3, 0, 3, order(1, 3))])
    steering = getattr(runner, common.ATTRIBUTE)
    monkeypatch.setattr(steering, "begin", lambda *_: begun.append(1))
    runner.is_pooling_model, runner.max_model_len = False, 64
    runner.maybe_dummy_run_with_lora = lambda *_, **__: nullcontext()
    runner.block_tables.get_dummy_block_tables.return_value = ()
    runner._dummy_run(4)
    assert not begun and steering.end() is None
