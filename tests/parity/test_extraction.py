"""Batched, padded, early-stopped extraction = one row at a time through all of the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from steering.architecture import decoder_layers
from steering.errors import ModelError, TrainingDataError
from steering.training.data import Pair, Query
from steering.training.extraction import batches_by_length, query_states, shifts
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

TEXTS = ["Hi", "How do I steer a model with a vector?", "a", "the quick brown fox jumps over the lazy dog " * 2, "why?"]
ANSWERS = ["No.", "With a hook on the layer, of course.", "yes, " * 9, "b", "the other foxes"]


def queries(texts=TEXTS):
    return [Query((("user", text),), f"t:{i}") for i, text in enumerate(texts)]


@torch.no_grad()
def alone(model, ids, layer):
    """The site's states of one unpadded row, through the whole model: (T, d)."""
    return model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer + 1][0]


def prompt(tokenizer, text):
    return tokenizer.encode(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_query_states_equal_single_rows_through_the_whole_model(family, layer):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    wanted = torch.stack([alone(model, prompt(tokenizer, t), layer)[-1] for t in TEXTS])
    for batch_tokens in (1, 60, 8192):
        found = query_states(model, tokenizer, queries(), layer, batch_tokens=batch_tokens)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2  # the comparison could fail


@pytest.mark.parametrize("family", FAMILIES)
def test_shifts_are_differences_of_means_over_the_answers_own_tokens(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()

    def mean(text, answer):
        before, after = prompt(tokenizer, text), tokenizer.encode(answer, add_special_tokens=False)
        return alone(model, before + after, 1)[len(before) :].mean(0)

    others = ANSWERS[1:] + ANSWERS[:1]
    pairs = [Pair(q, a, b) for q, a, b in zip(queries(), ANSWERS, others, strict=True)]
    wanted = torch.stack([mean(t, a) - mean(t, b) for t, a, b in zip(TEXTS, ANSWERS, others, strict=True)])
    torch.testing.assert_close(shifts(model, tokenizer, pairs, 1), wanted, rtol=1e-4, atol=1e-4)
    number = torch.tensor([1, 0, 1, 2, 1])
    averaged = torch.stack([wanted[number == i].mean(0) for i in range(3)])
    torch.testing.assert_close(shifts(model, tokenizer, pairs, 1, number=number), averaged, rtol=1e-4, atol=1e-4)


def test_shifts_are_preferred_minus_undesired():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [Pair(q, a, b) for q, a, b in zip(queries(), ANSWERS, reversed(ANSWERS), strict=True) if a != b]
    swapped = [Pair(p.query, p.undesired, p.preferred) for p in pairs]
    forward, backward = shifts(model, tokenizer, pairs, 1), shifts(model, tokenizer, swapped, 1)
    torch.testing.assert_close(forward, -backward, rtol=1e-4, atol=1e-4)
    assert forward.abs().max() > 1e-2


def test_layers_above_the_site_are_not_run_and_the_hook_is_gone_afterwards():
    model, ran = tiny_model(), []
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    query_states(model, tiny_tokenizer(), queries(["x"]), 1)
    assert ran == [0, 1]
    ran.clear()
    model(torch.tensor([[5, 6]]))
    assert ran == [0, 1, 2, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = list(batches_by_length(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_a_row_beyond_the_models_positions_is_refused_by_its_line():
    with pytest.raises(TrainingDataError, match=r"t:0: \d+ tokens .* 32 positions"):
        query_states(tiny_model(max_position_embeddings=32), tiny_tokenizer(), queries(["long " * 40]), 1)


def test_states_that_are_not_numbers_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("inf")
    with pytest.raises(ModelError, match=r"not finite numbers in torch.float32, for one at t:.*--dtype"):
        query_states(model, tiny_tokenizer(), queries(), 1)


def test_an_answer_without_tokens_is_refused_by_its_line():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("b", "")
    pairs = [Pair(q, "x", a) for q, a in zip(queries(), ANSWERS, strict=True)]
    with pytest.raises(TrainingDataError, match="t:3: the undesired answer has no tokens"):
        shifts(tiny_model(), tokenizer, pairs, 1)


def test_a_tokenizer_without_chat_template_and_an_impossible_layer_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ModelError, match="layers 0 to 3"):
        query_states(tiny_model(), tokenizer, queries(), 4)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        query_states(tiny_model(), tokenizer, queries(), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_in_one_pass_equal_single_rows_through_the_whole_model(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    layers = [0, 1, 2]  # transformers' last hidden state is normalised: not the last layer's output
    before = [list(layer._forward_hooks) for layer in decoder_layers(model)]
    found = query_states(model, tokenizer, queries(), range(4), batch_tokens=60)
    assert [list(layer._forward_hooks) for layer in decoder_layers(model)] == before
    assert not found.is_inference()
    assert found.shape == (4, len(TEXTS), 64)
    for layer in layers:
        wanted = torch.stack([alone(model, prompt(tokenizer, t), layer)[-1] for t in TEXTS])
        torch.testing.assert_close(found[layer], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[3], query_states(model, tokenizer, queries(), 3), rtol=1e-4, atol=1e-4)
    assert (found[1] - found[2]).abs().max() > 1e-2
