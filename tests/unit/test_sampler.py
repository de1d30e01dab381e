"""Sampling against what the definitions say: distributions, truncations, penalties."""

from __future__ import annotations

import pytest
import torch

from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.native.sampler import adjust, draw, likeliest
from server.engine.native.sequence import SequenceGroup

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
