"""The compiled kernels of a lone row against transformers, through the whole engine; and what `--compile` refuses."""

from __future__ import annotations

import shutil

import pytest

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native import compiled
from server.engine.native.load import make_decoder
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import ModelError
from tests.engine import answers, asked, tiny_core
from tests.parity.oracle import two_pass
from tests.tiny import tiny_model, tiny_profile

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
PROMPTS = [[(7 * i * j + 3) % 300 for j in range(3 + 20 * i)] for i in range(4)]
OPEN = ProfileActivation("p", 3.0, gate="open")


@needs_compiler
@pytest.mark.parametrize(
    "family", ["llama", "mistral"]
)  # mistral's window of 8 is soon left, then the plain layers run
def test_a_lone_row_says_what_transformers_says(family, monkeypatch):
    calls = []
    layer, head = compiled._kernels()

    def counted(*args):
        calls.append(args[3].shape[1])
        return layer(*args)

    monkeypatch.setattr(compiled, "_kernels", lambda: (counted, head))
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
