"""The offline answerer against transformers, run whole with hand-made hooks (`tests.parity.oracle`)."""

from __future__ import annotations

import pytest
import torch

from server.lab.answerer import NativeAnswerer
from steering.decision import ProfileActivation, SteeringOptions
from steering.errors import TrainingDataError
from steering.training.data import Query
from steering.training.extraction import encode_query
from tests.parity import oracle
from tests.tiny import tiny_model, tiny_profile, tiny_tokenizer

QUERIES = [
    Query((("user", text),)) for text in ("how do I steer a fox?", "the quick brown", "why", "a model with a vector")
]
ANSWERS = ["the lazy dog jumps", "with a vector", "how do I steer the other foxes?", "no"]


@pytest.fixture(scope="module")
def profiles():
    model = tiny_model()
    return [tiny_profile(model, 1, name="low"), tiny_profile(model, 2, name="high", seed=1)]


@pytest.fixture(scope="module")
def answerer(profiles):
    return NativeAnswerer(tiny_model(), tiny_tokenizer(), profiles, batch=3)


def forced(model, query, answer, steering):
    """log p of the answer's tokens in two passes: prompt read alone, then prompt and answer under its vectors."""
    tokenizer = tiny_tokenizer()
    prompt = encode_query(tokenizer, query)
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad(), oracle._eager(model):
        vectors, _ = oracle._vectors(model, prompt, steering)
        table = torch.log_softmax(oracle._logits(model, prompt + tail, vectors, len(prompt)).double(), -1)
    return [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tail)]


def activations(profiles, positions, gate="open"):
    return [(p, ProfileActivation(p.name, 1.5, gate=gate, positions=positions)) for p in profiles]


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("gate", ["open", "auto"])
def test_log_probabilities_are_those_of_teacher_forcing_under_the_querys_own_vector(
    answerer, profiles, positions, gate
):
    steering = activations(profiles, positions, gate)
    found = answerer.logprobs(QUERIES, ANSWERS, SteeringOptions(tuple(a for _, a in steering)))
    model = tiny_model()
    for query, answer, mine in zip(QUERIES, ANSWERS, found, strict=True):
        assert mine == pytest.approx(forced(model, query, answer, steering), abs=1e-3)


def test_plain_log_probabilities_are_the_plain_models(answerer):
    model = tiny_model()
    for query, answer, mine in zip(QUERIES, ANSWERS, answerer.logprobs(QUERIES, ANSWERS), strict=True):
        assert mine == pytest.approx(forced(model, query, answer, []), abs=1e-3)


def test_a_vector_read_at_the_answers_end_would_be_another(profiles):
    """The negative control: prompt and answer as one prompt give other numbers."""
    model, steering = tiny_model(), activations(profiles, "all")
    tokenizer = tiny_tokenizer()
    prompt = encode_query(tokenizer, QUERIES[0])
    tail = tokenizer(ANSWERS[0], add_special_tokens=False)["input_ids"]
    table = oracle.prompt_table(model, prompt + tail, steering)
    wrong = [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tail)]
    right = forced(model, QUERIES[0], ANSWERS[0], steering)
    assert max(abs(a - b) for a, b in zip(wrong, right, strict=True)) > 0.05


def test_one_query_with_several_answers_gets_the_same_as_alone(answerer, profiles):
    steering = SteeringOptions(tuple(a for _, a in activations(profiles, "all")))
    together = answerer.logprobs([QUERIES[0]] * len(ANSWERS), ANSWERS, steering)
    for answer, mine in zip(ANSWERS, together, strict=True):
        assert mine == pytest.approx(answerer.logprobs([QUERIES[0]], [answer], steering)[0], abs=1e-4)


def test_answers_are_greedy_and_say_what_steering_did(answerer, profiles):
    model, steering = tiny_model(), activations(profiles, "all")
    found = answerer.answer(QUERIES, SteeringOptions(tuple(a for _, a in steering)), max_tokens=12)
    for query, answer in zip(QUERIES, found, strict=True):
        tokens, _, _ = oracle.two_pass(model, encode_query(tiny_tokenizer(), query), 12, steering)
        wanted = tokens[: tokens.index(3)] if 3 in tokens else tokens
        assert list(answer.token_ids) == wanted and answer.finished == (3 in tokens)
        assert answer.fired and answer.dose > 0 and answer.decision.reason == "forced_open"
    assert all(not answer.fired and answer.dose == 0 for answer in answerer.answer(QUERIES, max_tokens=2))


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_is_answered(answerer):
    with pytest.raises(TrainingDataError, match=r"suite.jsonl:7.* 511"):
        answerer.answer([Query((("user", "fox " * 600),), "suite.jsonl:7")])
    assert len(answerer.answer(QUERIES, max_tokens=2)) == len(QUERIES)
    assert answerer.ms_per_token(QUERIES[:2]) > 0
