"""What every route does first: find the service, read the body, settle the steering."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from server.answers.identity import AnswerIdentity
from server.errors import OverloadedError, RequestTooLargeError, SlowUploadError, UnsupportedMediaTypeError
from server.service import Service, new_id
from server.steering_options import PROFILES_HEADER, STRENGTH_HEADER, Resolved, SteeringHeaders
from server.wire.base import RequestModel
from server.wire.parsing import parse_body, shown
from server.wire.sampling import SamplingFields
from server.wire.steering import SteeringFields

MAX_BODY_BYTES = 4 * 2**20
MAX_UPLOADS_BYTES = 256 * 2**20  # of all bodies that have not come in full
JSON_SUFFIX = re.compile(r"application/[^\s/]+\+json")
Body = TypeVar("Body", bound=RequestModel)


async def _service(request: Request) -> Service:  # a plain function would be run in a thread
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]


async def read_body(request: Request, model: type[Body]) -> Body:
    """The parsed body; the time that the answer may take begins here.

    Raises UnsupportedMediaTypeError, SlowUploadError, RequestTooLargeError, OverloadedError, InvalidRequestError.
    """
    service: Service = request.app.state.service
    config = service.config
    arrived_s = asyncio.get_running_loop().time()
    request.state.deadline_s = arrived_s + config.request_timeout_s if config.request_timeout_s else None
    _check_media_type(request)
    raw = bytearray()
    try:
        async with asyncio.timeout_at(arrived_s + config.read_timeout_s):
            async for piece in request.stream():
                raw += piece
                service.uploads.num_bytes += len(piece)
                if len(raw) > MAX_BODY_BYTES:
                    raise RequestTooLargeError(
                        f"The body is larger than {MAX_BODY_BYTES >> 20} MiB. Shorten the prompt."
                    )
                if service.uploads.num_bytes > MAX_UPLOADS_BYTES:
                    raise OverloadedError("Too many bodies are being sent at once. Try again later.")
    except TimeoutError as error:
        raise SlowUploadError(
            f"The body did not come within {config.read_timeout_s:g} s. Send it faster, or shorten it."
        ) from error
    finally:
        service.uploads.num_bytes -= len(raw)
    return parse_body(model, bytes(raw))


def deadline_of(request: Request) -> float | None:
    """When the answer must be done, on the event loop's clock; None: any time. After `read_body`."""
    return request.state.deadline_s


def _check_media_type(request: Request) -> None:
    """Refuse a body that says it is no JSON. One that says nothing is taken for JSON.

    Not for tidiness only: a web page may send a form or plain text anywhere without asking, and may not send JSON.
    """
    sent = request.headers.get("Content-Type", "")
    media_type = sent.partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not JSON_SUFFIX.fullmatch(media_type):
        raise UnsupportedMediaTypeError(
            f"The body has Content-Type {shown(sent)}, and this server reads application/json. "
            "With curl, add -H 'Content-Type: application/json'."
        )
    if (coding := request.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise UnsupportedMediaTypeError(f"The body has Content-Encoding {shown(coding)}. Send it as it is.")


def key_name(request: Request) -> str:
    """Whose key the request came with; empty where none is wanted."""
    return request.state.key


def cache_owner(request: Request, service: Service) -> str:
    """See `GenerationRequest.cache_owner`: nobody's, unless keys are kept apart."""
    return key_name(request) if service.config.access.isolate_keys else ""


def settle(
    request: Request, service: Service, model: str | None, fields: SteeringFields, *, counted: bool = True
) -> Resolved:
    """The request's steering, from body, headers and model name; `counted` in the metrics."""
    headers = SteeringHeaders(request.headers.get(STRENGTH_HEADER), request.headers.get(PROFILES_HEADER))
    resolved = service.settle(model, fields, headers)
    if counted:
        service.metrics.overridden(resolved.overrides)
    return resolved


def identity(service: Service, fields: SamplingFields, resolved: Resolved, prefix: str, created: int) -> AnswerIdentity:
    """A new answer's id and what goes with it; the model's name is given back as it was asked for."""
    tier = "default" if getattr(fields, "service_tier", None) else None  # the one there is; told to who names one
    return AnswerIdentity(new_id(prefix), created, fields.model, service.fingerprint, resolved.metadata, tier)
