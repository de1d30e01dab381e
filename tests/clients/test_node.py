"""The Node clients: `node --test` runs each file of `node/` once, and each of its tests is one here."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.clients.servers import Server

FOLDER = Path(__file__).parent / "node"
FILES = sorted(path.name for path in FOLDER.glob("*.test.mjs"))
NODE = shutil.which("node")
TIMEOUT_S = 120


def absent() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if NODE is None:
        return "node is not installed"
    if not (FOLDER / "node_modules").is_dir():
        return "the Node packages are not installed: npm ci"
    return None


def run(file: str, **environment: str) -> dict[str, str | None]:
    """Test's name → why it failed, or None."""
    command = [NODE, "--test", "--test-reporter=junit", file]
    done = subprocess.run(
        command, cwd=FOLDER, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout.startswith("<?xml"), done.stderr
    cases = ElementTree.fromstring(done.stdout).iter("testcase")
    return {case.attrib["name"]: _failure(case) for case in cases}


def _failure(case: ElementTree.Element) -> str | None:
    failure = case.find("failure")
    return None if failure is None else f"{failure.get('message')}\n{failure.text}"


def names() -> list[tuple[str, str]]:
    """Every file's tests, which Node lists where it is told of no server."""
    if absent():
        return [(file, "all") for file in FILES]
    return [(file, name) for file in FILES for name in run(file)]


@functools.cache
def outcomes(file: str, demo: Server, scripted: Server) -> dict[str, str | None]:
    return run(file, DEMO_URL=demo.url, SCRIPTED_URL=scripted.url)


@pytest.mark.skipif(absent() is not None, reason=str(absent()))
@pytest.mark.parametrize(("file", "name"), names())
def test_node(file: str, name: str, demo: Server, scripted: Server) -> None:
    failure = outcomes(file, demo, scripted)[name]
    assert failure is None, failure
