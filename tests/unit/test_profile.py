"""The profile's folder: what is written is what is read, and each damage is refused with its own sentence."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from steering.errors import ProfileError
from steering.profile import MANIFEST_FILE, TENSOR_FILE, SteeringProfile
from tests.tiny import PROFILES, tiny_model, tiny_profile


@pytest.fixture
def folder(tmp_path):
    tiny_profile(tiny_model(), name="safe").save(tmp_path / "p")
    return tmp_path / "p"


def change_manifest(folder, **changes):
    """Overwrite keys, `part__key` for nested ones."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    for key, value in changes.items():
        *parts, last = key.split("__")
        target = data
        for part in parts:
            target = target[part]
        target[last] = value
    path.write_text(json.dumps(data))


def change_tensors(folder, **changes):
    """Replace (or with None remove) tensors, and make the hash right again: only the deeper checks can object."""
    tensors = load_file(folder / TENSOR_FILE) | {k.replace("__", "."): v for k, v in changes.items()}
    payload = to_bytes({k: v for k, v in tensors.items() if v is not None})
    (folder / TENSOR_FILE).write_bytes(payload)
    change_manifest(folder, tensors_sha256=hashlib.sha256(payload).hexdigest())


@pytest.mark.parametrize("kind", PROFILES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, kind):
    wanted = PROFILES[kind](tiny_model(), name="safe").save(tmp_path)
    found = SteeringProfile.load(tmp_path)
    assert found.manifest == wanted.manifest and found.version == wanted.version
    states = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in ((wanted.gate, found.gate), (wanted.experts, found.experts)):
        for a, b in zip(ours(states), theirs(states), strict=True):
            assert a is b is None or torch.equal(a, b)
    found.check_model(tiny_model())
    assert not list(tmp_path.glob("*.p*kl")) and {p.name for p in tmp_path.iterdir()} == {MANIFEST_FILE, TENSOR_FILE}


WRONG_KINDS = {
    "no condition": ("cast", {"tensor": {"gate__condition": None}}, "'gate.condition' is missing"),
    "a long condition": ("cast", {"tensor": {"gate__condition": torch.ones(64)}}, "'gate.condition' is not of length 1"),
    "a wide condition": ("cast", {"tensor": {"gate__condition": torch.ones(65)}}, r"must be float32 \(64,\)"),
    "no threshold": ("cast", {"manifest": {"gate__threshold": None}}, "gate.threshold is missing"),
    "no direction": ("cast", {"manifest": {"gate__direction": None}}, "gate.direction is missing"),
    "a third direction": ("cast", {"manifest": {"gate__direction": "across"}}, "'across'; this release knows: above, below"),
    "an endless threshold": ("cast", {"manifest": {"gate__threshold": float("inf")}}, "must be a finite number"),
    "no left": ("alphasteer", {"tensor": {"experts__left": None}}, "'experts.left' is missing"),
    "another rank": ("alphasteer", {"manifest": {"experts__map_rank": 3}}, r"must be float32 (\(64, 3\)|\(3, 64\))"),
    "no rank": ("alphasteer", {"manifest": {"experts__map_rank": None}}, "experts.map_rank is missing"),
    "NaN": ("alphasteer", {"tensor": {"experts__right": torch.full((2, 64), torch.nan)}}, "'experts.right' holds NaN"),
    "no values": ("orthogonal_residual", {"tensor": {"experts__value_projection": None}}, "value_projection' is missing"),
    "values of the standard": ("standard", {"tensor": {"experts__value_projection": torch.ones(3, 64)}}, "is not known"),
    "one layer": ("layered", {"manifest": {"experts__layers": [1]}}, r"experts.layers is \[1\]; it must hold two or more"),
    "layers in disorder": ("layered", {"manifest": {"experts__layers": [1, 3, 2]}}, "in ascending order"),
    "a layer twice": ("layered", {"manifest": {"experts__layers": [1, 2, 2]}}, "in ascending order"),
    "a layer too many": ("layered", {"manifest": {"experts__layers": [1, 2, 4]}}, "the model's layers 0 to 3"),
    "another first layer": ("layered", {"manifest": {"layer": 0}}, "the first of them layer 0"),
    "a layer in words": ("layered", {"manifest": {"experts__layers": [1, "2", 3]}}, r"experts.layers\[1\] must be int, not str"),
    "layers in words": ("layered", {"manifest": {"experts__layers": "1-3"}}, "experts.layers must be list, not str"),
    "layers with a gate": ("cast", {"manifest": {"experts__layers": [1, 2]}}, "needs gate.kind always and experts.kind constant"),
    "layers of a map": ("alphasteer", {"manifest": {"experts__layers": [1, 2]}}, "needs gate.kind always and experts.kind"),
    "a vector for each layer": ("layered", {"manifest": {"experts__layers": [1, 2]}}, r"must be float32 \(2, 64\)"),
    "no vector for a layer": ("layered", {"manifest": {"experts__layers": None}}, r"must be float32 \(64,\)"),
    "a third variant": ("standard", {"manifest": {"experts__variant": "odd"}}, "knows: standard, orthogonal_residual"),
    "not orthogonal": (
        "orthogonal_residual",
        {"tensor": {"experts__residual_basis": torch.eye(64)[:, :2].contiguous()}},
        "'experts.residual_basis' is not orthogonal to the prototypes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_what_a_kind_of_gate_or_experts_cannot_be_is_refused(tmp_path, case):
    kind, changes, message = WRONG_KINDS[case]
    PROFILES[kind](tiny_model()).save(tmp_path)
    change_tensors(tmp_path, **changes.get("tensor", {}))
    change_manifest(tmp_path, **changes.get("manifest", {}))
    with pytest.raises(ProfileError, match=message):
        SteeringProfile.load(tmp_path)


def test_a_profile_from_before_there_were_variants_keeps_its_version(folder):
    """A manifest without the later keys, and one that says of them what their absence says."""
    text = (folder / MANIFEST_FILE).read_text()
    version = SteeringProfile.load(folder).version
    old = json.loads(text)
    del old["gate"]["direction"], old["experts"]["variant"], old["experts"]["map_rank"], old["experts"]["layers"]
    (folder / MANIFEST_FILE).write_text(json.dumps(old))
    assert SteeringProfile.load(folder).version == version
    change_manifest(folder, experts__variant="standard")
    assert SteeringProfile.load(folder).version == version


def test_version_follows_what_acts_and_nothing_else(folder):
    before = SteeringProfile.load(folder).version
    change_manifest(folder, description="other words", metrics={"auc": 1})
    assert SteeringProfile.load(folder, name="renamed").version == before
    change_manifest(folder, strength=3.5)
    assert SteeringProfile.load(folder).version != before


def test_a_version_knows_on_which_side_a_cosine_gate_opens(tmp_path):
    before = PROFILES["cast"](tiny_model()).save(tmp_path).version
    change_manifest(tmp_path, gate__direction="below")
    assert SteeringProfile.load(tmp_path).version != before


def test_a_version_knows_at_which_layers_vectors_act(tmp_path):
    before = PROFILES["layered"](tiny_model(), 0).save(tmp_path).version
    change_manifest(tmp_path, experts__layers=[0, 1, 3])
    assert SteeringProfile.load(tmp_path).version != before


def test_a_truncated_and_a_flipped_tensor_file_are_refused(folder):
    path = folder / TENSOR_FILE
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:-100], bytes(flipped), b""):
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match=r"profile.safetensors: sha256 differs .* Copy the profile again"):
            SteeringProfile.load(folder)


def test_a_file_that_is_no_safetensors_is_refused_though_its_hash_fits(folder):
    for payload in (b"\x80\x04pickle", b"\xff" * 64):
        (folder / TENSOR_FILE).write_bytes(payload)
        change_manifest(folder, tensors_sha256=hashlib.sha256(payload).hexdigest())
        with pytest.raises(ProfileError, match="not a safetensors file"):
            SteeringProfile.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate__mean": torch.full((64,), float("nan"))}, "'gate.mean' holds NaN"),
        ({"experts__prototypes": torch.full((3, 64), float("inf"))}, "'experts.prototypes' holds NaN or infinity"),
        ({"gate__mean": torch.zeros(63)}, r"'gate.mean' is torch.float32 \(63,\), must be float32 \(64,\)"),
        ({"gate__mean": torch.zeros(64, dtype=torch.float64)}, "'gate.mean' is torch.float64"),
        ({"experts__output_bias": None}, "'experts.output_bias' is missing"),
        ({"extra": torch.zeros(1)}, "'extra' is not known"),
        ({"gate__basis": torch.ones(64, 4)}, "'gate.basis' has no orthonormal columns"),
    ],
)
def test_impossible_tensors_are_refused_by_name(folder, changes, message):
    change_tensors(folder, **changes)
    with pytest.raises(ProfileError, match=message):
        SteeringProfile.load(folder)


def test_a_calibration_out_of_order_is_refused(folder):
    flipped = load_file(folder / TENSOR_FILE)["gate.calibration"].flip(0).contiguous()
    change_tensors(folder, gate__calibration=flipped)
    with pytest.raises(ProfileError, match="not in ascending order"):
        SteeringProfile.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this server reads version 1"),
        ({"format_version": None}, "format_version is None"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"gate__surprise": 1}, "unknown key 'gate.surprise'"),
        ({"method": "magic"}, "method is 'magic'; this release knows: finesteer, caa, refusal_vector"),
        ({"strength": "4"}, "strength must be float, not str"),
        ({"layer": True}, "layer must be int"),
        ({"layer": 4}, "layer 4 is outside the model's layers 0 to 3"),
        ({"gate__threshold": 0.01}, "gate.threshold 0.01 is not the 0.3 quantile"),
        ({"gate__tail": 1.5}, "0 < tail < 1"),
        ({"gate__rank": None}, "gate.rank is missing"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_by_key(folder, changes, message):
    change_manifest(folder, **changes)
    with pytest.raises(ProfileError, match=message):
        SteeringProfile.load(folder)


def test_nan_in_the_manifest_broken_json_and_a_missing_key_are_refused(folder):
    path = folder / MANIFEST_FILE
    text = path.read_text()
    path.write_text(text.replace('"strength": 2.0', '"strength": NaN'))
    with pytest.raises(ProfileError, match="strength is nan; it must be a finite number"):
        SteeringProfile.load(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(ProfileError, match=r"profile\.json: not valid JSON"):
        SteeringProfile.load(folder)
    path.write_text(text[:-40])
    with pytest.raises(ProfileError, match=r"profile\.json: not valid JSON"):
        SteeringProfile.load(folder)
    data = json.loads(text)
    del data["layer"]
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="key 'layer' is missing"):
        SteeringProfile.load(folder)


def test_missing_folders_and_files_are_refused(folder, tmp_path):
    with pytest.raises(ProfileError, match="no such profile folder"):
        SteeringProfile.load(tmp_path / "nowhere")
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(ProfileError, match=r"profile.safetensors: no such file"):
        SteeringProfile.load(folder)


def test_another_model_is_refused_and_the_same_in_bfloat16_is_not(folder):
    profile = SteeringProfile.load(folder)
    profile.check_model(tiny_model().bfloat16())
    with pytest.raises(ProfileError, match="hidden size 64"):
        profile.check_model(tiny_model(hidden_size=32))
    with pytest.raises(ProfileError, match="number of layers 4"):
        profile.check_model(tiny_model(num_hidden_layers=3))
    with pytest.raises(ProfileError, match="architecture hash"):
        profile.check_model(tiny_model("qwen2"))
    other = tiny_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ProfileError, match="other weights"):
        profile.check_model(other)
