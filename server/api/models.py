"""`GET /v1/models`: the model and the aliases by which clients that can send nothing extra choose their steering."""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.api.dependencies import ServiceDep
from server.api.documentation import READS, documented
from server.errors import NotFoundError
from server.service import Service
from server.steering_options import aliases
from server.wire.models import ModelCard, ModelList

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", **documented(ModelList, READS))
async def list_models(service: ServiceDep) -> Response:
    """Every name that a request may use as `model`."""
    return _json(ModelList(object="list", data=list(_cards(service).values())))


@router.get("/v1/models/{model:path}", **documented(ModelCard, (*READS, 404)))
async def get_model(model: str, service: ServiceDep) -> Response:
    """One of those names."""
    card = _cards(service).get(model)
    if card is None:
        raise NotFoundError(
            f"model: {model!r} is not served here. GET /v1/models lists every name.",
            param="model",
            code="model_not_found",
        )
    return _json(card)


def _cards(service: Service) -> dict[str, ModelCard]:
    names = aliases(service.model, service.engine.profiles, service.settings.policy, service.settings.defaults)
    return {
        name: ModelCard(
            id=name,
            object="model",
            created=service.created,
            owned_by="finesteer",
            root=service.model,
            parent=None if name == service.model else service.model,
            max_model_len=service.engine.info.max_model_len,
            steer_profiles=list(profiles),
        )
        for name, profiles in names.items()
    }


def _json(answer: ModelCard | ModelList) -> Response:
    return Response(answer.to_json(), media_type="application/json")
