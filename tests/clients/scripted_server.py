"""The real application around `ScriptedEngine`, with the demo's tokenizer and chat template, on a free port.

`python -m tests.clients.scripted_server`: needs the server's own environment. Says its address as `finesteer serve` does.
"""

from __future__ import annotations

import json

import uvicorn

from server.app import create_app
from server.config import ServerConfig, demo_folder
from server.listen import address_of, listen
from server.observability.logging import configure_logging
from server.observability.metrics import Metrics
from server.prompting.prompter import load_prompter
from tests.clients.replies import replies
from tests.clients.scripted_engine import ScriptedEngine

NAME = "scripted"


def main() -> None:
    """Serve until a signal."""
    configure_logging("info")
    folder = demo_folder() / "demo"
    prompter = load_prompter(str(folder))
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    engine = ScriptedEngine(prompter.vocabulary, min(prompter.eos_token_ids), vocab_size, replies)
    listener = listen("127.0.0.1", 0)
    app = create_app(ServerConfig(model=NAME, served_model_name=NAME), engine, prompter, Metrics(NAME))
    print(f"{address_of(listener)}/v1", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
