"""From a configuration to a running server, every misfortune on the way put into one sentence."""

from __future__ import annotations

import signal
import socket
import sys
from importlib.metadata import version

import uvicorn
from rich.console import Console

from server.app import create_app
from server.banner import announce
from server.config import ConfigError, ServerConfig
from server.engine.base import Engine
from server.engine.native.load import load_engine
from server.listen import address_of
from server.observability.audit import AuditLog, AuditLogError
from server.observability.logging import configure_logging, log_fields
from server.observability.metrics import Metrics
from server.observability.tracing import Tracer, TracingError
from server.prompting.prompter import load_prompter
from steering.errors import SteeringError


def run(config: ServerConfig, listener: socket.socket) -> None:
    """Load, announce, serve on a bound socket until a signal. Raises ConfigError where it cannot start."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    configure_logging(config.log_level, config.log_format)
    console = Console(stderr=True, quiet=config.log_format == "json")
    metrics = Metrics(config.served_model_name)
    audit, tracer = _audit_log(config), _tracer(config)
    try:
        with console.status(f"Loading {config.served_model_name} …"):
            prompter = load_prompter(config.model, config.chat_template, config.tool_format)
            engine = load_engine(
                config.model,
                config.profiles,
                dtype=config.dtype,
                device=config.device,
                max_num_seqs=config.max_num_seqs,
                max_model_len=config.max_model_len,
                max_batched_tokens=config.max_batched_tokens,
                max_waiting=config.max_waiting,
                kv_cache_bytes=config.kv_cache_memory,
                prefix_cache_bytes=config.prefix_cache_memory,
                num_threads=config.num_threads,
                compiled=config.compile,
                live_profiles=config.access.admin_sha256 is not None,
                observer=metrics,
            )
    except SteeringError as error:
        raise ConfigError(str(error)) from error
    for name, manifest in engine.profiles.items():
        if abs(manifest.strength) > config.policy.max_strength:
            raise ConfigError(
                f"--max-steer-strength {config.policy.max_strength:g} is below profile {name!r}'s own strength of "
                f"{manifest.strength:g}. Raise it, or leave the profile out."
            )
    app = create_app(config, engine, prompter, metrics, audit=audit, tracer=tracer)
    address = address_of(listener)
    server = _AnnouncingServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=int(config.shutdown_grace_s) + 2,
            server_header=False,
        ),
        lambda: _announce(console, config, engine, address),
    )
    # uvicorn raises the signal that ended it again; by then the work is done, and the exit is a clean one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


def _audit_log(config: ServerConfig) -> AuditLog | None:
    if config.audit_log is None:
        return None
    try:
        return AuditLog(
            config.audit_log,
            max_bytes=config.audit_log_max_bytes,
            keep=config.audit_log_keep,
            required=config.audit_log_required,
        )
    except AuditLogError as error:
        raise ConfigError(f"--audit-log {error}") from error


def _tracer(config: ServerConfig) -> Tracer | None:
    if config.otlp_endpoint is None:
        return None
    try:
        return Tracer.to(config.otlp_endpoint, config.served_model_name, version("finesteer-server"))
    except TracingError as error:
        raise ConfigError(str(error)) from error


def _announce(console: Console, config: ServerConfig, engine: Engine, address: str) -> None:
    """To whoever reads: a person, or a program."""
    if config.log_format == "json":
        profiles = {name: manifest.version for name, manifest in engine.profiles.items()}
        fields = {"address": f"{address}/v1", "model": config.served_model_name, "profiles": profiles}
        log_fields("serving", fields)
    else:
        announce(console, config, engine, address)


class _AnnouncingServer(uvicorn.Server):
    """Says so once it takes requests."""

    def __init__(self, config: uvicorn.Config, announce) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()
