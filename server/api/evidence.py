"""What a loaded profile's folder tells beside the profile: what training saw, and the report."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from server.api.dependencies import ServiceDep
from server.api.documentation import READS, documented, refusals
from server.errors import ForbiddenError
from server.service import Service
from server.wire.evidence import ProfileEvidence

router = APIRouter(tags=["Steering"])
ERRORS = (*READS, 403, 404)
REPORT_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'; sandbox"
    ),
    "X-Content-Type-Options": "nosniff",
}


@router.get("/v1/steering/profiles/{name}/evidence", **documented(ProfileEvidence, ERRORS))
async def get_evidence(name: str, service: ServiceDep) -> Response:
    """How the gate's scores lay in training, and what each expert stands for."""
    manifest = service.profile(name)
    _check_cap(service)
    found = await service.folders.evidence(name, manifest)
    return Response(found.to_json(), media_type="application/json")


@router.get(
    "/v1/steering/profiles/{name}/report", response_class=HTMLResponse, responses=refusals(ERRORS), summary="Get Report"
)
async def get_report(name: str, service: ServiceDep) -> Response:
    """The profile's `report.html`, for a frame: it runs nothing and loads nothing."""
    manifest = service.profile(name)
    _check_cap(service)
    return HTMLResponse(await service.folders.report(name, manifest), headers=REPORT_HEADERS)


def _check_cap(service: Service) -> None:
    if service.settings.policy.metadata_cap != "full":
        raise ForbiddenError(
            "This server does not give out gate values in full, and so neither a profile's evidence nor its report.",
            code="steering_metadata_capped",
        )
