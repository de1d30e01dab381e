"""Control vectors of other tools: files written as those tools write them become profiles, and profiles such files."""

from __future__ import annotations

import json
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from server.cli import app
from steering.errors import ProfileError
from steering.interchange.convert import from_profile
from steering.interchange.vectors import read_vectors
from steering.manifest import ProfileManifest
from steering.profile import SteeringProfile
from tests.tiny import PROFILES, save_tiny_checkpoint, tiny_model

WIDTH, LAYERS = 64, (1, 2, 3)
VECTORS = {k: np.random.default_rng(k).standard_normal(WIDTH).astype(np.float32) for k in (0, *LAYERS)}


@dataclass
class SteeringVector:
    """As the library's: an object, which takes code to read."""

    layer_activations: dict


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("interchange") / "model")


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "300"})
    assert result.exit_code in (0, 2) and "Traceback" not in result.output, result.output
    return result


def imported(source, model, out, *options):
    result = run("import", source, "--model", model, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return SteeringProfile.load(out), result.output


def repeng_file(path, directions, arch="controlvector", hint="llama"):
    """repeng's `ControlVector.export_gguf`: `direction.N` is added to the output of layer N."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf(path):
    return repeng_file(path, {k: VECTORS[k] for k in reversed(LAYERS)})


def as_half_gguf(path):
    return repeng_file(path, {k: VECTORS[k].astype(np.float16) for k in LAYERS})


def as_safetensors(path):
    save_file({f"layers.{k}": torch.tensor(VECTORS[k]) for k in LAYERS}, path)
    return path


def as_dictionary(path):
    torch.save({k: torch.tensor(VECTORS[k]) for k in LAYERS}, path)
    return path


def as_named_dictionary(path):
    torch.save(
        {"layer_activations": {k: torch.tensor(VECTORS[k])[None] for k in LAYERS}, "layer_type": "decoder_block"}, path
    )
    return path


@pytest.mark.parametrize("write", [as_gguf, as_half_gguf, as_safetensors, as_dictionary, as_named_dictionary])
def test_each_form_becomes_a_caa_profile_of_its_layers(model, tmp_path, write):
    profile, _ = imported(write(tmp_path / "vectors"), model, tmp_path / "p", "--strength", "1.5")
    manifest = profile.manifest
    assert (manifest.method, manifest.gate.kind, manifest.strength, manifest.layers) == ("caa", "always", 1.5, LAYERS)
    expected = np.stack([VECTORS[k] for k in LAYERS])
    tolerance = 1e-3 if write is as_half_gguf else 0
    assert np.abs(profile.experts.vectors.numpy() - expected).max() <= tolerance
    profile.check_model(tiny_model())
    assert {p.name for p in (tmp_path / "p").iterdir()} >= {"README.md", "report.md", "report.html"}
    assert "outputs of layers 1, 2, 3" in (tmp_path / "p/README.md").read_text()


@pytest.mark.parametrize(("layers", "kept"), [("2", [2]), ("2-3", [2, 3]), ("3,1", [1, 3])])
def test_some_of_the_layers(model, tmp_path, layers, kept):
    profile, _ = imported(as_gguf(tmp_path / "v.gguf"), model, tmp_path / "p", "--layers", layers)
    assert list(profile.manifest.layers) == kept
    rows = profile.experts.vector[None] if len(kept) == 1 else profile.experts.vectors
    assert np.array_equal(rows.numpy(), np.stack([VECTORS[k] for k in kept]))


def test_a_family_that_is_not_the_models_is_said(model, tmp_path):
    _, same = imported(as_gguf(tmp_path / "v.gguf"), model, tmp_path / "p")
    _, other = imported(repeng_file(tmp_path / "w.gguf", {1: VECTORS[1]}, hint="qwen2"), model, tmp_path / "q")
    assert "warning" not in same and "made for qwen2" in other and "llama" in other


def test_the_profile_is_served_with_a_version_of_its_own(model, tmp_path):
    one, _ = imported(as_gguf(tmp_path / "v.gguf"), model, tmp_path / "p")
    two, _ = imported(as_gguf(tmp_path / "v.gguf"), model, tmp_path / "q", "--layers", "1-2")
    assert one.version != two.version and ProfileManifest.from_json((tmp_path / "p/profile.json").read_text(), "p")


def object_file(path):
    torch.save(SteeringVector({1: torch.ones(WIDTH)}), path)


BAD = {
    "nothing there": (lambda path: None, "no such file"),
    "another format": (lambda path: path.write_text("layer,vector\n" * 9), "none of GGUF, safetensors and torch.save"),
    "empty": (lambda path: path.write_bytes(b""), "none of GGUF, safetensors and torch.save"),
    "a model's GGUF": (lambda path: repeng_file(path, {1: VECTORS[1]}, arch="llama"), "a GGUF file of llama"),
    "no vectors": (lambda path: torch.save({}, path), "holds no vectors"),
    "an object": (object_file, "would run code when read"),
    "a list": (lambda path: torch.save([torch.ones(WIDTH)], path), "must hold a dictionary of layer to tensor"),
    "no layer's name": (lambda path: save_file({"mean": torch.ones(WIDTH)}, path), "'mean' names no layer"),
    "a matrix": (lambda path: save_file({"1": torch.ones(2, WIDTH)}, path), "layer 1 holds torch.float32 (2, 64)"),
    "whole numbers": (lambda path: save_file({"1": torch.ones(WIDTH).long()}, path), "layer 1 holds torch.int64"),
    "two lengths": (lambda path: save_file({"1": torch.ones(WIDTH), "2": torch.ones(8)}, path), "not of one length"),
    "another width": (lambda path: save_file({"1": torch.ones(32)}, path), "32 wide, the model's residual stream 64"),
    "a later layer": (lambda path: save_file({"9": torch.ones(WIDTH)}, path), "the model has layers 0 to 3"),
    "not finite": (lambda path: save_file({"1": torch.full((WIDTH,), torch.nan)}, path), "layer 1 holds NaN"),
    "an mlp's": (
        lambda path: torch.save({"layer_activations": {1: torch.ones(WIDTH)}, "layer_type": "mlp"}, path),
        "layer_type 'mlp'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_added_is_refused_in_a_sentence(model, tmp_path, case):
    write, message = BAD[case]
    write(tmp_path / "v")
    result = run("import", tmp_path / "v", "--model", model, "--out", tmp_path / "p")
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("write", [as_gguf, as_safetensors, as_dictionary])
def test_a_file_cut_short_anywhere_is_refused_in_a_sentence(model, tmp_path, write):
    whole = write(tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for size in range(0, len(whole), 37):
        cut.write_bytes(whole[:size])
        with pytest.raises(ProfileError):
            read_vectors(cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "no vector for layer 0; it has 1, 2, 3"),
        (["--layers", "few"], "--layers 'few' must be all"),
        (["--positions", "first"], "--positions 'first' is unknown"),
    ],
)
def test_options_that_make_no_sense(model, tmp_path, options, message):
    result = run("import", as_gguf(tmp_path / "v"), "--model", model, "--out", tmp_path / "p", *options)
    assert result.exit_code == 2 and message in result.output


def exported(folder, out, *options):
    result = run("export", folder, out, *options)
    assert result.exit_code == 0, result.output
    reader = gguf.GGUFReader(out)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, result.output


def test_layers_and_strength_come_through_an_export(tmp_path):
    profile = PROFILES["layered"](tiny_model(), name="p", strength=2.5)
    profile.save(tmp_path / "p")
    found, said = exported(tmp_path / "p", tmp_path / "v.gguf")
    assert list(found) == ["direction.1", "direction.2", "direction.3"]
    for name, vector in zip(found, profile.experts.vectors.numpy(), strict=True):
        assert np.allclose(found[name], np.float32(2.5) * vector, atol=1e-6)
    assert "scale 1 is this profile's strength 2.5" in said and "gate" not in said


@pytest.mark.parametrize("kind", ["standard", "orthogonal_residual"])
def test_a_mixtures_mean_and_its_experts(tmp_path, kind):
    profile = PROFILES[kind](tiny_model(), name="p", strength=2.0)
    profile.save(tmp_path / "p")
    found, said = exported(tmp_path / "p", tmp_path / "mean.gguf")
    mean = 2.0 * profile.experts(profile.experts.input_mean[None]).vector[0]
    [name] = found
    assert name == f"direction.{profile.layer}" and np.allclose(found[name], mean.numpy(), atol=1e-6)
    assert "The gate is not in it" in said
    experts, numbers = profile.experts, range(len(profile.experts.values))
    parts = [exported(tmp_path / "p", tmp_path / f"{k}.gguf", "--expert", k)[0][name] for k in numbers]
    for k, part in enumerate(parts):
        assert np.allclose(part, 2.0 * experts.shift_scale * experts.values[k].numpy(), atol=1e-5)
    # at the mean state the mixture is its routing's sum of the experts, and the residual
    routing = experts.routing(experts.input_mean[None])[0].numpy()
    residual = experts.residual_basis @ experts.residual_coefficients(experts.input_mean[None])[0]
    whole = sum(a * p for a, p in zip(routing, parts, strict=True)) + 2.0 * experts.shift_scale * residual.numpy()
    assert np.allclose(whole, found[name], atol=1e-4)


def test_an_export_comes_back_as_the_same_profile(model, tmp_path):
    PROFILES["layered"](tiny_model(), name="p", strength=1.0).save(tmp_path / "p")
    before = SteeringProfile.load(tmp_path / "p")
    exported(tmp_path / "p", tmp_path / "v.gguf", "--model-hint", "llama")
    after, said = imported(tmp_path / "v.gguf", model, tmp_path / "q")
    assert after.manifest.tensors_sha256 == before.manifest.tensors_sha256 and "warning" not in said
    assert after.manifest.layers == before.manifest.layers and after.manifest.strength == 1


@pytest.mark.parametrize(
    ("kind", "layer", "options", "message"),
    [
        ("alphasteer", 1, (), "is alphasteer's"),
        ("constant", 0, (), "llama.cpp takes layers from 1 up"),
        ("constant", 1, ("--expert", "0"), "has no experts"),
        ("standard", 1, ("--expert", "99"), "the profile has experts 0 to"),
        ("standard", 1, ("--expert", "-1"), "the profile has experts 0 to"),
    ],
)
def test_what_cannot_be_exported_leaves_no_file(tmp_path, kind, layer, options, message):
    PROFILES[kind](tiny_model(), layer, name="p").save(tmp_path / "p")
    result = run("export", tmp_path / "p", tmp_path / "v.gguf", *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_cast_exports_its_vector_and_says_that_the_gate_stays(tmp_path):
    profile = PROFILES["cast"](tiny_model(), name="p", strength=1.0, positions="last")
    profile.save(tmp_path / "p")
    found, said = exported(tmp_path / "p", tmp_path / "v.gguf")
    assert np.allclose(found["direction.1"], profile.experts.vector.numpy())
    assert "The gate is not in it" in said and "prompt's last token" in said
    assert json.loads((tmp_path / "p/profile.json").read_text())["positions"] == "last"
    assert list(from_profile(profile).by_layer) == [1]
