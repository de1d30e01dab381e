"""All that a profile is made of, but the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from steering.decision import Positions
from steering.manifest import Method
from steering.training.fit_experts import ExpertOptions
from steering.training.fit_gate import Centre


@dataclass(frozen=True)
class TrainingOptions:
    """All that a profile is made of, but the model. Paths are JSONL files; see `data` for their rows.

    `layer`: one, several to choose among, or "auto" for all. `cache`: the folder of extracted states; None keeps none.

    Without `ir` files the profile has no gate; `caa` and `refusal_vector` are baselines so, `alphasteer` never has one.
    """

    name: str
    layer: int | tuple[int, ...] | Literal["auto"]
    pairs: list[Path]
    ir: list[Path] = field(default_factory=list)
    general: list[Path] = field(default_factory=list)
    calibration: list[Path] = field(default_factory=list)
    method: Method = "finesteer"
    description: str = ""
    strength: float | Literal["auto"] = 1.0
    positions: Positions = "all"
    tail: float = 0.05
    decay: float = 2.0
    floor: float = 1e-3
    centre: Centre | Literal["auto"] = "auto"
    rank: int | Literal["auto"] = "auto"
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    seed: int = 0
    batch_tokens: int = 8192
    force: bool = False
    cache: Path | None = None
