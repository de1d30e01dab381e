"""`finesteer serve` refuses what it cannot serve: one sentence that names file or option, exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
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


WEIGHTS = "model.safetensors"


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def weights(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in tensors if "down_proj" in name))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (gone("config.json"), "model_type"),
    "a config that is no JSON": (written("config.json", b"{"), "not a valid JSON file"),
    "a config that is a list": (written("config.json", b"[]"), "must be a mapping"),
    "an architecture nobody knows": (configured(model_type="foo"), "foo"),
    "impossible heads": (configured(num_attention_heads=7), "validate_architecture"),
    "no weights": (gone(WEIGHTS), "model.safetensors"),
    "weights cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-500]) and None,
        "incomplete",
    ),
    "weights that are none": (written(WEIGHTS, b"x" * 100), "header too large"),
    "a tensor that is missing": (weights(lambda t, name: t.pop(name)), "1 of its tensors are not in its files"),
    "a tensor with NaN": (weights(lambda t, name: t[name].fill_(torch.nan)), "logits that are not finite"),
    "another width": (configured(hidden_size=32), "other shapes than its config.json"),
    "another vocabulary": (configured(vocab_size=10), "other shapes than its config.json"),
    "a tokenizer that is none": (written("tokenizer.json", b"{}"), "its tokenizer cannot be loaded"),
    "a tokenizer's config that is no JSON": (written("tokenizer_config.json", b"{"), "its tokenizer cannot be loaded"),
    "a generation config that is no JSON": (
        written("generation_config.json", b"{"),
        "generation_config.json cannot be read",
    ),
    "a chat template that is no Jinja": (written("chat_template.jinja", b"{% for %}"), "not valid Jinja (line 1"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_served(artifacts, tmp_path, case):
    change, said = MODELS[case]
    shutil.copytree(artifacts.model, tmp_path / "m")
    change(tmp_path / "m")
    sentence = refusal("--model", str(tmp_path / "m"))
    assert said in sentence and len(sentence.splitlines()) == 1


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "no such folder": (("--model", "/no/such/model"), "no such folder"),
    "a hub id that is none": (("--model", "a b c"), "a b c"),
    "an integer dtype": (("--dtype", "int8"), "--dtype 'int8'"),
    "a dtype nobody serves": (("--dtype", "float8_e4m3fn"), "--dtype 'float8_e4m3fn'"),
    "no device": (("--device", "gpu"), "--device 'gpu'"),
    "a device nobody serves": (("--device", "meta"), "--device 'meta'"),
    "too little for one sequence": (("--kv-cache-memory", "1KiB"), "--kv-cache-memory"),
    "more than there is": (("--prefix-cache-memory", "900000GiB"), "too little memory"),
    "more rows than there is room": (("--max-num-seqs", "100000000"), "too little memory"),
    "no size": (("--responses-memory", "many"), "--responses-memory many"),
    "no port": (("--port", "70000"), "--port 70000"),
    "no address": (("--host", "no.such.host.invalid", "--allow-no-key"), "--host no.such.host.invalid"),
    "somebody else's address": (("--host", "192.0.2.7", "--allow-no-key"), "cannot listen there"),
    "the world without a key": (("--host", "0.0.0.0"), "without an API key"),
    "no keys": (("--api-keys-file", "/no/such/file"), "--api-keys-file /no/such/file: cannot be read"),
    "too many threads": (("--num-threads", "1000000"), "--num-threads 1000000"),
    "no threads": (("--num-threads", "0"), "--num-threads 0"),
    "no context": (("--max-model-len", "0"), "--max-model-len 0"),
    "a queue of none": (("--max-waiting", "0"), "--max-waiting 0"),
    "a negative deadline": (("--request-timeout", "-1"), "--request-timeout -1"),
    "no time to read": (("--read-timeout", "0"), "--read-timeout 0"),
    "no time at all": (("--stall-timeout", "nan"), "--stall-timeout nan"),
    "no end": (("--shutdown-timeout", "inf"), "--shutdown-timeout inf"),
    "a strength that is no number": (("--max-steer-strength", "nan"), "--max-steer-strength nan"),
    "a policy for nobody": (("--profile-policy", "x=any"), "no profile 'x' is loaded"),
    "a profile without a name": (("--profile", "/a/b"), "must be NAME=PATH"),
    "a tool format nobody knows": (("--tool-format", "foo"), "--tool-format 'foo'"),
    "a log level nobody knows": (("--log-level", "loud"), "--log-level"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_followed(artifacts, case):
    options, said = OPTIONS[case]
    assert said in refusal(*(() if "--model" in options else ("--model", str(artifacts.model))), *options)


def test_a_profile_that_computes_nothing_finite(artifacts, tmp_path):
    """What is not finite is no steering, though it differs from the plain answer."""
    profile = SteeringProfile.load(artifacts.safety)
    huge = ConstantVector(torch.full((profile.manifest.model.hidden_size,), 3e38))
    manifest = replace(profile.manifest, method="caa", experts=ExpertsManifest("constant"))
    replace(profile, manifest=manifest, experts=huge).save(tmp_path)
    sentence = refusal("--model", str(artifacts.model), "--profile", f"loud={tmp_path}")
    assert "'loud' does not steer this model as it should" in sentence and "finite" in sentence
