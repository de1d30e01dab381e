"""An engine's process, from the orchestrator's side."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.engines import REPOSITORY, Launch
from tests.benchmarks.protocol import READY, RoundReply, RoundRequest


class EngineFailedError(Exception):
    """The process ended or answered amiss; the message says where its log is."""


class EngineProcess:
    """A loaded engine that waits for rounds. A context manager: leaving it ends the process."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start the process and wait until it has loaded. Raises EngineFailedError."""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                launch.command,
                env=launch.environment,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
            )
        try:
            if self._read() != READY:
                raise EngineFailedError(f"did not say that it is ready; see {log}")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def play(self, request: RoundRequest) -> RoundReply:
        """Play one round. Raises EngineFailedError, also where the number of tokens is not the one asked for."""
        try:
            print(json.dumps(asdict(request)), file=self._process.stdin)
        except BrokenPipeError as error:
            raise EngineFailedError(f"ended; see {self._log}") from error
        reply = RoundReply(**self._read())
        if reply.tokens != request.concurrency * request.new_tokens:
            raise EngineFailedError(f"made {reply.tokens} tokens for {request}; see {self._log}")
        return reply

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailedError(f"ended; see {self._log}")
        return json.loads(line)
