"""Compiled kernels, of a lone row and of several, against transformers, through the whole engine; what `--compile` refuses."""

from __future__ import annotations

import shutil

import pytest
from torch._dynamo.utils import counters

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native import compiled_row, compiled_rows
from server.engine.native.load import make_decoder
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ModelError
from tests.engine import answers, asked, tiny_core
from tests.parity.oracle import two_pass
from tests.tiny import tiny_model, tiny_profile

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
PROMPTS = [[(7 * i * j + 3) % 300 for j in range(3 + 20 * i)] for i in range(4)]
OPEN = ProfileActivation("p", 3.0, gate="open")
SHUT = ProfileActivation("p", 3.0, gate="closed")


@needs_compiler
@pytest.mark.parametrize(
    "family", ["llama", "mistral"]
)  # mistral's window of 8 is soon left, then the plain layers run
def test_a_lone_row_says_what_transformers_says(family, monkeypatch):
    calls = []
    layer, head = compiled_row._kernels()

    def counted(*args):
        calls.append(args[5].shape[2])
        return layer(*args)

    monkeypatch.setattr(compiled_row, "_kernels", lambda: (counted, head))
    reference = tiny_model(family)
    profile = tiny_profile(reference, 1, name="p", strength=3.0)
    core = tiny_core(
        [profile], family, make_decoder(tiny_model(family), 128, compiled=True), paged=False, max_model_len=128
    )
    for steering in ([], [(profile, OPEN)]):
        for prompt in PROMPTS:
            found = answers(core, [asked("r", prompt, *[a for _, a in steering], max_tokens=6)])["r"]
            tokens, logprobs, _ = two_pass(reference, prompt, 6, steering)
            assert found.tokens() == tokens
            assert found.logprobs() == pytest.approx(logprobs, abs=2e-4)
    assert calls and (family == "llama" or max(calls) <= 8)


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_several_rows_say_what_transformers_says(family, monkeypatch):
    """Rows of several lengths that end at different times, so that free slots lie between those that decode."""
    batches = []
    kernel = compiled_rows._kernel()

    def counted(*args):
        batches.append(args[0].shape[0])
        return kernel(*args)

    monkeypatch.setattr(compiled_rows, "_kernel", lambda: counted)
    reference = tiny_model(family)
    profile = tiny_profile(reference, 1, name="p", strength=3.0)
    core = tiny_core(
        [profile], family, make_decoder(tiny_model(family), 128, compiled=True), paged=False, max_model_len=128
    )
    steering = [[], [(profile, OPEN)], [(profile, SHUT)], [(profile, OPEN)]]
    lengths = 9, 3, 6, 8
    requests = [
        asked(str(i), PROMPTS[i], *[a for _, a in steering[i]], max_tokens=length) for i, length in enumerate(lengths)
    ]
    found = answers(core, requests)
    for i, length in enumerate(lengths):
        tokens, logprobs, _ = two_pass(reference, PROMPTS[i], length, steering[i])
        assert found[str(i)].tokens() == tokens
        assert found[str(i)].logprobs() == pytest.approx(logprobs, abs=2e-4)
    if family == "llama":  # mistral's long rows have left its window: there the plain layers run
        assert set(batches) == {4, 3, 2}


@needs_compiler
def test_a_shut_gate_beside_open_ones_is_unsteered_bit_for_bit():
    profile = tiny_profile(tiny_model("llama"), 1, name="p", strength=3.0)
    core = tiny_core([profile], "llama", make_decoder(tiny_model("llama"), 128, compiled=True), paged=False)
    mixed, plain = (
        answers(core, [asked("a", PROMPTS[1], *first), asked("b", PROMPTS[2], *second), asked("c", PROMPTS[0])])
        for first, second in (([SHUT], [OPEN]), ([], []))
    )
    assert mixed["a"].numbers == plain["a"].numbers
    assert mixed["c"].numbers == plain["c"].numbers
    assert mixed["b"].numbers != plain["b"].numbers


@needs_compiler
def test_once_warm_nothing_is_compiled_again():
    """Whatever slot a lone row has, however many rows there are, however long they are."""
    core = tiny_core([], "llama", make_decoder(tiny_model("llama"), 128, compiled=True), paged=False)
    core.warm_up()
    compiled = counters["stats"]["unique_graphs"]
    for lengths in (
        [9],
        [3, 5, 12],
        [12, 4],
        [2, 7, 4, 14],
        [3, 3, 3, 3, 9],
    ):  # the last one left sits in another slot each time
        answers(core, [asked(str(i), PROMPTS[i % 4], max_tokens=length) for i, length in enumerate(lengths)])
    assert counters["stats"]["unique_graphs"] == compiled


@needs_compiler
def test_strength_zero_is_unsteered_bit_for_bit():
    profile = tiny_profile(tiny_model("llama"), 1, name="p", strength=3.0)
    core = tiny_core([profile], "llama", make_decoder(tiny_model("llama"), 128, compiled=True), paged=False)
    shut = ProfileActivation("p", 0.0, gate="open")
    plain, zero = (answers(core, [asked("r", PROMPTS[1], *a)])["r"].numbers for a in ([], [shut]))
    assert plain == zero


@needs_compiler
def test_a_warm_up_leaves_no_trace():
    core = tiny_core([], "llama", make_decoder(tiny_model("llama"), 128, compiled=True), paged=False)
    core.warm_up()
    stats = core.stats()
    assert (stats.num_running, stats.prefix_cache_queries, stats.prefix_cache_usage) == (0, (0, 0), 0.0)
    request = GenerationRequest("r", (1, 2, 3), SamplingOptions(2, temperature=0.0), SteeringOptions())
    assert len(core.run([request])["r"]) == 2


@needs_compiler
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_families_without_kernels_are_refused(family):
    with pytest.raises(ModelError, match="--compile: only Llama's and Mistral's"):
        make_decoder(tiny_model(family), 128, compiled=True)


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler"):
        make_decoder(tiny_model("llama"), 128, compiled=True)
