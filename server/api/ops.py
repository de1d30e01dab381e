"""For whoever runs the server: `/health`, `/ready`, `/version`, `/metrics`."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.api.dependencies import ServiceDep
from server.api.documentation import documented, refusals
from server.errors import AuditUnavailableError, EngineUnavailableError, ShuttingDownError
from server.wire.ops import Health, Versions

router = APIRouter(tags=["Operations"])
PROMETHEUS_TEXT = "text/plain; version=1.0.0; charset=utf-8"


@router.get("/health", **documented(Health, (405, 500, 503)))
async def health(service: ServiceDep) -> Response:
    """Live: 200 while the engine is sound, 503 once it must be restarted."""
    if service.engine.failure is not None:
        raise EngineUnavailableError(f"The engine has failed: {service.engine.failure}")
    return _json(Health(status="ok"))


@router.get("/ready", **documented(Health, (405, 500, 503)))
async def ready(service: ServiceDep) -> Response:
    """Ready for traffic: as `/health`, and 503 from the moment that the server was told to end, and while an audit log that is
    required cannot be written. It is loaded before its port opens."""
    if service.draining.begun:
        raise ShuttingDownError("The server is shutting down.")
    if service.audit is not None and (refusal := service.audit.refusal) is not None:
        raise AuditUnavailableError(f"Nothing is answered while {refusal}.")
    return await health(service)


@router.get("/version", **documented(Versions, (405, 500)))
async def get_version(service: ServiceDep) -> Response:
    """Versions of the server and of what it runs on."""
    info = service.engine.info
    return _json(
        Versions(
            version=version("finesteer-server"),
            engine=info.engine,
            torch=version("torch"),
            transformers=version("transformers"),
            system_fingerprint=service.fingerprint,
        )
    )


@router.get("/metrics", response_class=PlainTextResponse, responses=refusals((405, 500)))
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format."""
    return Response(service.metrics.render(), media_type=PROMETHEUS_TEXT)


def _json(answer: Health | Versions) -> Response:
    return Response(answer.to_json(), media_type="application/json")
