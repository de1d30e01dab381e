"""Which engines there are, and the command that runs each as a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.checkpoints import checkpoint, profile
from tests.benchmarks.gguf_file import gguf_file
from tests.benchmarks.protocol import Steering

REPOSITORY = Path(__file__).parents[2]
REFERENCE = "ours"


@dataclass(frozen=True)
class BenchmarkedEngine:
    """A row of the table: rounds of the process `process`, played with `steering`."""

    process: str
    steering: Steering = "off"
    max_concurrency: int | None = None


ENGINES = {
    REFERENCE: BenchmarkedEngine("ours"),
    "ours-closed": BenchmarkedEngine("ours", "closed"),
    "ours-open": BenchmarkedEngine("ours", "open"),
    "ours-eager": BenchmarkedEngine("ours-eager"),
    "transformers": BenchmarkedEngine("transformers"),
    "transformers-cb": BenchmarkedEngine("transformers-cb"),
    "vllm": BenchmarkedEngine("vllm"),
    "vllm-compile": BenchmarkedEngine("vllm-compile"),
    "llama-cpp": BenchmarkedEngine("llama-cpp", max_concurrency=1),
}


class NotInstalledError(Exception):
    """This engine cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Launch:
    """How a process is started."""

    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Launcher:
    """Makes the commands. `vllm_python`: the interpreter of vLLM's environment; `llama_cpp`: where npm put node-llama-cpp."""

    checkpoints: Path
    cores: list[int]
    max_concurrency: int
    vllm_python: Path | None
    llama_cpp: Path | None

    def launch(self, process: str, model: str) -> Launch:
        """The command and environment for `process` on `model`. Raises NotInstalledError."""
        environment = os.environ | {"OMP_NUM_THREADS": str(len(self.cores)), "HF_HUB_OFFLINE": "1"}
        folder = checkpoint(self.checkpoints, model)
        if process == "llama-cpp":
            return Launch(self._llama_cpp(folder), environment)
        options = ["--checkpoint", str(folder), "--threads", str(len(self.cores))]
        options += ["--max-concurrency", str(self.max_concurrency)]
        if process in ("ours", "ours-eager"):
            options += ["--profile", str(profile(self.checkpoints, model))]
            options += ["--compile"] if process == "ours" else []
            return Launch([sys.executable, "-m", "tests.benchmarks.ours", *options], environment)
        if process in ("vllm", "vllm-compile"):
            options += ["--compile"] if process == "vllm-compile" else []
            return Launch([self._vllm(), "-m", "tests.benchmarks.peers.vllm", *options], self._for_vllm(environment))
        module = {"transformers": "transformers_generate", "transformers-cb": "transformers_batching"}[process]
        return Launch([sys.executable, "-m", f"tests.benchmarks.peers.{module}", *options], environment)

    def _vllm(self) -> str:
        if self.vllm_python is None:
            raise NotInstalledError("no --vllm-python given")
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        if not self.vllm_python.exists() or subprocess.run([self.vllm_python, "-c", probe]).returncode:
            raise NotInstalledError(f"{self.vllm_python} has no vllm")
        return str(self.vllm_python)

    def _for_vllm(self, environment: dict[str, str]) -> dict[str, str]:
        ours = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
        return ours | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def _llama_cpp(self, folder: Path) -> list[str]:
        node = shutil.which("node")
        if node is None or self.llama_cpp is None:
            raise NotInstalledError("no node" if node is None else "no --llama-cpp given")
        if not (self.llama_cpp / "node_modules/node-llama-cpp").is_dir():
            raise NotInstalledError(f"{self.llama_cpp} has no node_modules/node-llama-cpp")
        script = Path(__file__).parent / "peers" / "llama_cpp.mjs"
        return [node, str(script), str(self.llama_cpp.resolve()), str(gguf_file(folder)), str(len(self.cores))]
