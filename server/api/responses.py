"""`/v1/responses`: create, retrieve, delete, list the input, cancel."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from server.answers.generation import TokenNote
from server.answers.identity import AnswerIdentity
from server.answers.logprobs import token_logprobs
from server.answers.parts import Turn
from server.answers.response_store import StoredResponse
from server.answers.responses import ResponseWriter, response_usage, response_whole
from server.api.context import watch
from server.api.dependencies import ServiceDep, cache_owner, identity, key_name, read_body, settle
from server.api.documentation import GENERATES, READS, documented
from server.api.engine_errors import api_error
from server.api.respond import named_events, streamed, while_connected, whole
from server.conversation import Conversation
from server.engine.base import EngineError
from server.errors import InvalidRequestError, NotFoundError
from server.service import Service, new_id
from server.wire.base import RequestModel, ResponseModel
from server.wire.chat import TokenLogprob
from server.wire.parsing import parse_fields
from server.wire.response_history import template_messages
from server.wire.response_items import ItemReference, KeptItem
from server.wire.response_objects import DeletedResponse, Event, ItemList, ResponseObject, ResponseStreamEvent
from server.wire.responses import InputItemsQuery, ResponsesRequest, RetrieveQuery

router = APIRouter(tags=["OpenAI"])
STORED = (*READS, 400, 404)


def _queried(answer: type[ResponseModel], query: type[RequestModel]) -> dict[str, Any]:
    """`documented` for a route that reads its query string by `_query`."""
    properties = query.model_json_schema()["properties"]
    parameters = [{"name": name, "in": "query", "schema": properties[name]} for name in query.model_fields]
    return documented(answer, STORED) | {"openapi_extra": {"parameters": parameters}}


Query = TypeVar("Query", bound=RequestModel)


@router.post(
    "/v1/responses", **documented(ResponseObject, GENERATES, body=ResponsesRequest, events=ResponseStreamEvent)
)
async def create_response(request: Request, service: ServiceDep) -> Response:
    """Answer a conversation, steered where its last turn asks for it; kept for later unless `store` is false."""
    created = int(time.time())
    body = await read_body(request, ResponsesRequest)
    resolved = settle(request, service, body.model, body)
    owner = key_name(request)
    previous = _previous(service, body, owner)
    own_input = _own_input(service, body, owner)
    items = [] if previous is None else previous.items()
    conversation = Conversation(
        template_messages(body.instructions, [*items, *own_input]), body.tool_use(), body.text_format, param="input"
    )
    answer = identity(service, body, resolved, "resp_", created)
    turn = await service.converse(
        answer.id,
        conversation,
        resolved.options,
        body,
        limit=body.max_output_tokens,
        logprobs=body.num_logprobs,
        param="input",
        cache_owner=cache_owner(request, service),
    )
    generation = turn.generation
    watch(request, body.model, [generation])
    vocabulary = service.prompter.vocabulary

    def keep(response: ResponseObject) -> None:
        if body.store is not False:
            service.responses.put(StoredResponse.of(response, own_input, previous, owner))

    def logprobs(notes: Sequence[TokenNote]) -> list[TokenLogprob]:
        return [] if body.num_logprobs is None else token_logprobs(notes, vocabulary)

    def new_writer() -> ResponseWriter:
        return ResponseWriter(_fields(answer, body, turn), new_id, logprobs)

    tell = resolved.metadata != "none"
    if body.stream:
        events = _events(new_writer, turn, keep)
        grace_s = service.config.shutdown_grace_s
        return await streamed(request, [generation], events, grace_s, tell=tell, framed=named_events)
    response = await while_connected(request, response_whole(new_writer, turn))
    keep(response)
    return whole(response, [generation], tell=tell)


@router.get("/v1/responses/{response_id}", **_queried(ResponseObject, RetrieveQuery))
async def get_response(response_id: str, request: Request, service: ServiceDep) -> Response:
    """A stored response, as it was sent."""
    _query(request, RetrieveQuery)
    return Response(_stored(service, response_id, request).response, media_type="application/json")


@router.delete("/v1/responses/{response_id}", **documented(DeletedResponse, STORED))
async def delete_response(response_id: str, request: Request, service: ServiceDep) -> Response:
    """Forget a stored response. Those that continue it keep what they were told."""
    _stored(service, response_id, request)
    service.responses.delete(response_id)
    return _json(DeletedResponse(id=response_id, object="response", deleted=True))


@router.get("/v1/responses/{response_id}/input_items", **_queried(ItemList, InputItemsQuery))
async def list_input_items(response_id: str, request: Request, service: ServiceDep) -> Response:
    """What the model was given for a stored response, a page at a time; the newest first unless `order` is `asc`."""
    query = _query(request, InputItemsQuery)
    items = _stored(service, response_id, request).input_items()
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        ids = [item["id"] for item in items]
        if query.after not in ids:
            raise InvalidRequestError(f"after: this response has no input item with id {query.after!r}.", param="after")
        items = items[ids.index(query.after) + 1 :]
    page = items[: query.limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return _json(ItemList(object="list", data=page, first_id=first, last_id=last, has_more=len(items) > len(page)))


@router.post("/v1/responses/{response_id}/cancel", **documented(ResponseObject, STORED))
async def cancel_response(response_id: str, request: Request, service: ServiceDep) -> Response:
    """Always an error: only background responses can be cancelled, and there are none here."""
    _stored(service, response_id, request)
    raise InvalidRequestError("Cannot cancel a synchronous response.")


async def _events(
    new_writer: Callable[[], ResponseWriter], turn: Turn, keep: Callable[[ResponseObject], None]
) -> AsyncIterator[Event]:
    """The events of a turn, not to be asked for before it has been started: `new_writer` writes its decision down.

    The response is kept before the event that ends it is sent.
    """
    writer = new_writer()
    for event in writer.begin():
        yield event
    try:
        async for part in turn.parts():
            for event in writer.push(part):
                yield event
    except EngineError as error:
        response, events = writer.fail(api_error(error))
    else:
        response, events = writer.finish(response_usage(turn))
    keep(response)
    for event in events:
        yield event


def _fields(answer: AnswerIdentity, body: ResponsesRequest, turn: Turn) -> dict[str, Any]:
    """The fields of a response that its request settles."""
    text = body.text
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": answer.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": turn.generation.request.sampling.temperature,
        "text": {"format": {"type": "text"} if text is None else text.shown_format()},
        "tool_choice": body.shown_choice(),
        "tools": [tool.shown() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": turn.generation.request.sampling.top_p,
        "truncation": "disabled",
        **({} if body.user is None else {"user": body.user}),
        **answer.steering([turn.generation]),
    }


def _previous(service: Service, body: ResponsesRequest, owner: str) -> StoredResponse | None:
    if body.previous_response_id is None:
        return None
    previous = service.responses.get(body.previous_response_id, owner)
    if previous is None:
        raise InvalidRequestError(
            f"Previous response with id '{body.previous_response_id}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return previous


def _own_input(service: Service, body: ResponsesRequest, owner: str) -> list[KeptItem]:
    """The request's items as they are kept, references looked up."""
    kept = []
    for item in body.input or ():
        if not isinstance(item, ItemReference):
            kept.append(item.kept(new_id))
            continue
        found = service.responses.item(item.id, owner)
        if found is None:
            raise NotFoundError(
                f"Item with id '{item.id}' not found. Items are kept with the responses that hold them, and those only "
                "where store is not false. Send the item itself.",
                param="input",
            )
        kept.append(found)
    return kept


def _stored(service: Service, response_id: str, request: Request) -> StoredResponse:
    stored = service.responses.get(response_id, key_name(request))
    if stored is None:
        raise NotFoundError(f"Response with id '{response_id}' not found.")
    return stored


def _query(request: Request, model: type[Query]) -> Query:
    """The query string's fields; `include` may be repeated, and written `include[]`."""
    fields: dict[str, Any] = {}
    for key, value in request.query_params.multi_items():
        name = key.removesuffix("[]")
        if name == "include":
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
    return parse_fields(model, fields)


def _json(answer: ResponseModel) -> Response:
    return Response(answer.to_json(), media_type="application/json")
