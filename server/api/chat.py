"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from server.answers.chat import chat_chunks, chat_completion
from server.answers.parts import collect
from server.api.context import watch
from server.api.dependencies import ServiceDep, cache_owner, identity, read_body, settle
from server.api.documentation import GENERATES, documented
from server.api.respond import streamed, while_connected, whole
from server.wire.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    tags=["OpenAI"],
    **documented(ChatCompletion, GENERATES, body=ChatCompletionRequest, events=ChatCompletionChunk),
)
async def create_chat_completion(request: Request, service: ServiceDep) -> Response:
    """Answer a conversation, steered where its last turn asks for it."""
    created = int(time.time())
    body = await read_body(request, ChatCompletionRequest)
    resolved = settle(request, service, body.model, body)
    answer = identity(service, body, resolved, "chatcmpl-", created)
    turn = await service.converse(
        answer.id,
        body.conversation(),
        resolved.options,
        body,
        limit=body.completion_limit,
        logprobs=body.num_logprobs,
        param="messages",
        prompt_logprobs=body.prompt_logprobs,
        priority=body.priority,
        cache_owner=cache_owner(request, service),
    )
    generation = turn.generation
    watch(request, body.model, [generation])
    vocabulary, token_ids = service.prompter.vocabulary, bool(body.return_token_ids)
    tell = resolved.metadata != "none"
    if not body.stream:
        answers = await while_connected(request, collect(turn))
        completion = chat_completion(answer, generation, answers, vocabulary, token_ids=token_ids)
        return whole(completion, [generation], tell=tell)
    chunks = chat_chunks(answer, turn, vocabulary, body.include_usage, token_ids=token_ids)
    return await streamed(request, [generation], chunks, service.config.shutdown_grace_s, tell=tell)
