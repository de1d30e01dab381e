"""A prompt's log-probabilities are transformers', steered or not, whatever cuts the prompt up and whoever shares the batch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from server.engine.base import GenerationError
from server.engine.native import prompt_logprobs
from server.engine.native.kv_cache import BLOCK_SIZES
from server.engine.native.load import make_decoder
from server.engine.native.sequence import SequenceGroup
from steering.decision import ProfileActivation
from tests.engine import DECODERS, answers, asked, block_bytes, reference_model, tiny_core, tiny_decoder
from tests.parity.oracle import prompt_table
from tests.tiny import FAMILIES, tiny_model, tiny_profile

LENGTHS = (1, 2, 33, 90)
PROMPTS = [tuple((7 * i * j + 11 * j + 3) % 300 for j in range(length)) for i, length in enumerate(LENGTHS)]
TOP = 4
OPEN = ProfileActivation("p", 3.0, gate="open")
LAST = replace(OPEN, positions="last")
SHUT = replace(OPEN, gate="closed")
rows_and_pages = pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])


@functools.cache
def profile_of(family="llama", layer=1):
    return tiny_profile(reference_model(family), layer, name="p", strength=3.0)


@functools.cache
def table(prompt, activation=None, family="llama", layer=1):
    steering = [] if activation is None else [(profile_of(family, layer), activation)]
    return prompt_table(reference_model(family), list(prompt), steering)


def scored(name, prompt, *activations, **options):
    return asked(name, prompt, *activations, **{"prompt_logprobs": TOP, "max_tokens": 2} | options)


def core_of(profiles=(), **options):
    return tiny_core(profiles, **{"max_model_len": 128} | options)


def found_of(answer):
    """The prompt's log-probabilities: on the first event, and on no other."""
    events = sorted((e for completion in answer.completions for e in completion), key=lambda e: e.decision is None)
    assert all(event.prompt_logprobs is None for event in events[1:])
    return events[0].prompt_logprobs


def check(found, prompt, wanted, tolerance=1e-4):
    """Own log-probability, rank and the likeliest tokens at each position, against a (P, V) table."""
    assert len(found) == len(prompt) and found[0] is None
    for position, entry in enumerate(found[1:], 1):
        row = wanted[position - 1]
        own = float(row[prompt[position]])
        assert entry.logprob == pytest.approx(own, abs=tolerance)
        assert int((row > own + tolerance).sum()) < entry.rank <= 1 + int((row > own - tolerance).sum())
        ids, values = zip(*entry.top, strict=True)
        assert values == pytest.approx(row.topk(TOP).values.tolist(), abs=tolerance)
        assert values == pytest.approx(row[list(ids)].tolist(), abs=tolerance)


@rows_and_pages
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unsteered_they_are_transformers(family, kind, paged):
    core = core_of(family=family, decoder=tiny_decoder(family, kind), paged=paged)
    found = answers(core, [scored(str(i), prompt) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = reference_model(family)(torch.tensor([prompt])).logits[0]
        check(found_of(found[str(i)]), prompt, torch.log_softmax(logits.double(), -1))


@rows_and_pages
@pytest.mark.parametrize("activation", [OPEN, LAST, SHUT], ids=["all", "last", "shut"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steered_they_are_those_of_two_passes(family, activation, paged):
    core = core_of([profile_of(family)], family=family, paged=paged)
    found = answers(core, [scored(str(i), prompt, activation) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        check(found_of(found[str(i)]), prompt, table(prompt, activation, family))
    moved = (table(PROMPTS[3], activation, family) - table(PROMPTS[3], None, family))[:-1].abs().max()
    assert moved > 0.1 if activation is OPEN else moved < 1e-9, "only `all` steers what comes before the prompt's end"


@pytest.mark.parametrize("layer", [0, 3])
def test_the_site_may_be_the_first_or_the_last_layer(layer):
    core = core_of([profile_of(layer=layer)], max_batched_tokens=16)
    found = answers(core, [scored("r", PROMPTS[3], OPEN)])["r"]
    check(found_of(found), PROMPTS[3], table(PROMPTS[3], OPEN, layer=layer))


@rows_and_pages
@pytest.mark.parametrize("budget", [256, 40, 16])
def test_chunks_and_neighbours_change_nothing(budget, paged):
    """Steered, plain and unscored prompts together, cut into chunks."""
    core = core_of([profile_of()], max_batched_tokens=budget, paged=paged)
    asks = [
        scored("steered", PROMPTS[3], OPEN),
        asked("unscored", PROMPTS[3][1:], OPEN),
        scored("plain", PROMPTS[3]),
        scored("short, twice", PROMPTS[2], OPEN, n=2),
        asked("unscored, plain", PROMPTS[2]),
    ]
    found = answers(core, asks)
    check(found_of(found["steered"]), PROMPTS[3], table(PROMPTS[3], OPEN))
    check(found_of(found["plain"]), PROMPTS[3], table(PROMPTS[3]))
    check(found_of(found["short, twice"]), PROMPTS[2], table(PROMPTS[2], OPEN))
    for name in ("unscored", "unscored, plain"):
        assert found_of(found[name]) is None


@pytest.mark.parametrize("steered", [False, True])
def test_a_warm_prefix_cache_hides_no_row(steered):
    """Asked again, unscored requests take what is cached; scored ones take only what lies below the site."""
    core = core_of([profile_of()] if steered else [])
    activations = (OPEN,) if steered else ()
    wanted = table(PROMPTS[3], *activations)
    cold = answers(core, [scored("r", PROMPTS[3], *activations)])["r"]
    before = core.stats().prefix_cache_hits
    again = answers(core, [scored("r", PROMPTS[3], *activations)])["r"]
    for answer in (cold, again):
        check(found_of(answer), PROMPTS[3], wanted)
    whole_blocks = (len(PROMPTS[3]) - 1) // BLOCK_SIZES["cpu"] * BLOCK_SIZES["cpu"]
    hits = [now - then for now, then in zip(core.stats().prefix_cache_hits, before, strict=True)]
    assert hits == ([whole_blocks, 0] if steered else [0, 0])
    assert again.completions[0][0].num_cached_tokens == 0, "no token was spared all of its layers"
    unscored = answers(core, [asked("r", PROMPTS[3], *activations, max_tokens=2)])["r"]
    assert unscored.completions[0][0].num_cached_tokens == whole_blocks
    assert unscored.tokens() == cold.tokens()


def test_cached_tokens_are_those_that_every_segment_found():
    core = core_of([profile_of()])

    def cached(*activations, prompt=PROMPTS[3]):
        events = answers(core, [asked("r", prompt, *activations)])["r"].completions[0]
        assert all(event.num_cached_tokens == 0 for event in events[1:])
        return events[0].num_cached_tokens

    assert cached() == 0
    assert cached() == 64
    assert cached(OPEN) == 0, "below the site it was found, above it was not: there the vector changes it"
    assert cached(OPEN) == 64
    assert cached(prompt=PROMPTS[3][:40] + PROMPTS[3][:40]) == 32


def test_tokens_that_only_the_upper_segment_found_are_not_cached_ones():
    """Prompts that are scored by the gate alone push others' blocks out below the site, not above it."""
    core = core_of([profile_of()], prefix_cache_bytes=6 * block_bytes(tiny_decoder(), steered=True))
    answers(core, [asked("r", PROMPTS[3])])
    for i in range(4):
        other = asked("s", [i + 1] * 90)
        core.add(SequenceGroup.of(other, lambda _: None, score_only=True))
        while core.has_work:
            core.step()
    before = core.stats().prefix_cache_hits
    again = answers(core, [asked("r", PROMPTS[3])])["r"]
    assert [now - then for now, then in zip(core.stats().prefix_cache_hits, before, strict=True)] == [0, 64]
    assert again.completions[0][0].num_cached_tokens == 0


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_preemption_in_mid_prefill_or_later_changes_nothing(after):
    core = core_of([profile_of()], max_batched_tokens=16)
    group = SequenceGroup.of(scored("r", PROMPTS[3], OPEN, max_tokens=6), lambda _: None)
    core.add(group)
    events = []
    for _ in range(after):
        events += [event for _, event in core.step()]
    core.scheduler._preempt(group.sequences[0])
    while core.has_work:
        events += [event for _, event in core.step()]
    assert core.stats().num_preemptions == 1 and len(events) == 6
    check(events[0].prompt_logprobs, PROMPTS[3], table(PROMPTS[3], OPEN))
    assert all(event.prompt_logprobs is None for event in events[1:])


def test_requests_without_them_are_bit_for_bit_what_they_were_beside_one_with_them():
    """Their pass is their own: neither its rows nor its neighbours are others'."""
    plain = [asked(str(i), prompt, max_tokens=1) for i, prompt in enumerate(PROMPTS)]
    without = answers(core_of(), plain)
    beside = answers(core_of(), [*plain[:2], scored("scored", PROMPTS[3], max_tokens=1), *plain[2:]])
    for name, answer in without.items():
        assert beside[name].numbers == answer.numbers


def test_only_prompts_that_ask_compute_every_row(monkeypatch):
    core = core_of()
    rows = []
    logits = core.runner.decoder.logits
    monkeypatch.setattr(core.runner.decoder, "logits", lambda states: rows.append(len(states)) or logits(states))
    answers(core, [asked("r", PROMPTS[3], max_tokens=1)])
    assert rows == [1]


def test_logits_are_held_for_a_few_rows_at_a_time(monkeypatch):
    core = core_of()
    monkeypatch.setattr(prompt_logprobs, "MAX_ROWS", 8)
    rows = []
    logits = core.runner.decoder.logits
    monkeypatch.setattr(core.runner.decoder, "logits", lambda states: rows.append(len(states)) or logits(states))
    found = answers(core, [scored("r", PROMPTS[3], max_tokens=1)])["r"]
    assert max(rows) == 8 and sum(rows) == len(PROMPTS[3])
    check(found_of(found), PROMPTS[3], table(PROMPTS[3]))


def test_penalties_bias_and_temperature_leave_them_alone():
    options = {"logit_bias": {5: 50.0}, "repetition_penalty": 2.0, "temperature": 1.7, "seed": 1}
    found = answers(core_of(), [scored("r", PROMPTS[2], **options)])["r"]
    check(found_of(found), PROMPTS[2], table(PROMPTS[2]))


def test_more_are_asked_for_than_there_are_tokens_and_none_at_all():
    core = core_of()
    many = found_of(answers(core, [scored("r", PROMPTS[1], prompt_logprobs=10_000)])["r"])
    assert len(many[1].top) == core.runner.decoder.vocab_size
    none = found_of(answers(core, [scored("r", PROMPTS[1], prompt_logprobs=0)])["r"])
    assert none[1].top == () and none[1].logprob == many[1].logprob


def test_log_probabilities_that_are_no_numbers_fail_the_request_alone():
    """In the middle of the prompt, while its end, from which the answer goes on, is sound."""
    model = tiny_model()
    decoder = make_decoder(model, 128)
    core = core_of(decoder=decoder)
    logits = decoder.logits

    def overflowing(states):
        found = logits(states)
        if len(found) == 4:  # the scored prompt's rows but its last
            found[1, 7] = torch.nan
        return found

    decoder.logits = overflowing
    results = core.run([scored("bad", (5, 300, 2, 9, 4)), asked("good", PROMPTS[2], max_tokens=2)])
    [failure] = results["bad"]
    assert isinstance(failure, GenerationError) and failure.code == "non_finite_logits"
    assert len(results["good"]) == 2
