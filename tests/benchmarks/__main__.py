"""The orchestrator: all engines loaded at once, asked in turn within each repeat, one table for each model."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from tests.benchmarks.checkpoints import MODELS
from tests.benchmarks.engines import ENGINES, Launcher, NotInstalledError
from tests.benchmarks.process import EngineFailedError, EngineProcess
from tests.benchmarks.protocol import CONTEXT_LENGTH, RoundRequest
from tests.benchmarks.report import Round, summarise, table

WARM_UP_TOKENS = 16


def main() -> None:
    options = parse()
    os.sched_setaffinity(0, options.cores)  # the engines' processes inherit it
    launcher = Launcher(
        options.checkpoints, options.cores, max(options.concurrency), options.vllm_python, options.llama_cpp
    )
    console = Console(width=120)
    seeds = itertools.count()
    rounds: list[Round] = []
    for model in options.models:
        with ExitStack() as stack:
            processes = start(launcher, model, options, stack, console)
            for concurrency in options.concurrency:
                rounds += measure(processes, model, concurrency, options, seeds, console)
                if options.output:
                    options.output.write_text(json.dumps(record(options, rounds), indent=1) + "\n", encoding="utf-8")
        console.print(table(model, summarise(rounds)))


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder for checkpoints, and logs; made if need be"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], help="requests that arrive at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", nargs="+", type=int, default=[0], help="all engines run on these, a thread on each")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of vLLM's environment")
    parser.add_argument("--llama-cpp", type=Path, help="the folder in which npm installed node-llama-cpp")
    parser.add_argument("--output", type=Path, help="JSON file for settings, every round and the summaries")
    options = parser.parse_args()
    if options.prompt_tokens + options.new_tokens > CONTEXT_LENGTH:
        parser.error(f"prompt and new tokens together are more than {CONTEXT_LENGTH}")
    return options


def start(
    launcher: Launcher, model: str, options: argparse.Namespace, stack: ExitStack, console: Console
) -> dict[str, EngineProcess]:
    """The processes that the engines asked for need, by name; those that cannot run are named and left out."""
    processes = {}
    for name in dict.fromkeys(ENGINES[engine].process for engine in options.engines):
        try:
            launch = launcher.launch(name, model)
            process = EngineProcess(launch, options.checkpoints / "logs" / f"{model}-{name}.log")
            processes[name] = stack.enter_context(process)
            console.print(f"{model}: {name} has loaded")
        except (NotInstalledError, EngineFailedError) as error:
            console.print(f"{model}: {name} is skipped: {error}")
    return processes


def measure(
    processes: dict[str, EngineProcess],
    model: str,
    concurrency: int,
    options: argparse.Namespace,
    seeds: Iterator[int],
    console: Console,
) -> list[Round]:
    """Warm up, then `--repeats` times every engine, each time beginning with another. A failed process is left out.

    Every round has prompts of its own, so that no prefix cache helps.
    """
    rounds = []
    engines = [
        engine
        for engine in options.engines
        if ENGINES[engine].process in processes and concurrency <= (ENGINES[engine].max_concurrency or concurrency)
    ]
    for repeat in range(-1, options.repeats):  # -1 warms up
        for engine in engines[repeat % len(engines) :] + engines[: repeat % len(engines)]:
            setup = ENGINES[engine]
            if setup.process not in processes:
                continue
            new_tokens = WARM_UP_TOKENS if repeat < 0 else options.new_tokens
            request = RoundRequest(concurrency, options.prompt_tokens, new_tokens, next(seeds), setup.steering)
            try:
                reply = processes[setup.process].play(request)
            except EngineFailedError as error:
                console.print(f"{model}: {setup.process} is left out from here: {error}")
                del processes[setup.process]
                continue
            if repeat >= 0:
                rounds.append(Round(model, concurrency, engine, repeat, reply))
    order = list(options.engines)
    return sorted(rounds, key=lambda entry: (entry.repeat, order.index(entry.engine)))


def record(options: argparse.Namespace, rounds: list[Round]) -> dict:
    """All that is worth keeping of a run."""
    return {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "summary": [asdict(row) for row in summarise(rounds)],
        "rounds": [asdict(entry) for entry in rounds],
    }


def processor() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
