"""`finesteer serve` refuses what it cannot serve: one sentence that names file or option, exit code 2."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from steering.experts import ConstantVector
from steering.intervention import Dose, Site
from steering.manifest import ExpertsManifest
from steering.profile import SteeringProfile


def refusal(*arguments: str) -> str:
    """The one sentence with which `serve` ends."""
    with mock.patch("uvicorn.Server.run", side_effect=AssertionError("it serves")):  # a test that fails must not hang
        result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("finesteer: ")
    return sentence.removeprefix("finesteer: ")


def test_a_taken_port(artifacts):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refusal("--model", str(artifacts.model), "--port", port) == (
            f"--port {port}: already in use on 127.0.0.1. Stop what is running there, or choose another with --port."
        )


def test_an_audit_log_that_cannot_be_written(artifacts, tmp_path):
    said = refusal("--model", str(artifacts.model), "--audit-log", str(tmp_path / "no" / "audit"))
    assert said == f"--audit-log {tmp_path / 'no' / 'audit'}: cannot be written (No such file or directory)."


def test_tracing_without_its_package(artifacts):
    absent = {"opentelemetry.exporter.otlp.proto.http.trace_exporter": None}
    with mock.patch.dict("sys.modules", absent):
        said = refusal("--model", str(artifacts.model), "--otlp-endpoint", "http://localhost:4318")
    assert said == (
        "--otlp-endpoint needs OpenTelemetry, which is not installed: pip install 'finesteer-server[otel]'."
    )


def replaced(old: bytes, new: bytes):
    return lambda name, content: content.replace(old, new)


PROFILES = {
    "truncated": (lambda name, content: content[:-100] if name.endswith("safetensors") else content, "sha256 differs"),
    "tampered": (
        lambda name, content: content[:-1] + b"!" if name.endswith("safetensors") else content,
        "sha256 differs",
    ),
    "newer": (replaced(b'"format_version": 1', b'"format_version": 9'), "format_version is 9"),
    "unknown key": (replaced(b'"layer"', b'"layers"'), "unknown key 'layers'"),
    "no json": (replaced(b"{", b"["), "not valid JSON"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_that_cannot_be_read(artifacts, tmp_path, case):
    change, said = PROFILES[case]
    for file in artifacts.safety.iterdir():
        (tmp_path / file.name).write_bytes(change(file.name, file.read_bytes()))
    sentence = refusal("--model", str(artifacts.model), "--profile", f"safety={tmp_path}")
    assert said in sentence
    assert str(tmp_path) in sentence


def test_a_profile_that_is_not_there(artifacts, tmp_path):
    assert "no such profile folder" in refusal(
        "--model", str(artifacts.model), "--profile", f"safety={tmp_path / 'none'}"
    )


def test_a_profile_for_another_model(artifacts, tmp_path):
    from tests.checkpoint import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    other = build_model(tokenizer)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentence = refusal("--model", str(tmp_path), "--profile", f"safety={artifacts.safety}")
    assert "other weights" in sentence and "finesteer train" in sentence


def test_a_profile_that_changes_nothing(artifacts, tmp_path):
    profile = SteeringProfile.load(artifacts.safety)
    silent = ConstantVector(torch.zeros(profile.manifest.model.hidden_size))
    manifest = replace(profile.manifest, method="caa", experts=ExpertsManifest("constant"))
    replace(profile, manifest=manifest, experts=silent).save(tmp_path)
    sentence = refusal("--model", str(artifacts.model), "--profile", f"mute={tmp_path}")
    assert "'mute' does not steer this model as it should: it changes nothing" in sentence


def refused_steering(artifacts) -> str:
    return refusal("--model", str(artifacts.model), "--profile", f"safety={artifacts.safety}")


def test_steering_that_acts_at_strength_zero(artifacts, monkeypatch):
    """A site whose dose leaks: what adds nothing must add nothing."""
    read = Site.read

    def leak(self, states, options):
        readings = read(self, states, options)
        return [replace(r, dose=r.dose or Dose.of(None, torch.ones_like(states[0]))) for r in readings]

    monkeypatch.setattr(Site, "read", leak)
    assert "'safety' does not steer this model as it should: at strength 0 it changes answers" in refused_steering(
        artifacts
    )


def test_a_vector_that_never_arrives(artifacts, monkeypatch):
    """Steering that is not applied must not serve: the start-up check runs real steps."""
    monkeypatch.setattr(Dose, "add", lambda self, states, start, num_prompt_tokens: states)
    monkeypatch.setattr(Site, "hold", lambda self, slot, dose: None)
    assert "'safety' does not steer this model as it should: it changes nothing" in refused_steering(artifacts)


def test_a_model_without_a_tokenizer(artifacts, tmp_path):
    shutil.copytree(artifacts.model, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    sentence = refusal("--model", str(tmp_path / "m"))
    assert sentence.startswith(str(tmp_path / "m" / "tokenizer.json")) and "no such file" in sentence


def test_a_limit_below_a_profiles_own_strength(artifacts):
    profile = ("--profile", f"safety={artifacts.safety}", "--max-steer-strength", "5")
    assert "--max-steer-strength 5 is below profile 'safety''s own strength of 6" in refusal(
        "--model", str(artifacts.model), *profile
    )


def test_a_context_longer_than_the_models(artifacts):
    assert "--max-model-len 9999 is more than the 2048" in refusal(
        "--model", str(artifacts.model), "--max-model-len", "9999"
    )


def test_a_chat_template_that_is_not_there(artifacts, tmp_path):
    sentence = refusal("--model", str(artifacts.model), "--chat-template", str(tmp_path / "none.jinja"))
    assert "none.jinja: the chat template cannot be read" in sentence
