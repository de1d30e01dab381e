"""For whoever runs the server, by the admin key: profiles in and out, and the defaults, while it serves."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.dependencies import ServiceDep, key_name, read_body
from server.api.documentation import READS, documented
from server.api.steering import profile_card
from server.errors import InvalidRequestError
from server.service import Service
from server.steering_options import profile_name_problem
from server.wire.steering import (
    Defaults,
    DefaultsRequest,
    LoadProfileRequest,
    ProfileCard,
    UnloadedProfile,
    UnloadProfileRequest,
)
from steering.errors import ProfileError
from steering.manifest import ProfileManifest

router = APIRouter(tags=["Administration"])
CHANGES = (400, 401, 403, 405, 408, 413, 415, 500, 503)


@router.post("/v1/steering/profiles/load", **documented(ProfileCard, CHANGES, body=LoadProfileRequest))
async def load_profile(request: Request, service: ServiceDep) -> Response:
    """Load a profile, or replace the one of that name. Requests under way keep the version they began with; a profile that
    cannot be used changes nothing."""
    body = await read_body(request, LoadProfileRequest)
    if problem := profile_name_problem(body.name):
        raise InvalidRequestError(f"name: {problem}", param="name")
    async with service.settings.changing:
        before = service.settings.policy, service.settings.defaults
        loaded = service.engine.profiles.get(body.name)
        service.settings.admit(body.name, body.mode, body.default, service.engine.profiles)

        def check(manifest: ProfileManifest) -> None:
            service.settings.check_manifest(manifest)
            service.metrics.add_profile(manifest)

        try:
            manifest = await service.engine.load_profile(body.name, body.source, check)
        except BaseException as error:
            service.settings.policy, service.settings.defaults = before
            if isinstance(error, ProfileError):
                raise InvalidRequestError(f"source: {error}", param="source", code="unusable_profile") from error
            raise
        service.folders.loaded(body.name, body.source)
        service.metrics.show_profiles(service.engine.profiles)
        replaced = {} if loaded is None else {"replaced": loaded.version}
        _audit(request, service, "profile_loaded", name=body.name, version=manifest.version, **replaced)
        return _json(profile_card(service, body.name, manifest))


@router.post("/v1/steering/profiles/unload", **documented(UnloadedProfile, (*CHANGES, 404), body=UnloadProfileRequest))
async def unload_profile(request: Request, service: ServiceDep) -> Response:
    """Unload a profile. Requests under way go on with it."""
    body = await read_body(request, UnloadProfileRequest)
    async with service.settings.changing:
        manifest = service.profile(body.name)
        await service.engine.unload_profile(body.name)
        service.settings.forget(body.name)
        service.folders.unloaded(body.name)
        service.metrics.show_profiles(service.engine.profiles)
        _audit(request, service, "profile_unloaded", name=body.name, version=manifest.version)
    return _json(UnloadedProfile(object="steering.profile.unloaded", id=body.name, version=manifest.version))


@router.get("/v1/steering/defaults", **documented(Defaults, (*READS, 403)))
async def get_defaults(service: ServiceDep) -> Response:
    """What a request gets that says nothing of steering."""
    return _json(_defaults(service))


@router.put("/v1/steering/defaults", **documented(Defaults, CHANGES, body=DefaultsRequest))
async def put_defaults(request: Request, service: ServiceDep) -> Response:
    """Set default profiles, strengths and modes anew, from the next request on."""
    body = await read_body(request, DefaultsRequest)
    async with service.settings.changing:
        service.settings.change(service.engine.profiles, body.profiles, body.strengths, body.modes)
        _audit(request, service, "defaults_changed")
    return _json(_defaults(service))


def _audit(request: Request, service: Service, event: str, **fields: str) -> None:
    """Note a change, who made it and what holds now."""
    if service.audit is not None:
        service.audit.tell(
            event,
            request=request.state.request_id,
            key=key_name(request),
            **fields,
            **_defaults(service).model_dump(exclude={"object"}),
        )


def _defaults(service: Service) -> Defaults:
    settings, manifests = service.settings, service.engine.profiles
    return Defaults(
        object="steering.defaults",
        profiles=list(settings.defaults.active(manifests)),
        strengths={name: settings.defaults.strength(manifest) for name, manifest in manifests.items()},
        modes={name: settings.policy.mode(name) for name in manifests},
    )


def _json(answer: ProfileCard | UnloadedProfile | Defaults) -> Response:
    return Response(answer.to_json(), media_type="application/json")
