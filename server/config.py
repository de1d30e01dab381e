"""All that can be set from outside, in one frozen object. The only reader of the environment."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from server.access.keys import Access, KeyFileError, check_key, read_keys
from server.observability.logging import LogFormat
from server.steering_options import Override, SteeringPolicy, profile_name_problem
from server.tools.formats import FORMATS
from server.wire.steering import METADATA_LEVELS, Mode

LogLevel = Literal["debug", "info", "warning", "error"]
MetricsCompat = Literal["vllm"]
EngineName = Literal["native", "vllm"]
API_KEY_VARIABLE = "FINESTEER_API_KEY"
ADMIN_KEY_VARIABLE = "FINESTEER_ADMIN_KEY"
DEMO_MODEL_NAME = "demo"
MAX_THREADS = 1024
ENDPOINT = re.compile(r"https?://[^\s/]+(/\S*)?")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGkmg])?(?:i?[Bb])?")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:\d+)?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:\d+)?")


class ConfigError(Exception):
    """The server cannot start as it was told to. One sentence that names the option."""


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, what to serve, and the operator's rules."""

    model: str
    served_model_name: str
    profiles: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    max_num_seqs: int = 32
    max_model_len: int | None = None
    max_batched_tokens: int | None = None
    max_waiting: int = 1024
    request_timeout_s: float = 600.0
    read_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    shutdown_timeout_s: float = 25.0
    kv_cache_memory: int | None = None
    prefix_cache_memory: int | None = None
    responses_memory: int | None = None
    num_threads: int | None = None
    compile: bool = False
    dtype: str = "auto"
    device: str = "auto"
    engine: EngineName = "native"
    tensor_parallel_size: int = 1
    vllm_one_pass: bool = False
    vllm_flags: tuple[str, ...] = ()
    chat_template: Path | None = None
    tool_format: str | None = None
    policy: SteeringPolicy = field(default_factory=SteeringPolicy)
    access: Access = field(default_factory=Access)
    allow_no_key: bool = False
    cors_origins: tuple[str, ...] = ()
    log_level: LogLevel = "info"
    log_format: LogFormat = "human"
    log_prompts: bool = False
    metrics_compat: MetricsCompat | None = None
    ui: bool = True
    audit_log: Path | None = None
    audit_log_max_bytes: int = 100 * 2**20
    audit_log_keep: int = 10
    audit_log_required: bool = False
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ConfigError("--served-model-name must not be empty.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is no port; use 0 (any free one) to 65535.")
        for option in (
            "max_num_seqs",
            "max_model_len",
            "max_batched_tokens",
            "max_waiting",
            "num_threads",
            "tensor_parallel_size",
        ):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"--{option.replace('_', '-')} {value} must be at least 1.")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"--num-threads {self.num_threads} must be at most {MAX_THREADS}.")
        for option, least in (("request", 0), ("read", 0.1), ("stall", 0.1), ("shutdown", 0)):
            if not least <= (seconds := getattr(self, f"{option}_timeout_s")) < float("inf"):
                raise ConfigError(
                    f"--{option}-timeout {seconds:g} must be a finite number of seconds, at least {least}."
                )
        self._check_engine()
        if self.tool_format is not None and self.tool_format not in FORMATS:
            raise ConfigError(f"--tool-format {self.tool_format!r} is not known; there are {', '.join(FORMATS)}.")
        if self.access.isolate_keys and len(self.access.api_keys) < 2:
            raise ConfigError("--isolate-keys: there are no two API keys to keep apart; give them in --api-keys-file.")
        if not (self.access.api_keys or self.allow_no_key or _is_loopback(self.host)):
            raise ConfigError(
                f"--host {self.host} without an API key: whoever reaches this machine could use the server. "
                f"Set {API_KEY_VARIABLE} or --api-keys-file, or say --allow-no-key if something in front of it checks."
            )
        for origin in self.cors_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin}: must be * or an origin such as https://app.example.com or "
                    "http://localhost:3000, with no path and no slash at its end."
                )
        for option in ("audit_log_max_bytes", "audit_log_keep"):
            if getattr(self, option) < 1:
                raise ConfigError(f"--{option.replace('_', '-')} {getattr(self, option)} must be at least 1.")
        if self.audit_log_required and self.audit_log is None:
            raise ConfigError("--audit-log-required: there is no audit log; say where it is by --audit-log FILE.")
        if self.otlp_endpoint is not None and not ENDPOINT.fullmatch(self.otlp_endpoint):
            raise ConfigError(f"--otlp-endpoint {self.otlp_endpoint}: must be a URL such as http://localhost:4318.")
        if not 0 <= self.policy.max_strength < float("inf"):
            raise ConfigError(f"--max-steer-strength {self.policy.max_strength:g} must be a finite number, at least 0.")
        for option, named in (("--profile-policy", self.policy.overrides), ("--profile-mode", self.policy.modes)):
            for name in named:
                if name not in self.profiles:
                    raise ConfigError(
                        f"{option}: no profile {name!r} is loaded. Loaded: {', '.join(self.profiles) or 'none'}."
                    )

    def _check_engine(self) -> None:
        """That what is asked for is this engine's to do."""
        if self.engine == "native":
            wanted = (
                (self.tensor_parallel_size > 1, "--tensor-parallel-size"),
                (self.vllm_one_pass, "--vllm-one-pass"),
                (bool(self.vllm_flags), f"--vllm.{self.vllm_flags[0].lstrip('-')}" if self.vllm_flags else ""),
            )
            for given, option in wanted:
                if given:
                    raise ConfigError(f"{option}: only vLLM has that; add --engine vllm.")
            return
        for given, option, instead in (
            (self.compile, "--compile", "vLLM compiles by itself; --vllm.enforce-eager has it not do so"),
            (self.device != "auto", "--device", "vLLM takes the cards it sees; set CUDA_VISIBLE_DEVICES"),
            (self.num_threads is not None, "--num-threads", "set VLLM_CPU_OMP_THREADS_BIND to the cores, such as 0-7"),
            (
                self.prefix_cache_memory not in (None, 0),
                "--prefix-cache-memory",
                "vLLM keeps finished prompts where running ones are, in --kv-cache-memory; 0 has it keep none",
            ),
        ):
            if given:
                raise ConfigError(f"{option} is not for --engine vllm: {instead}.")

    @classmethod
    def from_options(
        cls,
        *,
        model: str | None,
        profiles: Iterable[str],
        served_model_name: str | None,
        profile_policies: Iterable[str],
        profile_modes: Iterable[str],
        max_steer_strength: float,
        steering_metadata: str,
        api_keys: Iterable[str] = (),
        api_keys_file: Path | None = None,
        admin_key: str | None = None,
        guard_metrics: bool = False,
        isolate_keys: bool = False,
        cors_origins: Iterable[str] = (),
        kv_cache_memory: str | None = None,
        prefix_cache_memory: str | None = None,
        responses_memory: str | None = None,
        audit_log_max_bytes: str | None = None,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ServerConfig:
        """From the command line's words. Without `model`, the embedded demo with its profiles (and any named here).

        Raises ConfigError.
        """
        environ = os.environ if environ is None else environ
        named = _pairs("--profile", profiles, "NAME=PATH")
        for name in named:
            if problem := profile_name_problem(name):
                raise ConfigError(f"--profile {name}=…: {problem}")
        if model is None:
            model = str(demo_folder() / "demo")
            named = demo_profiles() | named
            served_model_name = served_model_name or DEMO_MODEL_NAME
        policy = SteeringPolicy(
            max_strength=max_steer_strength,
            metadata_cap=_choice("--steering-metadata", steering_metadata, METADATA_LEVELS),
            overrides=_choices("--profile-policy", profile_policies, get_args(Override)),
            modes=_choices("--profile-mode", profile_modes, get_args(Mode)),
        )
        _choice("--engine", options.get("engine", "native"), get_args(EngineName))
        _choice("--log-level", options.get("log_level", "info"), get_args(LogLevel))
        _choice("--log-format", options.get("log_format", "human"), get_args(LogFormat))
        if options.get("metrics_compat") not in (None, *get_args(MetricsCompat)):
            raise ConfigError(f"--metrics-compat: must be vllm, not {options['metrics_compat']!r}.")
        if audit_log_max_bytes is not None:
            options["audit_log_max_bytes"] = _size("--audit-log-max-bytes", audit_log_max_bytes)
        return cls(
            model=model,
            served_model_name=_public_name(model) if served_model_name is None else served_model_name,
            profiles=named,
            policy=policy,
            kv_cache_memory=_size("--kv-cache-memory", kv_cache_memory),
            prefix_cache_memory=_size("--prefix-cache-memory", prefix_cache_memory),
            responses_memory=_size("--responses-memory", responses_memory),
            access=replace(
                _access(api_keys, api_keys_file, admin_key, guard_metrics, environ), isolate_keys=isolate_keys
            ),
            cors_origins=tuple(cors_origins),
            **options,
        )


def _access(
    api_keys: Iterable[str], file: Path | None, admin_key: str | None, guard_metrics: bool, environ: Mapping[str, str]
) -> Access:
    """Options before the environment; the file's keys besides."""
    keys = list(api_keys) or [key for key in environ.get(API_KEY_VARIABLE, "").split(",") if key]
    admin = admin_key or environ.get(ADMIN_KEY_VARIABLE) or None
    for option, key in (*(("--api-key", key) for key in keys), *([("--admin-key", admin)] if admin else [])):
        if problem := check_key(key):
            raise ConfigError(f"{option}: {problem}.")
    if admin in keys:
        raise ConfigError("--admin-key: is an API key too; give the administrator another.")
    found = Access.of(*keys, admin=admin, guard_metrics=guard_metrics)
    try:
        named = read_keys(file) if file else ()
    except KeyFileError as error:
        raise ConfigError(f"--api-keys-file {error}") from error
    if found.admin_sha256 in {key.sha256 for key in named}:
        raise ConfigError("--admin-key: is an API key too; give the administrator another.")
    if guard_metrics and not (keys or named or admin):
        raise ConfigError("--guard-metrics: there is no key to ask for; set one.")
    return replace(found, api_keys=(*found.api_keys, *named))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def demo_folder() -> Path:
    """The package folder of the embedded demo."""
    return Path(str(resources.files("artifacts")))


def demo_profiles() -> dict[str, str]:
    """The demo's own profiles: each folder of `artifacts/profiles` whose method is `finesteer` (the rest are baselines)."""
    found = {}
    for manifest in sorted(demo_folder().glob("profiles/*/profile.json")):
        if json.loads(manifest.read_text(encoding="utf-8")).get("method") == "finesteer":
            found[manifest.parent.name] = str(manifest.parent)
    return found


def _public_name(model: str) -> str:
    """A folder's own name, or the hub id as it is."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _pairs(option: str, texts: Iterable[str], shape: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise ConfigError(f"{option} {text}: must be {shape}.")
        if name in pairs:
            raise ConfigError(f"{option}: {name!r} is given twice.")
        pairs[name] = value
    return pairs


def _size(option: str, text: str | None) -> int | None:
    """Bytes: a whole number, or a number with KiB, MiB, GiB (or K, M, G, which mean the same here)."""
    if text is None:
        return None
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: must be a size such as 512MiB, 1.5GiB or a whole number of bytes.")
    return int(float(found[1]) * 1024 ** " KMG".index((found[2] or " ").upper()))


def _choice(option: str, value: str, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ConfigError(f"{option}: must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}.")
    return value


def _choices(option: str, texts: Iterable[str], allowed: tuple[Any, ...]) -> dict[str, Any]:
    pairs = _pairs(option, texts, f"NAME={'|'.join(allowed)}")
    return {name: _choice(f"{option} {name}", value, allowed) for name, value in pairs.items()}
