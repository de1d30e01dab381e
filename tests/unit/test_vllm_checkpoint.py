"""A checkpoint's probe is read from its files: it must be what a loaded model's is, or a profile of another model would pass."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from server.engine.vllm.checkpoint import ARCHITECTURES, INDEX_FILE, WEIGHTS_FILE, Checkpoint
from steering.architecture import weight_probe
from steering.errors import ModelError, ProfileError
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_model, tiny_profile


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_is_the_loaded_models(tmp_path, family):
    found = Checkpoint.find(str(save_tiny_checkpoint(tmp_path, family)))
    model = tiny_model(family)
    assert torch.equal(found.weight_probe, weight_probe(model))
    assert (found.num_layers, found.max_positions, found.dtype) == (4, 512, "float32")
    found.check(tiny_profile(model))


def test_of_sharded_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / WEIGHTS_FILE).exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(Checkpoint.find(str(tmp_path)).weight_probe, weight_probe(model))


def test_of_coarse_weights(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = Checkpoint.find(str(tmp_path))
    assert torch.equal(found.weight_probe, weight_probe(model)) and found.dtype == "bfloat16"
    found.check(tiny_profile(tiny_model()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 128}, "hidden size"),
        ({"num_hidden_layers": 3}, "number of layers"),
        ({"vocab_size": 321}, "hash"),
    ],
)
def test_a_profile_of_another_shape_is_refused(tmp_path, wrong, said):
    checkpoint = Checkpoint.find(str(save_tiny_checkpoint(tmp_path)))
    with pytest.raises(ProfileError, match=said):
        checkpoint.check(tiny_profile(tiny_model(**wrong)))


def test_a_profile_of_other_weights_is_refused(tmp_path):
    checkpoint = Checkpoint.find(str(save_tiny_checkpoint(tmp_path)))
    profile = tiny_profile(tiny_model())
    with pytest.raises(ProfileError, match="other weights"):
        checkpoint.check(replace(profile, weight_probe=profile.weight_probe.flip(0)))


@pytest.mark.parametrize("named", [["GPT2LMHeadModel"], [], None])
def test_an_architecture_that_was_not_tried_is_refused(tmp_path, named):
    save_tiny_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    with pytest.raises(
        ModelError, match=rf"not tried with {'GPT2LMHeadModel' if named else 'a model of no'}.*{ARCHITECTURES[0]}"
    ):
        Checkpoint.find(str(tmp_path))


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.find(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="cannot load model"):
        Checkpoint.find(str(tmp_path / "nowhere" / "at all"))


def damage(folder, how):
    if how == "missing":
        (folder / WEIGHTS_FILE).unlink()
    elif how == "cut short":
        (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:1000])
    elif how == "no embedding":
        from safetensors.torch import save_file

        save_file({"other": torch.zeros(2)}, folder / WEIGHTS_FILE)
    else:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}))


@pytest.mark.parametrize("how", ["missing", "cut short", "no embedding", "shard missing"])
def test_weights_that_cannot_be_read_are_told(tmp_path, how):
    checkpoint = Checkpoint.find(str(save_tiny_checkpoint(tmp_path)))
    damage(tmp_path, how)
    with pytest.raises(ModelError, match="embedding cannot be read"):
        checkpoint.check(tiny_profile(tiny_model()))
