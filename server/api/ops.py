"""For whoever runs the server: `/health`, `/ready`, `/version`, `/metrics`."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import ServiceDep
from server.errors import EngineUnavailableError

router = APIRouter(tags=["Operations"])
PROMETHEUS_TEXT = "text/plain; version=1.0.0; charset=utf-8"


@router.get("/health")
async def health(service: ServiceDep) -> Response:
    """Live: 200 while the engine is sound, 503 once it must be restarted."""
    if service.engine.failure is not None:
        raise EngineUnavailableError(f"The engine has failed: {service.engine.failure}")
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(service: ServiceDep) -> Response:
    """Ready for traffic. The port opens after loading is done, so this differs from `/health` in name only, by design."""
    return await health(service)


@router.get("/version")
async def get_version(service: ServiceDep) -> Response:
    """Versions of the server and of what it runs on."""
    info = service.engine.info
    return JSONResponse(
        {
            "version": version("finesteer-server"),
            "engine": info.engine,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "system_fingerprint": service.fingerprint,
        }
    )


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format."""
    return Response(service.metrics.render(), media_type=PROMETHEUS_TEXT)
