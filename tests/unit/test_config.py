"""Options into a configuration, and the command line's refusals."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import config as config_module
from server.access.keys import Access
from server.config import ConfigError, ServerConfig
from server.listen import listen

OPTIONS = {
    "model": "org/model",
    "profiles": (),
    "served_model_name": None,
    "profile_policies": (),
    "profile_modes": (),
    "max_steer_strength": 20.0,
    "steering_metadata": "full",
    "environ": {},
}


def configure(**options) -> ServerConfig:
    return ServerConfig.from_options(**(OPTIONS | options))


def test_words_become_a_frozen_configuration():
    config = configure(
        profiles=["safety=/a/b=c", "truth=org/truth"],
        profile_policies=["safety=raise_only"],
        profile_modes=["truth=shadow"],
        host="127.0.0.2",
    )
    assert config.served_model_name == "org/model"
    assert config.profiles == {"safety": "/a/b=c", "truth": "org/truth"}
    assert (config.policy.override("safety"), config.policy.override("truth")) == ("raise_only", "any")
    assert (config.policy.mode("safety"), config.policy.mode("truth")) == ("enforce", "shadow")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_logs_metrics_and_traces():
    config = configure(audit_log=Path("a"), audit_log_max_bytes="2KiB", otlp_endpoint="http://collector:4318")
    assert (config.audit_log_max_bytes, config.audit_log_keep, config.log_format) == (2048, 10, "human")
    assert configure().audit_log_max_bytes == 100 * 2**20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"log_format": "xml"}, "--log-format: must be human or json, not 'xml'."),
        ({"metrics_compat": "tgi"}, "--metrics-compat: must be vllm, not 'tgi'."),
        (
            {"audit_log_required": True},
            "--audit-log-required: there is no audit log; say where it is by --audit-log FILE.",
        ),
        ({"audit_log_max_bytes": "much"}, "--audit-log-max-bytes much: must be a size"),
        ({"audit_log_max_bytes": "0"}, "--audit-log-max-bytes 0 must be at least 1."),
        ({"audit_log_keep": 0}, "--audit-log-keep 0 must be at least 1."),
        ({"otlp_endpoint": "collector:4318"}, "--otlp-endpoint collector:4318: must be a URL such as"),
    ],
)
def test_logs_metrics_and_traces_that_cannot_be(options, said):
    with pytest.raises(ConfigError) as refused:
        configure(**options)
    assert str(refused.value).startswith(said)


def test_a_folder_is_served_by_its_own_name(tmp_path):
    (tmp_path / "llama").mkdir()
    assert configure(model=f"{tmp_path}/llama/").served_model_name == "llama"
    assert configure(model=str(tmp_path / "llama"), served_model_name="x").served_model_name == "x"


def test_the_key_comes_from_the_option_or_the_environment_and_is_never_shown():
    assert configure().access == Access()
    assert configure(environ={"FINESTEER_API_KEY": "e,f"}).access == Access.of("e", "f")
    config = configure(environ={"FINESTEER_API_KEY": "e", "FINESTEER_ADMIN_KEY": "a"}, api_keys=["option-wins"])
    assert config.access == Access.of("option-wins", admin="a") and "option" not in repr(config)
    assert "option-wins" not in repr(config)


def test_origins_of_web_pages():
    assert configure().cors_origins == ()
    origins = ["https://app.example.com", "http://localhost:3000", "http://[::1]:8080", "tauri://localhost", "*"]
    assert configure(cors_origins=origins).cors_origins == tuple(origins)
    for wrong in ("app.example.com", "https://app.example.com/", "https://*.example.com", "null", "", "https://a b"):
        with pytest.raises(ConfigError, match="--cors-origin"):
            configure(cors_origins=[wrong])


def test_without_a_model_the_demo_with_its_own_profiles(tmp_path, monkeypatch):
    for name, method in (("safety", "finesteer"), ("caa", "caa")):
        (tmp_path / "profiles" / name).mkdir(parents=True)
        (tmp_path / "profiles" / name / "profile.json").write_text(json.dumps({"method": method}))
    monkeypatch.setattr(config_module, "demo_folder", lambda: tmp_path)
    config = configure(model=None, profiles=["mine=/p"])
    assert (config.model, config.served_model_name) == (str(tmp_path / "demo"), "demo")
    assert config.profiles == {"safety": str(tmp_path / "profiles" / "safety"), "mine": "/p"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"profiles": ["safety"]}, "--profile safety: must be NAME=PATH"),
        ({"profiles": ["=x"]}, "--profile =x: must be NAME=PATH"),
        ({"profiles": ["a=x", "a=y"]}, "--profile: 'a' is given twice"),
        ({"profiles": ["a:b=x"]}, "--profile a:b"),
        ({"profiles": ["unsteered=x"]}, "alias of the model"),
        ({"profile_policies": ["safety=any"]}, "--profile-policy: no profile 'safety' is loaded"),
        ({"profiles": ["a=x"], "profile_policies": ["a=some"]}, "must be any, raise_only or none, not 'some'"),
        ({"profiles": ["a=x"], "profile_modes": ["a=off"]}, "must be enforce or shadow, not 'off'"),
        ({"steering_metadata": "all"}, "--steering-metadata: must be none, summary or full"),
        ({"max_steer_strength": float("nan")}, "--max-steer-strength"),
        ({"max_steer_strength": -1.0}, "--max-steer-strength"),
        ({"port": 70000}, "--port 70000"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0 must be at least 1"),
        ({"max_model_len": -5}, "--max-model-len -5"),
        ({"log_level": "loud"}, "--log-level: must be debug, info, warning or error"),
        ({"served_model_name": ""}, "--served-model-name"),
    ],
)
def test_refusals_name_the_option(options, said):
    with pytest.raises(ConfigError) as caught:
        configure(**options)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_taken_port_is_told():
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=f"--port {port}: already in use"):
        listen("127.0.0.1", port)
    taken.close()


def test_an_unknown_host_is_told(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="--host nowhere"):
        listen("nowhere", 0)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "server", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "./nowhere"), "./nowhere: no such folder"),
        (("--profile", "safety"), "--profile safety: must be NAME=PATH"),
    ],
)
def test_the_command_ends_with_one_sentence_and_code_2(arguments, said):
    result = run("serve", "--port", "0", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_needs_no_torch():
    probe = (
        "import sys, server.cli; sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0
    assert "serve" in run("--help").stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("2g", 2**31), ("64 KB", 2**16), ("4096", 4096), ("0", 0)],
)
def test_memory_sizes(text, size):
    assert configure(kv_cache_memory=text, prefix_cache_memory=text).kv_cache_memory == size


@pytest.mark.parametrize("text", ["", "-1", "many", "1TiB", "1,5GiB", "nan"])
def test_memory_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"--kv-cache-memory .*must be a size such as 512MiB"):
        configure(kv_cache_memory=text)
