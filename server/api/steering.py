"""`/v1/steering`: what is loaded, and what it would decide."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter, Request, Response

from server.answers.generation import by
from server.api.dependencies import ServiceDep, cache_owner, deadline_of, read_body, settle
from server.api.documentation import GENERATES, READS, documented
from server.api.respond import while_connected
from server.conversation import Conversation
from server.engine.base import GenerationRequest, SamplingOptions
from server.errors import ForbiddenError
from server.service import Service, new_id
from server.wire.chat import ScoreRequest
from server.wire.steering import ProfileCard, ProfileList, ScoreResponse, SteeringReport, steering_report
from steering.manifest import ProfileManifest

router = APIRouter(tags=["Steering"])


@router.get("/v1/steering/profiles", **documented(ProfileList, READS))
async def list_profiles(service: ServiceDep) -> Response:
    """The loaded profiles."""
    cards = [profile_card(service, name, manifest) for name, manifest in service.engine.profiles.items()]
    return Response(ProfileList(object="list", data=cards).to_json(), media_type="application/json")


@router.get("/v1/steering/profiles/{name}", **documented(ProfileCard, (*READS, 404)))
async def get_profile(name: str, service: ServiceDep) -> Response:
    """One loaded profile."""
    return Response(profile_card(service, name, service.profile(name)).to_json(), media_type="application/json")


@router.post("/v1/steering/score", **documented(ScoreResponse, GENERATES, body=ScoreRequest))
async def score(request: Request, service: ServiceDep) -> Response:
    """The decision that a prompt would get, in full; nothing is generated, and the gate metrics do not count it."""
    body = await read_body(request, ScoreRequest)
    if service.settings.policy.metadata_cap != "full":
        raise ForbiddenError(
            "This server does not give out gate values in full, and so has no scores.", code="steering_metadata_capped"
        )
    resolved = settle(request, service, body.model, body, counted=False)
    if body.messages is not None:
        prompt = await service.prompter.chat(Conversation(tuple(message.for_template() for message in body.messages)))
    else:
        prompt = await service.prompter.text(body.prompt or "")
    service.check_prompt(prompt, "prompt" if body.messages is None else "messages")
    owner = cache_owner(request, service)
    asked = GenerationRequest(
        new_id("score-"), prompt, SamplingOptions(max_tokens=1), resolved.options, cache_owner=owner
    )
    decision = await while_connected(request, by(deadline_of(request), service.engine.score(asked)))
    report = steering_report(decision, "full")
    assert isinstance(report, SteeringReport)
    answer = ScoreResponse(
        object="steering.score", model=body.model or service.model, prompt_tokens=len(prompt), steering=report
    )
    return Response(answer.to_json(), media_type="application/json")


def profile_card(service: Service, name: str, manifest: ProfileManifest) -> ProfileCard:
    """A loaded profile as clients see it, under the rules in force."""
    policy = service.settings.policy
    gate = _said(dataclasses.asdict(manifest.gate))
    if policy.metadata_cap != "full":
        gate.pop("threshold", None)  # with the energy ratio it would tell an attacker how far a prompt is from the gate
    return ProfileCard(
        id=name,
        object="steering.profile",
        version=manifest.version,
        description=manifest.description,
        method=manifest.method,
        model=manifest.model.id,
        layer=manifest.layer,
        positions=manifest.positions,
        strength=service.settings.defaults.strength(manifest),
        max_strength=policy.max_strength,
        gate=gate,
        experts=_said(dataclasses.asdict(manifest.experts)),
        override=policy.override(name),
        mode=policy.mode(name),
        metrics=manifest.metrics,
    )


def _said(record: dict) -> dict:
    return {key: value for key, value in record.items() if value is not None}
