"""Sampling against what the definitions say: distributions, truncations, penalties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from server.engine.base import GenerationError, GenerationRequest, SamplingOptions
from server.engine.native.sampler import adjust, draw, likeliest, sample
from server.engine.native.sequence import SequenceGroup
from server.engine.native.token_mask import unpack, unpack_on_device

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))


def frequencies(**options):
    """How often each token is drawn over an even grid of uniforms: the distribution itself."""
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = draw(LOGITS.expand(count, -1), [SamplingOptions(max_tokens=1, **options)] * count, uniforms)
    return torch.bincount(tokens, minlength=5) / count


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.66}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.45}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"temperature": 0.5}, [0.01 / 0.275, 0.16 / 0.275, 0.0025 / 0.275, 0.0625 / 0.275, 0.04 / 0.275]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
)  # fmt: skip
def test_draws_follow_the_truncated_distribution(options, wanted):
    assert frequencies(**options).tolist() == pytest.approx(wanted, abs=2e-3)


def test_rows_of_one_batch_keep_their_own_options():
    options = [SamplingOptions(max_tokens=1, top_k=1), SamplingOptions(max_tokens=1)]
    tokens = draw(LOGITS.expand(2, -1), options, torch.tensor([0.99, 0.999]))
    assert tokens.tolist() == [1, 2]


def sequence(prompt, completion, **options):
    asked = GenerationRequest("r", tuple(prompt), SamplingOptions(max_tokens=9, **options))
    [found] = SequenceGroup.of(asked, lambda _: None).sequences
    found.token_ids += completion
    return found


def test_penalties_follow_their_definitions():
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0])
    found = adjust(logits, sequence([0, 1], [3, 3], repetition_penalty=2.0))
    assert found.tolist() == [1.0, -2.0, 0.5, 1.5, 1.0]
    found = adjust(logits, sequence([0, 1], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25))
    assert found.tolist() == [2.0, -1.0, 0.5, 2.0, 0.25]  # the prompt does not count
    found = adjust(logits, sequence([0], [1], min_tokens=2, stop_token_ids=frozenset({4}), logit_bias={0: 1.5}))
    assert found.tolist() == [3.5, -1.0, 0.5, 3.0, -torch.inf]
    assert (
        adjust(logits, sequence([0], [1, 2], min_tokens=2, stop_token_ids=frozenset({4}))).tolist() == logits.tolist()
    )


@pytest.mark.parametrize("vocab_size", [192, 200])
def test_the_likeliest_is_the_first_of_the_largest(vocab_size):
    logits = torch.randint(-20, 20, (50, vocab_size), generator=torch.Generator().manual_seed(3)).float()  # many ties
    logits[7] = -torch.inf
    logits[9, 130] = torch.nan
    largest, tokens = likeliest(logits)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert torch.equal(largest.isfinite(), logits.amax(dim=-1).isfinite())
    assert not largest[7].isfinite() and not largest[9].isfinite()


# -- grammars ------------------------------------------------------------------------------------------------------------


class Only:
    """A grammar, and its state, that allows the same tokens for ever."""

    finished = False

    def __init__(self, *token_ids, vocab_size=5):
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[list(token_ids)] = 1
        self._words = np.packbits(bits, bitorder="little").view(np.int32)

    def begin(self):
        return self

    def mask(self):
        return self._words

    def accept(self, token_id):
        raise AssertionError("the sampler moves no grammar on")


class Broken(Only):
    def mask(self):
        raise GenerationError("no further", "grammar_failed")


def sampled(logits, *sequences):
    return sample(torch.stack(logits), list(sequences))


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-40, 1e-3, 1.0, 2.0])
def test_only_what_the_grammar_allows_is_chosen(temperature):
    asked = [sequence([0], [], temperature=temperature, seed=seed, grammar=Only(0, 2)) for seed in range(64)]
    found = {s.token_id for s in sampled([LOGITS] * 64, *asked)}
    assert found == ({0, 2} if temperature >= 1 else {0})
    plain = {
        s.token_id for s in sampled([LOGITS] * 64, *(sequence([0], [], temperature=temperature) for _ in range(64)))
    }
    assert plain > {1} if temperature >= 1 else plain == {1}


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-40, 1e-3, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"logit_bias": {2: -100.0}}])
def test_a_grammar_that_allows_one_token_gets_it(options, temperature):
    logits = LOGITS * 1000
    [found] = sampled([logits], sequence([0], [], temperature=temperature, grammar=Only(2), logprobs=3, **options))
    assert found.token_id == 2 and found.finite and found.failure is None
    assert found.logprobs.logprob == 0
    assert found.logprobs.top == ((2, 0.0), *((i, -math.inf) for i, _ in found.logprobs.top[1:]))


def test_the_grammar_comes_after_bias_and_before_truncation():
    liked = {"logit_bias": {1: 100.0, 3: 5.0}, "grammar": Only(0, 2, 3)}
    assert [s.token_id for s in sampled([LOGITS], sequence([0], [], temperature=0.0, **liked))] == [3]
    cut = [sequence([0], [], temperature=1.0, top_k=2, seed=i, grammar=Only(0, 2, 4)) for i in range(64)]
    assert {s.token_id for s in sampled([LOGITS] * 64, *cut)} == {0, 4}, "the two likeliest of the allowed"


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_min_tokens_gives_way_where_the_grammar_allows_nothing_but_the_end(temperature):
    held = {"min_tokens": 3, "stop_token_ids": frozenset({1}), "temperature": temperature}
    [ends] = sampled([LOGITS], sequence([0], [], grammar=Only(1), **held))
    assert ends.token_id == 1
    goes_on = [sequence([0], [], grammar=Only(1, 2), seed=i, **held) for i in range(32)]
    assert {s.token_id for s in sampled([LOGITS] * 32, *goes_on)} == {2}


def test_rows_beside_a_grammar_keep_their_numbers():
    logits = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 4},
        {"logit_bias": {0: 1.5}, "temperature": 0.7, "seed": 5},
    ]

    def rows(masked):
        grammars = [Only(3) if masked else None, Broken() if masked else None]
        return [
            sequence([1], [2], logprobs=2, grammar=grammar, **o)
            for o in options
            for grammar in (None, grammars[len(o) > 1])
        ]

    beside, alone = sampled(logits, *rows(True)), sampled(logits, *rows(False))
    assert beside[::2] == alone[::2]
    assert [s.failure and s.failure.code for s in beside] == [
        None,
        None,
        None,
        "grammar_failed",
        None,
        "grammar_failed",
    ]
    assert beside[1].token_id == 3


def test_a_draw_never_falls_on_a_token_of_no_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.1, -torch.inf]])
    for uniform in (0.0, 0.5, 1.0 - 2**-53, 1.0):
        tokens = draw(logits, [SamplingOptions(max_tokens=1)], torch.tensor([uniform], dtype=torch.float64))
        assert tokens.item() in (1, 3)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 330])
def test_words_are_unpacked_bit_by_bit(vocab_size):
    generator = np.random.default_rng(vocab_size)
    words = generator.integers(-(2**31), 2**31, (3, -(-vocab_size // 32)), dtype=np.int32)
    wanted = [[bool(int(row[t // 32]) >> (t % 32) & 1) for t in range(vocab_size)] for row in words]
    assert unpack(words, vocab_size, torch.device("cpu")).tolist() == wanted
    assert unpack_on_device(torch.from_numpy(words), vocab_size).tolist() == wanted
