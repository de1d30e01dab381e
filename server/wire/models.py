"""`/v1/models` on the wire."""

from __future__ import annotations

from typing import Literal

from server.wire.base import ResponseModel


class ModelCard(ResponseModel):
    """The model, or an alias of it that stands for a choice of steering profiles."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    steer_profiles: list[str]


class ModelList(ResponseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]
