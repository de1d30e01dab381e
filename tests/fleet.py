"""docker/fleet's nginx in front of servers on this machine: the committed file, but for its ports and paths."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

CONFIGURATION = Path(__file__).parents[1] / "docker" / "fleet" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@dataclass(frozen=True)
class Balancer:
    """A running nginx: its address and its access log."""

    url: str
    folder: Path
    process: subprocess.Popen

    def entries(self, request: str = "") -> list[dict[str, Any]]:
        """The access log's lines, oldest first; of one request id where it is given. `server` is the list of those asked."""
        found = []
        for line in (self.folder / "access.log").read_text(errors="replace").split("\n")[:-1]:
            entry = json.loads(line)
            if not request or entry["request"] == request:
                found.append(entry | {"server": [s for s in entry["server"].split(", ") if s]})
        return found

    def entry(self, request: str) -> dict[str, Any]:
        """The one line of a request, for which it waits: nginx writes it once the answer is out."""
        deadline = time.monotonic() + 5
        while not (found := self.entries(request)) and time.monotonic() < deadline:
            time.sleep(0.01)
        [entry] = found
        return entry

    def log(self) -> str:
        """What nginx said of itself."""
        return (self.folder / "error.log").read_text()


def changed(text: str, *changes: tuple[str, str]) -> str:
    """`text` with each (old, new) in place; each old must be there exactly once."""
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times in {CONFIGURATION.name}: {old}"
        text = text.replace(old, new)
    return text


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def balancer(folder: Path, servers: Sequence[str], *changes: tuple[str, str]) -> Iterator[Balancer]:
    """nginx in front of two servers (`127.0.0.1:PORT`); `changes` are made in the file first. Its log holds the keys, too."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    first, second = servers
    here = [
        ("user www-data;", "user root;"),
        ("pid /run/nginx.pid;", f"pid {folder}/pid;"),
        ("error_log /var/log/nginx/error.log warn;", f"error_log {folder}/error.log warn;"),
        ("access_log /var/log/nginx/finesteer.log fleet;", f"access_log {folder}/access.log fleet;"),
        (
            "http {\n",
            "http {\n" + "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy")),
        ),
        ("listen 8000;", f"listen 127.0.0.1:{port};"),
        ("server 127.0.0.1:8001 ", f"server {first} "),
        ("server 127.0.0.1:8002 ", f"server {second} "),
        ("""'{"time":""", """'{"key":"$fleet_key","time":"""),
    ]
    text = changed(CONFIGURATION.read_text(), *changes)
    (folder / "nginx.conf").write_text(changed(text, *here))
    command = [str(NGINX), "-e", f"{folder}/error.log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
    with subprocess.Popen([*command, "-g", "daemon off;"]) as running:
        found = Balancer(f"http://127.0.0.1:{port}", folder, running)
        try:
            _until_up(found)
            yield found
        finally:
            running.terminate()


def _until_up(found: Balancer) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and found.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{found.url}/version", timeout=5)
            return
        time.sleep(0.05)
    raise AssertionError(f"nginx did not come up:\n{found.log()}")
