"""Chunked prefill, the prefix cache, preemption and whoever shares the batch change no answer.

The oracle runs prompt and answer whole, in two passes, in transformers' own modules, alone (`tests.parity.oracle`); the
engine is given every way to go wrong at once. One-pass steering in other engines fails here in three ways, which have tests
by name, each beside the proof that it can fail.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, replace

import pytest

from server.engine.base import GenerationRequest
from server.engine.native.core import EngineCore
from server.engine.native.kv_cache import BLOCK_SIZES
from server.engine.native.sequence import SteeringState
from steering.decision import ProfileActivation
from steering.intervention import Dose
from steering.profile import SteeringProfile
from tests.engine import DECODERS, Answer, answers, asked, carry_out, reference_model, tiny_core, tiny_decoder
from tests.parity.oracle import two_pass
from tests.tiny import PROFILES, constant_profile, tiny_profile

BLOCK_SIZE = BLOCK_SIZES["cpu"]

NUM_TOKENS = 4
TOLERANCE = 2e-4
NUM_COMMON = 70  # tokens that prompts begin with: two blocks and a bit
SHARED = NUM_COMMON // BLOCK_SIZE * BLOCK_SIZE
CACHES = ("cold", "warm", "after a steered request", "after an unsteered request")
BUDGETS = (256, 64, 16)
PREEMPTED_AFTER = (1, 3, 8, 15, 30, 45)  # steps
OWN, OWN_LAST = (ProfileActivation("own", 3.0, gate="open", positions=where) for where in ("all", "last"))
SAME, SAME_LAST = (ProfileActivation("same", 3.0, gate="open", positions=where) for where in ("all", "last"))
SHUT = ProfileActivation("own", 3.0, gate="closed")
ASK = ProfileActivation("own", 3.0)


@functools.cache
def profile_of(name: str) -> SteeringProfile:
    """`own…`: a vector for each prompt; `same…`: one vector; `equal…`: that of `same`, whatever the layer; or a kind's name.

    A number at the end is the layer, 1 if there is none.
    """
    layer = int(name[-1]) if name[-1].isdigit() else 1
    make = tiny_profile if name.startswith("own") else PROFILES.get(name, constant_profile)
    profile = make(reference_model(), layer, name=name, strength=3.0, seed=layer)
    return replace(profile, experts=profile_of("same").experts) if name.startswith("equal") else profile


@functools.cache
def oracle(
    prompt: tuple[int, ...], activations: tuple[ProfileActivation, ...], num_tokens: int = NUM_TOKENS
) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens, log-probabilities, gates (from the lowest layer up)."""
    steering = [(profile_of(a.profile), a) for a in activations]
    return two_pass(reference_model(), list(prompt), num_tokens, steering)


@functools.cache
def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Random tokens, of which the first `NUM_COMMON` are everyone's."""
    tails = random.Random(seed)
    common = random.Random(0)
    tokens = [(common if i < NUM_COMMON else tails).randrange(5, 300) for i in range(length)]
    return tuple(tokens)


@functools.cache
def prompt_whose_gate(opens: bool, length: int) -> tuple[int, ...]:
    """A prompt for which the profile's own gate is more than half open, or shut."""
    for seed in itertools.count(100):
        found = prompt(length, seed)
        [gate] = oracle(found, (ASK,), 0)[2]
        if gate > 0.5 if opens else gate == 0:
            return found
    raise AssertionError


def steps_of_chunks(core: EngineCore) -> list[int]:
    """How many chunks each call of `prefill` ran; filled while the core runs."""
    seen = []
    prefill = core.runner.prefill

    def counted(segment, chunks):
        seen.append(sum(not chunk.last for chunk in chunks))
        return prefill(segment, chunks)

    core.runner.prefill = counted
    return seen


def mixed() -> list[GenerationRequest]:
    """Eight requests of 40 to 150 tokens that begin alike and are steered in every way."""
    return [
        request("all", prompt(150, 1), OWN),
        request("last", prompt(97, 2), OWN_LAST),
        request("plain, twice", prompt(96, 3), n=2),
        request("gate closed", prompt(120, 4), SHUT),
        request("gate opens", prompt_whose_gate(True, 81), ASK),
        request("gate stays shut", prompt_whose_gate(False, 101), ASK),
        request("short", prompt(40, 5), SAME),
        request("two profiles, twice", prompt(130, 6), OWN, SAME_LAST, n=2),
    ]


def request(name: str, prompt: tuple[int, ...], *activations: ProfileActivation, **options) -> GenerationRequest:
    return asked(name, prompt, *activations, **{"max_tokens": NUM_TOKENS, "logprobs": 0} | options)


def core_of(*names: str, **options) -> EngineCore:
    profiles = [profile_of(name) for name in names or ("own", "same")]
    return tiny_core(profiles, **{"max_num_seqs": 10, "max_model_len": 192} | options)


def prepare(core: EngineCore, cache: str, requests: list[GenerationRequest]) -> None:
    """Fill the prefix cache: with the very requests that follow, or with one that begins like them."""
    if cache == "warm":
        assert_exact(answers(core, requests), requests)
    elif cache != "cold":
        steered = (ProfileActivation("same", 2.0, gate="open"),) if cache == "after a steered request" else ()
        answers(core, [request("earlier", prompt(75, 99), *steered, max_tokens=1)])


def preempting(core: EngineCore, every: int | None = None):
    """An `after_step` that takes the slot of the last or of the first running sequence, wherever it is.

    Args:
        every: so many steps, thirty times; default after the steps of `PREEMPTED_AFTER`.
    """
    steps = PREEMPTED_AFTER if every is None else range(every, 30 * every, every)
    which = itertools.cycle([-1, 0])

    def after_step(step: int) -> None:
        running = core.scheduler._running
        if step in steps and running:
            core.scheduler._preempt(running[next(which)])

    return after_step


def assert_exact(found: dict[str, Answer], requests: list[GenerationRequest]) -> None:
    """Every completion has the oracle's tokens and log-probabilities, every decision its gates."""
    for r in requests:
        activations = r.steering.activations
        tokens, logprobs, gates = oracle(r.prompt_token_ids, activations, r.sampling.max_tokens)
        answer = found[r.request_id]
        for index in range(r.n):
            assert answer.tokens(index) == tokens, f"{r.request_id}: not the oracle's tokens"
            error = max(abs(a - b) for a, b in zip(answer.logprobs(index), logprobs, strict=True))
            assert error < TOLERANCE, f"{r.request_id}: {error} from the oracle's log-probabilities"
        by_layer = sorted(answer.decision.profiles, key=lambda decision: profile_of(decision.name).layer)
        assert [d.gate for d in by_layer] == pytest.approx(gates, abs=1e-3)


def hits(core: EngineCore, requests: list[GenerationRequest], **options) -> tuple[dict[str, Answer], int, int]:
    """Run requests; what they answer, and how many tokens were found in the lower and in the upper part."""
    before = core.stats().prefix_cache_hits
    arrivals = options.pop("arrivals", [(0, r) for r in requests])
    found = carry_out(core, arrivals, **options)
    after = core.stats().prefix_cache_hits
    return found, after[0] - before[0], after[1] - before[1]


def full_blocks(r: GenerationRequest) -> int:
    """Tokens of a prompt that a repetition finds: all full blocks that leave a token to compute."""
    return (len(r.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE


def expected_lower(cache: str, requests: list[GenerationRequest]) -> int:
    most = {"cold": 0, "warm": 10**9}.get(cache, SHARED)
    return sum(min(most, full_blocks(r)) for r in requests)


@dataclass(frozen=True)
class Alone:
    """One request, and what it finds above the site: nothing, what was steered alike, or what was not steered there."""

    request: GenerationRequest
    upper: dict[str, int | None]  # by cache; None: whether the vector came out the same, bit for bit, is rounding's


ALONE = {
    "all": Alone(request("r", prompt(110, 11), SAME), {"warm": 96}),
    "last": Alone(request("r", prompt(97, 12), OWN_LAST), {"warm": 96, "after an unsteered request": SHARED}),
    "all, own vector": Alone(request("r", prompt(150, 13), OWN), {"warm": None}),
}
whether_preempted = pytest.mark.parametrize("preempted", [False, True], ids=["undisturbed", "preempted"])
every_cache = pytest.mark.parametrize("cache", CACHES)
every_budget = pytest.mark.parametrize("budget", BUDGETS)


@whether_preempted
@every_cache
@every_budget
@pytest.mark.parametrize("kind", ALONE)
def test_a_request_alone(kind, budget, cache, preempted):
    case = ALONE[kind]
    core = core_of(max_batched_tokens=budget)
    prepare(core, cache, [case.request])
    unfinished = steps_of_chunks(core)
    options = {"after_step": preempting(core)} if preempted else {}
    found, lower, upper = hits(core, [case.request], **options)
    assert_exact(found, [case.request])
    wanted = case.upper.get(cache, 0)
    if preempted:
        assert core.stats().num_preemptions > 0
        assert lower >= expected_lower(cache, [case.request])
    else:
        assert lower == expected_lower(cache, [case.request])
        assert upper in ((0, lower) if wanted is None else (wanted,))
    if budget == 16 and cache != "warm":
        assert any(unfinished), "the prompt is cut into chunks"


@pytest.mark.parametrize("order", ["together", "shuffled"])
@whether_preempted
@every_cache
@every_budget
def test_a_mixed_batch(budget, cache, preempted, order):
    requests = mixed()
    core = core_of(max_batched_tokens=budget)
    prepare(core, cache, requests)
    options = {"after_step": preempting(core)} if preempted else {}
    if order == "shuffled":
        luck = random.Random(f"{budget} {cache} {preempted}")
        options["arrivals"] = [(luck.randrange(12), r) for r in luck.sample(requests, len(requests))]
    found, lower, upper = hits(core, requests, **options)
    assert_exact(found, requests)
    wanted = expected_lower(cache, requests)
    assert (core.stats().num_preemptions > 0) == preempted
    assert lower == wanted if order == "together" and not preempted else lower >= wanted
    if cache in ("warm", "after an unsteered request"):
        assert upper >= SHARED, "unsteered requests find what unsteered requests left above the site"


@pytest.mark.parametrize("cache", ["warm", "after a steered request"])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_mixed_batch_in_rows_and_pages_by_every_decoder(kind, paged, cache):
    requests = mixed()
    core = core_of(decoder=tiny_decoder(kind=kind), paged=paged, max_batched_tokens=16)
    prepare(core, cache, requests)
    luck = random.Random(cache)
    arrivals = [(luck.randrange(12), r) for r in luck.sample(requests, len(requests))]
    found, lower, _ = hits(core, requests, arrivals=arrivals, after_step=preempting(core))
    assert_exact(found, requests)
    assert lower >= expected_lower(cache, requests) and core.stats().num_preemptions > 0


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
def test_a_kv_budget_too_small_for_all_to_grow(prefix_cache, paged):
    """Preempted by the scheduler itself, in mid answer: the answer goes on under the vector that it began with."""
    kinds = [(OWN,), (OWN_LAST,), (), (ASK,)]
    requests = [request(str(i), prompt(80, 20 + i), *kind, max_tokens=40) for i, kind in enumerate(kinds)]
    options = {} if prefix_cache else {"prefix_cache_bytes": 0}
    core = core_of(num_blocks=11, max_batched_tokens=64, paged=paged, **options)
    assert_exact(answers(core, requests), requests)
    assert core.stats().num_preemptions > 0
    assert (core.stats().prefix_cache_hits[0] > 0) == prefix_cache


@whether_preempted
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("names", [("own0", "own2"), ("own3",), ("same0", "own3"), ("own1", "same2", "own3")])
def test_sites_at_several_layers_and_at_the_last_one(names, decoder, preempted):
    """Chunks of 16; twice, so that the second time every part is warm; in company that is steered at some of the sites only."""
    everywhere = [ProfileActivation(name, 3.0, gate="open") for name in names]
    mixed = [ProfileActivation(n, 2.0, gate="open", positions=("all", "last")[i % 2]) for i, n in enumerate(names)]
    requests = [
        request("everywhere", prompt(110, 31), *everywhere),
        request("plain", prompt(96, 32)),
        request("last", prompt(129, 33), *mixed[::-1]),
        request("first only", prompt(75, 34), everywhere[0]),
        request("its own gates", prompt(101, 35), *(ProfileActivation(name, 3.0) for name in names)),
    ]
    core = core_of(*names, decoder=tiny_decoder(kind=decoder), max_batched_tokens=16)
    for cache in ("cold", "warm"):
        found, lower, upper = hits(
            core, requests, after_step=preempting(core, every=3) if preempted else lambda step: None
        )
        assert_exact(found, requests)
        wanted = expected_lower(cache, requests)
        assert lower >= wanted if preempted else lower == wanted
    assert (core.stats().num_preemptions > 0) == preempted
    assert upper >= len(names) * full_blocks(requests[1]), "the plain one finds itself in each part"


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@every_budget
def test_rows_whose_gate_is_shut_are_unsteered_bit_for_bit_with_chunks_and_hits(budget, paged):
    """The same schedule twice, once with steering off for all: what is not steered does not differ in a single bit."""
    steered = mixed()
    plain = [request(r.request_id, r.prompt_token_ids, n=r.n) for r in steered]
    shut = {"plain, twice", "gate closed", "gate stays shut"}

    def run(requests):
        core = core_of(max_batched_tokens=budget, paged=paged)
        for r in plain:
            answers(core, [r])  # both begin with the same cache
        answers(core, requests)  # and with all of their own steered blocks in it, so that neither computes more
        return hits(core, requests)

    with_steering, *hits_with = run(steered)
    without, *hits_without = run(plain)
    assert hits_with == hits_without == [expected_lower("warm", plain)] * 2
    for r in steered:
        same = with_steering[r.request_id].numbers == without[r.request_id].numbers
        assert same == (r.request_id in shut), r.request_id


@pytest.mark.parametrize("cache", ["cold", "warm", "after a steered request"])
@pytest.mark.parametrize("made", ["orthogonal_residual", "alphasteer", "cast", "layered"])
def test_every_kind_of_profile_in_chunks_with_hits_and_preemption(made, cache):
    requests = [
        request("all", prompt(110, 71), ProfileActivation(made, 3.0, gate="open")),
        request("last", prompt(97, 72), ProfileActivation(made, 3.0, gate="open", positions="last")),
        request("own gate", prompt(101, 73), ProfileActivation(made, 3.0)),
        request("plain", prompt(96, 74)),
        request("another kind, too", prompt(75, 75), ProfileActivation(made, 2.0, gate="open"), OWN),
    ]
    core = core_of(made, "own", "same", max_batched_tokens=16)
    prepare(core, cache, requests)
    found, lower, _ = hits(core, requests, after_step=preempting(core))
    assert_exact(found, requests)
    assert lower >= expected_lower(cache, requests) and core.stats().num_preemptions > 0


# -- the three failures of one-pass steering in an engine with chunked prefill and a prefix cache ----------------------------


def check_every_chunk_is_steered() -> None:
    requests = [request("r", prompt(110, 41), OWN)]
    assert_exact(answers(core_of(max_batched_tokens=16), requests), requests)


def test_only_the_last_chunk_is_not_steered():
    check_every_chunk_is_steered()


def test_only_the_last_chunk_is_not_steered__can_fail(monkeypatch):
    add = Dose.add

    def only_the_last(self, states, start, num_prompt_tokens):
        return add(self, states, start, num_prompt_tokens) if start + len(states) >= num_prompt_tokens else states

    monkeypatch.setattr(Dose, "add", only_the_last)
    with pytest.raises(AssertionError, match="the oracle's"):
        check_every_chunk_is_steered()


def check_a_hit_is_steered_from_the_start() -> None:
    requests = [request("r", prompt(110, 42), OWN)]
    core = core_of(max_batched_tokens=64)
    prepare(core, "after an unsteered request", requests)
    found, lower, _ = hits(core, requests)
    assert lower == SHARED, "without a hit nothing is shown"
    assert_exact(found, requests)


def test_prefix_hit_is_steered_from_the_start():
    check_a_hit_is_steered_from_the_start()


def test_prefix_hit_is_steered_from_the_start__can_fail(monkeypatch):
    monkeypatch.setattr(SteeringState, "salt", lambda self, segment: (b"", 0))
    with pytest.raises(AssertionError, match="the oracle's"):
        check_a_hit_is_steered_from_the_start()


def check_the_cache_is_not_poisoned() -> None:
    requests = [request("r", prompt(110, 43))]
    core = core_of(max_batched_tokens=64)
    prepare(core, "after a steered request", requests)
    found, lower, _ = hits(core, requests)
    assert lower == SHARED, "without a hit nothing is shown"
    assert_exact(found, requests)


def test_the_cache_is_not_poisoned_by_a_steered_request():
    check_the_cache_is_not_poisoned()


def test_the_cache_is_not_poisoned_by_a_steered_request__can_fail(monkeypatch):
    monkeypatch.setattr(SteeringState, "salt", lambda self, segment: (b"", 0))
    with pytest.raises(AssertionError, match="the oracle's"):
        check_the_cache_is_not_poisoned()


# -- and what the salt must tell apart besides -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(SAME, SAME_LAST, id="all, then last"),
        pytest.param(SAME_LAST, SAME, id="last, then all"),
        pytest.param(SAME, ProfileActivation("same", 2.0, gate="open"), id="another strength"),
        pytest.param(SAME, ProfileActivation("same", -3.0, gate="open"), id="the other way"),
    ],
)
def test_the_same_prompt_steered_otherwise(first, then):
    core = core_of(max_batched_tokens=64)
    for activation in (first, then, first):
        requests = [request("r", prompt(110, 51), activation)]
        assert_exact(answers(core, requests), requests)


@pytest.mark.parametrize(
    ("first", "then"), list(itertools.permutations([(), ("equal0",), ("equal2",), ("equal0", "equal2")], 2))
)
def test_the_same_vector_at_another_site(first, then):
    core = core_of("equal0", "equal2", max_batched_tokens=64)
    for names, length in ((first, 75), (then, 110), (first, 97)):
        activations = [ProfileActivation(name, 3.0, gate="open") for name in names]
        requests = [request("r", prompt(length, 54), *activations)]
        assert_exact(answers(core, requests), requests)
    assert core.stats().prefix_cache_hits[0] > 0


@pytest.mark.parametrize("activation", [SAME, SAME_LAST, OWN_LAST])
def test_prompts_that_end_at_every_side_of_a_block(activation):
    longest = prompt(129, 52)
    core = core_of(max_batched_tokens=64)
    for length in (129, 97, 110, 129, 95, 96, 64, 65, 66):
        requests = [request("r", longest[:length], activation)]
        assert_exact(answers(core, requests), requests)


def answer_that_is_cached(core: EngineCore, *activations: ProfileActivation) -> tuple[int, ...]:
    """Prompt (80 tokens) and answer (30) of a request that was preempted in mid answer: three blocks of both are cached."""
    first = request("r", prompt(80, 53), *activations, max_tokens=30)
    others = [request(str(i), prompt(80, 60 + i), max_tokens=40) for i in range(2)]
    found = answers(core, [*others, first])
    assert core.stats().num_preemptions > 0
    assert_exact(found, [first])
    return *first.prompt_token_ids, *found["r"].tokens()


@pytest.mark.parametrize("activations", [(), (SAME,), (SAME_LAST,), (OWN, SAME_LAST)])
def test_an_answer_that_is_sent_back_as_a_prompt(activations):
    """A conversation: of the second prompt, which is the first with its answer, the cache holds what it may, and no more."""
    core = core_of(max_batched_tokens=64, num_blocks=11)
    whole = answer_that_is_cached(core, *activations)
    then = [request("then", (*whole, 7, 8, 9), *activations)]
    found, lower, _ = hits(core, then)
    assert lower == 96
    assert_exact(found, then)


def test_a_prompt_that_ends_within_a_block_of_an_earlier_answer():
    """The same tokens and the same vector for the answer, but another place where the answer begins."""
    core = core_of(max_batched_tokens=64, num_blocks=11)
    then = [request("then", answer_that_is_cached(core, SAME_LAST)[:96], SAME_LAST)]
    again = preempting(core)  # so that it looks its last block up
    found, lower, _ = hits(core, then, after_step=lambda step: again(step) if step == 3 else None)
    assert lower == 64 + 96
    assert_exact(found, then)
