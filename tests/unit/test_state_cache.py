"""What an interrupted extraction leaves is used again, and only where it is the same."""

from __future__ import annotations

import pytest
import torch

from steering.architecture import decoder_layers
from steering.errors import TrainingDataError
from steering.training import extraction
from steering.training.cache import StateCache
from steering.training.data import Pair, Query
from tests.tiny import tiny_model, tiny_tokenizer


def queries(n):
    return [Query((("user", f"query {i}"),), f"t:{i}") for i in range(n)]


def counted(model):
    rows = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    return rows


def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "WINDOW", 4)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    wanted = extraction.query_states(model, tokenizer, queries(10), [0, 2])
    rows, cache = counted(model), StateCache(tmp_path, model)
    real = extraction.encode_query

    def encode(tokenizer, query):
        if query.where == "t:9":
            raise KeyboardInterrupt
        return real(tokenizer, query)

    monkeypatch.setattr(extraction, "encode_query", encode)
    with pytest.raises(KeyboardInterrupt):
        extraction.query_states(model, tokenizer, queries(10), [0, 2], cache=cache)
    assert sum(rows) == 8
    monkeypatch.setattr(extraction, "encode_query", real)
    found = extraction.query_states(model, tokenizer, queries(10), [0, 2], cache=cache)
    assert sum(rows) == 10
    torch.testing.assert_close(torch.stack(list(found)), wanted)


def test_layers_on_disk_are_the_layers_in_memory_and_none_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "WINDOW", 3)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [Pair(q, f"no {i}", "yes " * (i % 3 + 1)) for i, q in enumerate(queries(8))]
    number = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0])
    for states in (
        lambda layer, cache: extraction.query_states(model, tokenizer, queries(8), layer, cache=cache),
        lambda layer, cache: extraction.shifts(model, tokenizer, pairs, layer, number=number, cache=cache),
    ):
        held, files = states([3, 1], None), states([3, 1], StateCache(tmp_path, model))
        assert len(files) == 2 and torch.equal(files[0], held[0]) and torch.equal(files[1], held[1])
        assert files[0] is not files[0] and not torch.equal(files[0], files[1])
        assert torch.equal(states(1, None), held[1])
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(TrainingDataError, match="lost while it was needed"):
        files[0]


def test_a_truncated_file_is_computed_again_with_a_word(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    cache = StateCache(tmp_path, model)
    wanted = extraction.query_states(model, tokenizer, queries(3), 1, cache=cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="computed again"):
        found = extraction.query_states(model, tokenizer, queries(3), 1, cache=cache)
    assert torch.equal(found, wanted)


def test_another_model_layer_or_text_finds_nothing(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    extraction.query_states(model, tokenizer, queries(3), 1, cache=StateCache(tmp_path, model))
    rows = counted(model)
    extraction.query_states(model, tokenizer, queries(3), 1, cache=StateCache(tmp_path, model))
    assert rows == []
    extraction.query_states(model, tokenizer, queries(3), 2, cache=StateCache(tmp_path, model))
    extraction.query_states(model, tokenizer, queries(2), 1, cache=StateCache(tmp_path, model))
    with torch.no_grad():
        decoder_layers(model)[0].mlp.down_proj.weight.mul_(1.5)  # the embedding stays
    extraction.query_states(model, tokenizer, queries(3), 1, cache=StateCache(tmp_path, model))
    assert sum(rows) == 8
