"""What training costs, given states: `python -m tests.benchmarks.training`.

Made-up states of a large model's width: a mean, two directions of a thousand times the others' variance, and a spectrum that
falls like 1/i, as a residual stream's does. `--flat` takes white noise instead, the worst case for finding directions. Each
size is a process of its own, whose largest resident set it is. Processor time is what a shared machine leaves comparable.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from steering.manifest import Variant
from steering.training.fit_experts import ExpertOptions, fit_experts
from steering.training.fit_gate import fit_gate

KINDS = 6
"""Planted kinds of shift; the query's state tells which."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(count: int, width: int, seed: int, flat: bool) -> Tensor:
    """(count, width) float32."""
    found = draw(seed, count, width)
    if not flat:
        found *= torch.arange(1, width + 1).float().rsqrt()
        found[:, [width // 3, width // 2]] *= 1000**0.5
    return found.add_(draw(1, width))


def gate(count: int, width: int, flat: bool) -> Callable[[], object]:
    """As many IR queries as general ones. IR queries vary more in 20 directions that no axis knows."""
    directions = torch.linalg.qr(draw(2, width, 20)).Q
    ir = states(count, width, 3, flat).add_(draw(4, count, 20) @ directions.T)
    general = states(count, width, 5, flat)
    return lambda: fit_gate(ir, general)


def experts(count: int, width: int, flat: bool, variant: Variant = "standard") -> Callable[[], object]:
    kind = torch.arange(count) % KINDS
    queries = states(count, width, 6, flat).add_(draw(7, KINDS, width)[kind])
    shifts = states(count, width, 8, flat).add_(draw(9, KINDS, width)[kind])
    return lambda: fit_experts(queries, shifts, ExpertOptions(variant=variant))


FITS = {"gate": gate, "experts": experts, "orthogonal_residual": partial(experts, variant="orthogonal_residual")}


def measure(name: str, count: int, width: int, flat: bool, threads: int) -> dict[str, float]:
    """Wall and processor seconds of one fit, and the process's largest resident set in bytes, states included."""
    torch.set_num_threads(threads)
    fit = FITS[name](count, width, flat)
    wall, processor = time.perf_counter(), time.process_time()
    fit()
    return {
        "wall_s": time.perf_counter() - wall,
        "processor_s": time.process_time() - processor,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_a_process(name: str, count: int, width: int, flat: bool, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.training", "--width", str(width), "--threads", str(threads)]
    command += ["--measure", name, str(count), *(["--flat"] if flat else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, nargs="*", default=[400, 1000, 3000, 10_000])
    parser.add_argument("--queries", type=int, nargs="*", default=[400, 1000, 3000, 10_000])
    parser.add_argument("--flat", action="store_true", help="white noise: directions as hard to find as can be")
    parser.add_argument("--measure", nargs=2, metavar=("FIT", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    common = (options.width, options.flat, options.threads)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]), *common)))
        return
    console = Console(width=140)
    for name in FITS:
        counts = options.queries if name == "gate" else options.pairs
        before: tuple[int, float] | None = None
        for count in counts:
            found = in_a_process(name, count, *common)
            growth = ""
            if before:
                exponent = math.log(found["processor_s"] / before[1]) / math.log(count / before[0])
                growth = f", growth like rows to the {exponent:.2f}"
            before = count, found["processor_s"]
            rows = f"{count:,} IR and {count:,} general queries" if name == "gate" else f"{count:,} pairs"
            console.print(
                f"{name}, {rows} at d = {options.width:,}: {found['wall_s']:.1f} s wall, {found['processor_s']:.1f} s of "
                f"processor, peak {found['peak_bytes'] / 2**30:.2f} GiB{growth}",
                highlight=False,
            )


if __name__ == "__main__":
    main()
