"""`--device-map`: the same profile wherever the model's parts lie, and a sentence for every map that cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.native import device_map
from server.engine.native.load import load_model
from steering.architecture import config_sha256, decoder_layers, model_key, weight_probe
from tests.lab import make_lab, train

REST = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
OFFLOADED = {
    "second layer": {"model.embed_tokens": "cpu"}
    | {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    | REST,
    "embedding": {"model.embed_tokens": "disk", "model.layers": "cpu"} | REST,
    "all": {"": "disk"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def unmapped(lab, tmp_path_factory):
    """A profile of layers 0 to 3 without a map, and beside it its cache."""
    out = tmp_path_factory.mktemp("unmapped") / "p"
    assert train(lab, out, "--layer", "auto").exit_code == 0
    return out


def write(path, places):
    path.write_text(json.dumps(places))
    return str(path)


@pytest.mark.parametrize("places", ["auto", "balanced", {"": "cpu"}, *OFFLOADED.values()], ids=str)
def test_the_profile_is_the_unmapped_models_to_the_bit(lab, unmapped, tmp_path, places):
    given = places if isinstance(places, str) else write(tmp_path / "map.json", places)
    result = train(lab, tmp_path / "p", "--layer", "auto", "--no-cache", "--device-map", given)
    assert result.exit_code == 0, result.output
    first, second = (folder / "profile.safetensors" for folder in (unmapped, tmp_path / "p"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("places", OFFLOADED.values(), ids=OFFLOADED)
def test_probe_hash_and_key_are_the_unmapped_models(lab, tmp_path, places):
    plain, mapped = load_model(str(lab / "model")), load_model(str(lab / "model"), device_map=places)
    assert any(weight.is_meta for weight in mapped.parameters())
    assert torch.equal(weight_probe(mapped), weight_probe(plain))
    assert config_sha256(mapped) == config_sha256(plain) and model_key(mapped) == model_key(plain)
    other = AutoModelForCausalLM.from_pretrained(lab / "model")
    with torch.no_grad():
        decoder_layers(other)[1].mlp.down_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    assert model_key(load_model(str(tmp_path / "other"), device_map=places)) == model_key(other) != model_key(plain)


def test_a_mapped_model_finds_the_unmapped_ones_cache(lab, unmapped, tmp_path, monkeypatch):
    cache = unmapped.with_name("p.cache")
    monkeypatch.setattr("steering.training.extraction.batches_by_length", None)  # nothing is to be read
    arguments = ("--layer", "auto", "--cache", str(cache), "--device-map", write(tmp_path / "m.json", {"": "disk"}))
    assert train(lab, tmp_path / "p", *arguments).exit_code == 0


@pytest.mark.parametrize(
    ("places", "extra", "message"),
    [
        ("best", (), "--device-map best: cannot be read (No such file or directory). Give one of auto, balanced,"),
        ({"": "cpu"}, ("--device", "cpu"), "exclude each other"),
        (OFFLOADED["second layer"], ("--strength", "auto"), "--device-map has cpu, disk. Give --strength a number."),
        ([0], (), "does not map modules to devices"),
        ({}, (), "does not map modules to devices"),
        ({"": True}, (), "does not map modules to devices"),
        ({"model": "cpu"}, (), "--device-map leaves out 1 of the model's weights, the first is lm_head.weight."),
        ({"": "cpu", "transformer": "cpu"}, (), "the model has no module 'transformer'"),
        ({"": "cpu", "model.layers.1": "disk"}, (), "'model.layers.1' lies within ''. Name each part once."),
        ({"model": "cpu", "model.norm": "disk", "lm_head": "cpu"}, (), "'model.norm' lies within 'model'."),
        ({"": "gpu"}, (), "'gpu' is no device"),
        ({"": "meta"}, (), "'meta' is not served"),
        ({"": 99}, (), "cuda:99"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_is_refused_before_the_weights_are_read(
    lab, tmp_path, places, extra, message, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    given = places if isinstance(places, str) else write(tmp_path / "map.json", places)
    result = train(lab, tmp_path / "p", "--device-map", given, *extra)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


def test_a_strategy_that_took_several_devices_is_refused_for_strength_auto(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("steering.training.extraction._reading", None)
    real = load_model

    def spread(*arguments, device_map, **options):
        assert device_map == "auto"
        return real(*arguments, device_map=OFFLOADED["embedding"], **options)

    monkeypatch.setattr("server.engine.native.load.load_model", spread)
    result = train(lab, tmp_path / "p", "--strength", "auto", "--device-map", "auto")
    assert result.exit_code == 2 and "--device-map has cpu, disk" in " ".join(result.output.split()), result.output


def test_strength_auto_works_with_a_map_of_one_device(lab, tmp_path):
    given = write(tmp_path / "map.json", {"": "cpu"})
    result = train(lab, tmp_path / "p", "--strength", "auto", "--strengths", "1", "--device-map", given)
    assert result.exit_code == 0, result.output


def test_without_accelerate_it_is_said_what_to_install(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(device_map, "find_spec", lambda name: None)
    result = train(lab, tmp_path / "p", "--device-map", "auto")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "needs the package accelerate: pip install accelerate" in said
    assert "finesteer-server[large]" in said
    assert train(lab, tmp_path / "p").exit_code == 0


def test_calibrate_takes_a_map(lab, unmapped, tmp_path):
    from typer.testing import CliRunner

    from server.cli import app

    arguments = ["calibrate", str(unmapped), "--queries", str(lab / "calibration.jsonl"), "--model", str(lab / "model")]
    arguments += ["--miss-rate", "0.1"]
    given = write(tmp_path / "map.json", OFFLOADED["all"])
    for out, extra in (("a", []), ("b", ["--device-map", given])):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / out), *extra])
        assert result.exit_code == 0, result.output
    first, second = ((tmp_path / out / "profile.safetensors").read_bytes() for out in "ab")
    assert first == second
