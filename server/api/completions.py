"""`POST /v1/completions`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from server.answers.echo import echo_of
from server.answers.generation import collect
from server.answers.merge import together
from server.answers.text import TextForm, text_chunks, text_completion
from server.api.context import watch
from server.api.dependencies import ServiceDep, cache_owner, identity, read_body, settle
from server.api.documentation import GENERATES, documented
from server.api.respond import streamed, while_connected, whole
from server.service import Service
from server.wire.completions import CompletionRequest, TextCompletion

router = APIRouter()


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    **documented(TextCompletion, GENERATES, body=CompletionRequest, events=TextCompletion),
)
async def create_completion(request: Request, service: ServiceDep) -> Response:
    """Continue one prompt or several; each prompt gets a decision of its own."""
    created = int(time.time())
    body = await read_body(request, CompletionRequest)
    resolved = settle(request, service, body.model, body)
    answer = identity(service, body, resolved, "cmpl-", created)
    prompts = await _token_ids(service, body)
    several = len(prompts) > 1
    requests = [
        service.request(
            f"{answer.id}-{i}" if several else answer.id,
            tokens,
            resolved.options,
            body,
            limit=None if body.max_tokens is None else max(1, body.max_tokens),
            logprobs=body.num_logprobs,
            param=f"prompt[{i}]" if several else "prompt",
            n=body.num_completions,
            prompt_logprobs=body.num_prompt_logprobs,
            priority=body.priority,
            cache_owner=cache_owner(request, service),
        )
        for i, tokens in enumerate(prompts)
    ]
    silent = body.max_tokens == 0
    generations = [service.generation(item, body.stop, silent=silent, note_ends=True) for item in requests]
    watch(request, body.model, generations)
    vocabulary, tell = service.prompter.vocabulary, resolved.metadata != "none"
    form = TextForm(
        n=body.n or 1,
        logprobs=body.logprobs,
        echoes=[echo_of(*pair, vocabulary) for pair in zip(body.prompt, prompts, strict=True)] if body.echo else None,
        prompt_logprobs=body.prompt_logprobs,
        token_ids=bool(body.return_token_ids),
    )
    if not body.stream:
        completions = await while_connected(request, together([collect(item) for item in generations]))
        completion = text_completion(answer, generations, completions, vocabulary, form)
        return whole(completion, generations, tell=tell)
    chunks = text_chunks(answer, generations, vocabulary, form, body.include_usage)
    return await streamed(request, generations, chunks, service.config.shutdown_grace_s, tell=tell)


async def _token_ids(service: Service, body: CompletionRequest) -> list[tuple[int, ...]]:
    """Each prompt's."""
    special = body.add_special_tokens is not False
    return [
        await service.prompter.text(prompt, special) if isinstance(prompt, str) else prompt for prompt in body.prompt
    ]
