"""Every architecture that `checkpoint.ARCHITECTURES` promises, with prompts longer than its sliding window where it has one."""

from __future__ import annotations

import pytest

from server.engine.vllm.checkpoint import ARCHITECTURES
from steering.decision import ProfileActivation
from tests.running_vllm import vllm_model
from tests.tiny import FAMILIES
from tests.vllm.exact import ASK, answers, assert_exact, request, running


def test_each_architecture_that_is_promised_is_tried():
    assert {type(vllm_model(family)).__name__ for family in FAMILIES} == set(ARCHITECTURES)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((family, "two passes") for family in FAMILIES if family != "llama"),
        ("qwen3", "one pass"),
        ("gemma3", "one pass"),
    ],
)
async def test_a_family(prompts, family, mode):
    """In chunks where there are two passes; twice, so that the second time all is warm."""
    options = {"one_pass": True} if mode == "one pass" else {"max_batched_tokens": 32}
    own, last, deeper = (
        ProfileActivation(name, 3.0, gate="open", positions=positions)
        for name, positions in (("own", "all"), ("own", "last"), ("own2", "all"))
    )
    requests = [
        request("all", prompts(110, 1), own),
        request("last", prompts(97, 2), last),
        request("two layers", prompts(75, 3), own, deeper),
        request("plain", prompts(96, 4)),
        request("gate opens", prompts.whose_gate(True, 81, family), ASK),
        request("gate stays shut", prompts.whose_gate(False, 101, family), ASK),
    ]
    async with running("own", "own2", family=family, **options) as engine:
        for _ in ("cold", "warm"):
            assert_exact(await answers(engine, requests), requests, family)
