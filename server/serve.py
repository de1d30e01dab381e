"""From a configuration to a running server, every misfortune on the way put into one sentence."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from sse_starlette.sse import AppStatus

from server.app import create_app
from server.banner import announce
from server.config import ConfigError, ServerConfig
from server.connection import MAX_HEAD_BYTES, BoundedConnection
from server.engine.base import Engine, EngineObserver
from server.engine.native.load import load_engine
from server.listen import address_of, allow_connections
from server.observability.audit import AuditLog, AuditLogError
from server.observability.logging import configure_logging, log_fields
from server.observability.metrics import Metrics
from server.observability.tracing import Tracer, TracingError
from server.prompting.prompter import load_prompter
from server.service import Service
from steering.errors import SteeringError

WRITE_LAST_WORDS_S = 2.0
FIRST_LINE_S = 5.0  # for the audit log to take it


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
            engine = _load_engine(config, metrics)
    except SteeringError as error:
        raise ConfigError(str(error)) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if (isinstance(error, OSError) and error.errno != errno.ENOMEM) or "memory" not in str(error).lower():
            raise
        raise ConfigError(
            f"too little memory ({str(error).strip().splitlines()[0]}). Lower --kv-cache-memory, --prefix-cache-memory, "
            "--max-num-seqs or --max-model-len, or take a smaller model or dtype."
        ) from error
    for name, manifest in engine.profiles.items():
        if abs(manifest.strength) > config.policy.max_strength:
            raise ConfigError(
                f"--max-steer-strength {config.policy.max_strength:g} is below profile {name!r}'s own strength of "
                f"{manifest.strength:g}. Raise it, or leave the profile out."
            )
    if audit is not None:
        _tell_what_acts(audit, config, engine)
    app = create_app(config, engine, prompter, metrics, audit=audit, tracer=tracer)
    address = address_of(listener)
    server = make_server(app, lambda: _announce(console, config, engine, address))
    allow_connections()
    try:
        server.run(sockets=[listener])
    except SteeringError as error:
        raise ConfigError(str(error)) from error
    if not server.started:
        sys.exit(1)


def _load_engine(config: ServerConfig, observer: EngineObserver) -> Engine:
    """Raises SteeringError, and what memory's end raises."""
    options = {
        "dtype": config.dtype,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
        "max_batched_tokens": config.max_batched_tokens,
        "max_waiting": config.max_waiting,
        "kv_cache_bytes": config.kv_cache_memory,
    }
    if config.engine == "vllm":
        from server.engine.vllm import load as vllm  # vLLM itself may not be there

        return vllm.load_engine(
            config.model,
            config.profiles,
            prefix_cache=config.prefix_cache_memory != 0,
            tensor_parallel_size=config.tensor_parallel_size,
            one_pass=config.vllm_one_pass,
            flags=config.vllm_flags,
            observer=observer,
            **options,
        )
    return load_engine(
        config.model,
        config.profiles,
        device=config.device,
        prefix_cache_bytes=config.prefix_cache_memory,
        num_threads=config.num_threads,
        compiled=config.compile,
        live_profiles=config.access.admin_sha256 is not None,
        observer=observer,
        **options,
    )


def make_server(app: FastAPI, announce: Callable[[], None], *, lifespan: Literal["on", "off"] = "on") -> DrainingServer:
    """The HTTP server around an application, with every limit set. `announce` is called once it takes requests."""
    config = app.state.service.config
    protocol = functools.partial(
        BoundedConnection, read_timeout_s=config.read_timeout_s, stall_timeout_s=config.stall_timeout_s
    )
    settings = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type] - it is called, nothing else
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    return DrainingServer(settings, app.state.service, announce)


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


def _tell_what_acts(audit: AuditLog, config: ServerConfig, engine: Engine) -> None:
    """The audit log's first line of this run: which profiles, and what clients may change about them.

    Raises ConfigError where it is required and cannot be written.
    """
    profiles = {
        name: {
            "version": manifest.version,
            "strength": manifest.strength,
            "mode": config.policy.mode(name),
            "override": config.policy.override(name),
        }
        for name, manifest in engine.profiles.items()
    }
    audit.tell("started", model=config.served_model_name, profiles=profiles)
    if config.audit_log_required and not audit.flush(FIRST_LINE_S):
        raise ConfigError(f"--audit-log-required: {audit.failure or 'the audit log does not take its first line'}.")


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


class DrainingServer(uvicorn.Server):
    """Says so once it takes requests. Told to end by a signal, it goes on listening and refuses what is new, until what runs
    has finished or the time for that is up; what is left then ends with an error. A second signal ends the process at once."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce
        self._until_s = 0.0
        AppStatus.disable_automatic_graceful_drain()  # the library would cut streams at the first signal

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await (
            self._service.engine.start()
        )  # before anything is promised; what it raises reaches whoever started the server
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        draining = self._service.draining
        if draining.begun:
            os._exit(128 + sig)
        draining.begun = True
        self._until_s = time.monotonic() + self._service.config.shutdown_timeout_s

    async def on_tick(self, counter: int) -> bool:
        draining = self._service.draining
        if draining.begun and (not draining.num_active or time.monotonic() >= self._until_s):
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.draining.num_active:
            await self._service.engine.stop()  # each running answer is told, and ends
            await self._until_idle(WRITE_LAST_WORDS_S)
        await super().shutdown(sockets)

    async def _until_idle(self, patience_s: float) -> None:
        end_s = time.monotonic() + patience_s
        while self._service.draining.num_active and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
