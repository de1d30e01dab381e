"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from server.answers.generation import Generation, collect
from server.answers.merge import together
from server.answers.text import text_chunks, text_completion
from server.api.context import watch
from server.api.dependencies import ServiceDep, body_schema, identity, read_body, settle
from server.api.respond import AnswerStream, while_connected, whole
from server.wire.completions import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest), tags=["OpenAI"])
async def create_completion(request: Request, service: ServiceDep) -> Response:
    """Continue one prompt or several; each prompt gets a decision of its own."""
    created = int(time.time())
    body = await read_body(request, CompletionRequest)
    resolved = settle(request, service, body.model, body)
    answer = identity(service, body, resolved, "cmpl-", created)
    requests = []
    for i, prompt in enumerate(body.prompt):
        several = len(body.prompt) > 1
        tokens = await service.prompter.text(prompt) if isinstance(prompt, str) else prompt
        requests.append(
            service.request(
                f"{answer.id}-{i}" if several else answer.id,
                tokens,
                resolved.options,
                body,
                limit=body.max_tokens,
                logprobs=body.logprobs,
                param=f"prompt[{i}]" if several else "prompt",
            )
        )
    generations = [service.generation(item, body.stop) for item in requests]
    watch(request, body.model, generations)
    vocabulary = service.prompter.vocabulary
    if not body.stream:
        completions = await while_connected(request, together([collect(item) for item in generations]))
        completion = text_completion(answer, generations, completions, vocabulary)
        return whole(completion, generations, tell=resolved.metadata != "none")
    try:
        await while_connected(request, together([generation.start() for generation in generations]))
    except BaseException:
        await _close(generations)
        raise
    chunks = text_chunks(answer, generations, vocabulary, body.include_usage)
    return AnswerStream(chunks, lambda: _close(generations), service.config.shutdown_grace_s)


async def _close(generations: list[Generation]) -> None:
    await asyncio.gather(*(generation.aclose() for generation in generations))
