"""The socket to listen on, taken before anything slow is done."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket

from server.config import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: taken before the model is loaded, so that a taken port is told at once. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_the_dead(listener)
        listener.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: no such address here.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: already in use on {host}. Stop what is running there, or choose another with --port."
            ) from error
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror}).") from error
    return listener


def _notice_the_dead(listener: socket.socket) -> None:
    """Have its connections, which inherit this, end within two minutes where the client's machine is gone without a word."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def allow_connections() -> None:
    """Let this process have as many open files, and so connections, as it may: the usual 1,024 are fewer than may queue."""
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def address_of(listener: socket.socket) -> str:
    """The URL at which a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
