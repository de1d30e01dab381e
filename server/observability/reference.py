"""The table of metrics in this folder's page, made from a scrape. `python -m server.observability.reference` rewrites it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from prometheus_client import Metric

from server.engine.base import Engine, EngineInfo, EngineStats, GenerationRequest, TokenEvent
from server.observability.metrics import Metrics
from server.observability.steering_metrics import PREFIX
from server.observability.vllm_names import NAMES
from steering.decision import SteeringDecision
from steering.manifest import ExpertsManifest, GateManifest, ModelReference, ProfileManifest

PAGE = Path(__file__).parent / "README.md"
COMMAND = "python -m server.observability.reference"
TABLE = re.compile(r"<!-- metrics -->\n(?:\|.*\n)*<!-- end -->")
SUFFIXES = {"counter": "_total"}


def table() -> str:
    """Markdown: each metric's name, type, labels and meaning, and whether `--metrics-compat vllm` has it."""
    metrics = Metrics("model")
    metrics.attach(_Example(), ["/v1/chat/completions"])
    families = sorted(metrics.registry.collect(), key=lambda family: (not family.name.startswith(PREFIX), family.name))
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    lines += [_row(family) for family in families]
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with its table made anew."""
    return TABLE.sub(lambda _: f"<!-- metrics -->\n{table()}\n<!-- end -->", text)


def _row(family: Metric) -> str:
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    name = f"`{family.name}{SUFFIXES.get(family.type, '')}`" + (
        "¹" if family.name.removeprefix(PREFIX) in NAMES else ""
    )
    meaning = family.documentation.replace("|", "\\|")
    return f"| {name} | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {meaning} |"


class _Example(Engine):
    """An engine with one profile, so that every family has a sample."""

    info = EngineInfo("example", "model", 8192, 1, 1, 1, 1, "float32", "cpu")

    @property
    def profiles(self) -> Mapping[str, ProfileManifest]:
        manifest = ProfileManifest(
            name="profile",
            method="finesteer",
            model=ModelReference("model", "", 1, 1, "float32"),
            layer=0,
            positions="all",
            strength=1.0,
            gate=GateManifest("quantile", "general", 1, 0.05, 2.0, 0.001, 0.5, 1),
            experts=ExpertsManifest("mose", 1, 1, 1, 1.0),
            tensors_sha256="",
        )
        return {manifest.name: manifest}

    @property
    def failure(self) -> str | None:
        return None

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        raise NotImplementedError

    async def score(self, request: GenerationRequest) -> SteeringDecision:
        raise NotImplementedError

    async def load_profile(
        self, name: str, reference: str, check: Callable[[ProfileManifest], None] = lambda _: None
    ) -> ProfileManifest:
        raise NotImplementedError

    async def unload_profile(self, name: str) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        return EngineStats()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
