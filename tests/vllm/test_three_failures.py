"""What steering in one pass gets wrong in an engine with chunked prefill and a prefix cache, in three ways: each a check that the
engine passes as it is, beside the proof that it fails once the protection is taken out."""

from __future__ import annotations

import pytest
import pytest_asyncio

from server.engine.base import GenerationError
from server.engine.vllm.worker import Span, WorkerSteering
from steering.errors import ModelError
from tests.vllm.exact import OWN, SAME, SHARED, answers, assert_exact, num_cached, request, running

pytestmark = pytest.mark.asyncio(loop_scope="session")
WRONG = "the oracle's"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine():
    async with running("own", "same", max_batched_tokens=64) as engine:
        yield engine


@pytest.fixture
def unsalted(monkeypatch):
    """What is steered is cached as if it were not."""
    monkeypatch.setattr("server.engine.vllm.engine.salt", lambda request, additions: None)


# -- only the last chunk is steered ------------------------------------------------------------------------------------------


async def check_every_chunk_is_steered(prompts, **options) -> None:
    requests = [request("r", prompts(110, 1), OWN)]
    async with running("own", **options) as engine:
        assert_exact(await answers(engine, requests), requests)


async def test_every_chunk_is_steered(prompts):
    await check_every_chunk_is_steered(prompts, max_batched_tokens=32)


async def test_every_chunk_is_steered__can_fail(prompts, monkeypatch):
    """The workers, which are forks of this process, leave a prompt's earlier chunks alone."""
    begin = WorkerSteering.begin

    def only_the_last(self, spans, num_rows):
        ends = {name: request.num_prompt_tokens for name, request in self._requests.items()}
        begin(self, (s._replace(num_tokens=0) if _before(s, ends) else s for s in list(spans)), num_rows)

    def _before(span: Span, ends: dict[str, int]) -> bool:
        return span.position + span.num_tokens < ends.get(span.request_id, 0)

    monkeypatch.setattr(WorkerSteering, "begin", only_the_last)
    with pytest.raises(AssertionError, match=WRONG):
        await check_every_chunk_is_steered(prompts, max_batched_tokens=32)


async def test_in_one_pass_no_prompt_is_cut(prompts):
    await check_every_chunk_is_steered(prompts, one_pass=True)


async def test_in_one_pass_a_prompt_that_would_be_cut_is_refused(prompts):
    with pytest.raises(ModelError, match="max_num_batched_tokens"):
        await check_every_chunk_is_steered(prompts, one_pass=True, max_batched_tokens=32)


async def test_in_one_pass_no_prompt_is_cut__can_fail(prompts, monkeypatch):
    """The workers decide when the prompt ends, and by then most of it has passed. Three protections, taken out one by one."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    create = AsyncEngineArgs.create_engine_config

    def in_chunks(self, *args, **options):
        self.enable_chunked_prefill = True
        return create(self, *args, **options)

    def check():
        return check_every_chunk_is_steered(prompts, one_pass=True, max_batched_tokens=32)

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", in_chunks)
    with pytest.raises(ModelError, match="must not be cut"):
        await check()
    monkeypatch.setattr("server.engine.vllm.options.refuse_unsupported", lambda config, options: None)
    with pytest.raises(GenerationError, match="not answered"):
        await check()
    monkeypatch.setattr("server.engine.vllm.worker._Request.cut", property(lambda _: False, lambda _, value: None))
    with pytest.raises(AssertionError, match=WRONG):
        await check()


# -- a prefix hit is steered from the middle only ----------------------------------------------------------------------------


async def check_a_hit_is_steered_from_the_start(engine, prompts) -> None:
    earlier, then = request("earlier", prompts(75, 1)), request("then", prompts(110, 2), OWN)
    plain = request("plain", prompts(110, 3))
    found = await answers(engine, [earlier])
    found |= await answers(engine, [plain])
    assert num_cached(found["plain"]) == SHARED, "without a hit nothing is shown"
    assert_exact(await answers(engine, [then]), [then])


async def test_a_prefix_hit_is_steered_from_the_start(engine, prompts):
    await check_a_hit_is_steered_from_the_start(engine, prompts)


async def test_a_prefix_hit_is_steered_from_the_start__can_fail(engine, prompts, unsalted):
    with pytest.raises(AssertionError, match=WRONG):
        await check_a_hit_is_steered_from_the_start(engine, prompts)


# -- a steered request poisons the cache of who is not steered ---------------------------------------------------------------


async def check_the_cache_is_not_poisoned(engine, prompts) -> None:
    steered, plain = request("steered", prompts(75, 1), SAME), request("plain", prompts(110, 2))
    for asked in (steered, plain):  # a vector that no query changes acts from the first pass
        assert_exact(await answers(engine, [asked]), [asked])


async def test_the_cache_is_not_poisoned_by_a_steered_request(engine, prompts):
    await check_the_cache_is_not_poisoned(engine, prompts)


async def test_the_cache_is_not_poisoned_by_a_steered_request__can_fail(engine, prompts, unsalted):
    with pytest.raises(AssertionError, match=f"plain: .*{WRONG}"):
        await check_the_cache_is_not_poisoned(engine, prompts)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_pass():
    async with running("own", "same", one_pass=True) as engine:
        yield engine


CHECKS = [check_a_hit_is_steered_from_the_start, check_the_cache_is_not_poisoned]


@pytest.mark.parametrize("check", CHECKS)
async def test_in_one_pass_as_well(one_pass, prompts, check):
    await check(one_pass, prompts)


@pytest.mark.parametrize("check", CHECKS)
async def test_in_one_pass_as_well__can_fail(one_pass, prompts, check, monkeypatch):
    submit = one_pass._runs.submit

    async def unsalted(name, prompt, params, salt, *rest):
        return await submit(name, prompt, params, None, *rest)

    monkeypatch.setattr(one_pass._runs, "submit", unsalted)
    with pytest.raises(AssertionError, match=WRONG):
        await check(one_pass, prompts)
