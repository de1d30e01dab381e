"""What gates and experts share: frozen tensors that move to a device together, and states of one width."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from steering.errors import ShapeError


@dataclass(frozen=True)
class Operator:
    """A frozen set of tensors and numbers that is applied to states."""

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


def check_width(states: Tensor, width: int, owner: str) -> None:
    """Raise ShapeError unless (N, d) states have d = `width`, which is the `owner`'s, as the message says."""
    if states.shape[-1] != width:
        raise ShapeError(f"states are {states.shape[-1]} wide, the {owner} {width}")
