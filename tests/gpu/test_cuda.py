"""On a real card: pages, flash attention, CUDA graphs and bfloat16 say what the CPU says."""

from __future__ import annotations

import pytest
import torch

from server.engine.native.build import EngineOptions, build_core
from server.engine.native.load import make_decoder
from steering.decision import ProfileActivation
from tests.engine import answers, asked, reference_model, tiny_core
from tests.parity.test_grammar import LETTERS, lark, schema
from tests.tiny import tiny_model, tiny_profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

PROMPTS = [[(7 * i * j + 3) % 300 for j in range(20 + 43 * i)] for i in range(1, 6)]


def requests(*, steered=True, strength=3.0):
    activation = ProfileActivation("p", strength, gate="open")
    return [asked(str(i), p, *([activation] if steered and i % 2 else []), max_tokens=6) for i, p in enumerate(PROMPTS)]


def cuda_core(dtype, *, graphs=True):
    model = tiny_model("llama").to("cuda", dtype)
    profile = tiny_profile(reference_model("llama"), 1, name="p", strength=3.0)
    options = EngineOptions(8, 512, 64, kv_cache_bytes=1 << 26, prefix_cache_bytes=1 << 24)
    core, _ = build_core(make_decoder(model, 512), model, [profile], options)
    if not graphs:
        core.runner._graphed = None
    return core


def close(found, wanted, tolerance):
    for name, answer in wanted.items():
        assert found[name].logprobs()[0] == pytest.approx(answer.logprobs()[0], abs=tolerance)


def test_float32_equals_the_cpu():
    profile = tiny_profile(reference_model("llama"), 1, name="p", strength=3.0)
    wanted = answers(tiny_core([profile], max_model_len=512), requests())
    found = answers(cuda_core(torch.float32), requests())
    for name, answer in wanted.items():
        assert found[name].tokens() == answer.tokens()
    close(found, wanted, 1e-3)


def test_bfloat16_is_near_the_cpu_and_uses_flash_attention_and_graphs():
    profile = tiny_profile(reference_model("llama"), 1, name="p", strength=3.0)
    core = cuda_core(torch.bfloat16)
    assert core.runner.cache.flash and core.runner._graphed is not None
    close(answers(core, requests()), answers(tiny_core([profile], max_model_len=512), requests()), 0.2)


def test_graphs_say_what_plain_passes_say():
    graphed, plain = cuda_core(torch.bfloat16), cuda_core(torch.bfloat16, graphs=False)
    close(answers(graphed, requests()), answers(plain, requests()), 0.05)


def test_strength_zero_is_unsteered_bit_for_bit_and_a_vector_acts():
    core = cuda_core(torch.bfloat16)
    plain = answers(core, requests(steered=False))
    shut = answers(core, requests(strength=0.0))
    steered = answers(core, requests())
    assert [a.numbers for a in shut.values()] == [a.numbers for a in plain.values()]
    assert steered["1"].numbers != plain["1"].numbers and steered["0"].numbers == plain["0"].numbers


def test_a_decode_pass_waits_for_nothing():
    core = cuda_core(torch.bfloat16)
    answers(core, requests())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            core.runner._graphed([1, 2], [0, 1], [1, 1], [[0, 0]])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_masks_as_on_the_cpu(temperature):
    options = {"temperature": temperature, "seed": 1, "max_tokens": 50, "n": 2}
    asks = [
        asked("schema", PROMPTS[0], grammar=schema(), **options),
        asked("letters", PROMPTS[1], grammar=lark(LETTERS), **options),
    ]
    wanted = answers(tiny_core(max_model_len=512), asks)
    found = answers(cuda_core(torch.float32), asks)
    for name, answer in wanted.items():
        assert [found[name].tokens(i) for i in range(2)] == [answer.tokens(i) for i in range(2)]
