"""Two servers for all clients: the embedded demo, a real model; and the scripted one, for what needs a clever model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.clients.servers import Server, serving

# Nothing here may look for the network, or be told of proxies: the servers are on this machine.
os.environ |= {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def demo(logs: Path) -> Iterator[Server]:
    """`finesteer serve` with nothing said: the embedded demo model and its profile."""
    with serving("demo", "-m", "server", "serve", "--port", "0", "--num-threads", "1", log=logs / "demo") as server:
        yield server


@pytest.fixture(scope="session")
def scripted(logs: Path) -> Iterator[Server]:
    """The same application around a test double that follows a script."""
    with serving("scripted", "-m", "tests.clients.scripted_server", log=logs / "scripted") as server:
        yield server


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    """The official client, at the demo."""
    with openai.OpenAI(base_url=demo.url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def clever(scripted: Server) -> Iterator[openai.OpenAI]:
    """The official client, at the scripted model."""
    with openai.OpenAI(base_url=scripted.url, api_key="unused", max_retries=0) as client:
        yield client
