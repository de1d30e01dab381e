"""Chat answers, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from server.answers.extras import prompt_fields
from server.answers.generation import Generation, TokenNote
from server.answers.identity import AnswerIdentity, usage
from server.answers.logprobs import token_logprobs
from server.answers.parts import Answer, CallArguments, CallBegins, End, Text, Turn
from server.prompting.vocabulary import Vocabulary
from server.wire.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
)
from server.wire.tools import CallDelta, Called, CalledDelta, ToolCall


def chat_completion(
    identity: AnswerIdentity,
    generation: Generation,
    answers: Sequence[Answer],
    vocabulary: Vocabulary,
    *,
    token_ids: bool = False,
) -> ChatCompletion:
    """The whole answer; `token_ids`: with the ids of prompt and completions."""
    choices = [
        ChatChoice.model_construct(
            index=i,
            message=_message(answer),
            logprobs=_logprobs(generation, answer.notes, vocabulary),
            finish_reason=answer.finish_reason,
            **({"token_ids": generation.token_ids[i]} if token_ids else {}),
        )
        for i, answer in enumerate(answers)
    ]
    return ChatCompletion.model_construct(
        **identity.fields,
        object="chat.completion",
        choices=choices,
        usage=usage([generation]),
        **identity.steering([generation]),
        **prompt_fields(generation, vocabulary, token_ids=token_ids, logprobs=generation.prompt_logprobs),
    )


def _message(answer: Answer) -> AnswerMessage:
    calls = [
        ToolCall(id=call.id, type="function", function=Called(name=call.name, arguments=call.arguments))
        for call in answer.calls
    ]
    content = answer.text if answer.text or not calls else None
    extra = {"tool_calls": calls} if calls else {}
    return AnswerMessage.model_construct(role="assistant", content=content, refusal=None, **extra)


async def chat_chunks(
    identity: AnswerIdentity, turn: Turn, vocabulary: Vocabulary, include_usage: bool, *, token_ids: bool = False
) -> AsyncIterator[ChatCompletionChunk]:
    """The answer's chunks, for a turn whose generation has been started.

    First a role for each completion, the first of them with `steering`; then text; then each completion's end. The last
    chunk, which is the usage's where usage is asked for, has `steering` again. `token_ids`: the first chunk has the prompt's,
    and each later one those of the completion that became known since the one before.
    """
    generation = turn.generation
    steering = identity.steering([generation])
    extra = {"usage": None} if include_usage else {}
    sent = [0] * generation.request.n

    def new_ids(index: int) -> dict[str, list[int]]:
        if not token_ids:
            return {}
        start, sent[index] = sent[index], len(generation.token_ids[index])
        return {"token_ids": generation.token_ids[index][start:]}

    def chunk(choices: list[ChunkChoice], **fields: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_construct(
            **identity.fields, object="chat.completion.chunk", choices=choices, **(extra | fields)
        )

    for i in range(generation.request.n):
        role = Delta.model_construct(role="assistant", content="", refusal=None)
        first = steering | prompt_fields(generation, vocabulary, token_ids=token_ids) if i == 0 else {}
        yield chunk([_choice(i, role)], **first)
    unfinished = generation.request.n
    async for part in turn.parts():
        match part:
            case Text():
                logprobs = _logprobs(generation, part.notes, vocabulary)
                delta = Delta.model_construct(content=part.text)
                yield chunk([_choice(part.index, delta, logprobs, **new_ids(part.index))])
            case CallBegins():
                function = CalledDelta(name=part.name, arguments="")
                yield chunk([_call(part, id=part.id, type="function", function=function)])
            case CallArguments():
                yield chunk([_call(part, function=CalledDelta(arguments=part.text))])
            case End():
                unfinished -= 1
                last = not unfinished and not include_usage
                yield chunk([_end(part, **new_ids(part.index))], **(steering if last else {}))
    if include_usage:
        yield chunk([], usage=usage([generation]), **steering)


def _choice(index: int, delta: Delta, logprobs: ChoiceLogprobs | None = None, **ids: list[int]) -> ChunkChoice:
    return ChunkChoice.model_construct(index=index, delta=delta, logprobs=logprobs, finish_reason=None, **ids)


def _call(part: CallBegins | CallArguments, **fields: Any) -> ChunkChoice:
    call = CallDelta.model_construct(index=part.call, **fields)
    return _choice(part.index, Delta.model_construct(tool_calls=[call]))


def _end(part: End, **ids: list[int]) -> ChunkChoice:
    delta = Delta.model_construct()
    return ChunkChoice.model_construct(
        index=part.index, delta=delta, logprobs=None, finish_reason=part.finish_reason, **ids
    )


def _logprobs(generation: Generation, notes: Sequence[TokenNote], vocabulary: Vocabulary) -> ChoiceLogprobs | None:
    if generation.request.sampling.logprobs is None:
        return None
    return ChoiceLogprobs(content=token_logprobs(notes, vocabulary), refusal=None)
