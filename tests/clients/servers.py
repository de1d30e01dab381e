"""Servers in processes of their own, started with the server's interpreter; the clients' environment has no torch."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVER_PYTHON = os.environ.get("FINESTEER_SERVER_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
START_S = 120


@dataclass(frozen=True)
class Server:
    """A running server: where its API is, and the model to ask for."""

    url: str
    model: str


@contextlib.contextmanager
def serving(model: str, *arguments: str, log: Path) -> Iterator[Server]:
    """Run `python ARGUMENTS` as a server; ended by SIGTERM. Raises AssertionError where it fails, and shows its log."""
    assert Path(SERVER_PYTHON).exists(), (
        f"{SERVER_PYTHON}: no such interpreter; make install, or set FINESTEER_SERVER_PYTHON"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [SERVER_PYTHON, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield Server(f"{_address(process, log)}/v1", model)
        finally:
            process.terminate()
            process.wait(timeout=30)
    assert "Traceback" not in (text := log.read_text()), text


def _address(process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text())
        if found:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(found[1] + "/ready", timeout=5):
                return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")
