"""Text completions, whole and in chunks, of one prompt or several. Choice `i·n + j` is completion j of prompt i."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from server.answers.generation import Completion, Generation, TokenNote
from server.answers.identity import AnswerIdentity, usage
from server.answers.merge import merged
from server.prompting.vocabulary import Vocabulary
from server.wire.completions import TextChoice, TextCompletion, TextLogprobs


def text_completion(
    identity: AnswerIdentity,
    generations: Sequence[Generation],
    completions: Sequence[Sequence[Completion]],
    vocabulary: Vocabulary,
) -> TextCompletion:
    """The whole answer; `completions[i]` are those of `generations[i]`."""
    choices = [
        TextChoice(
            index=i * generation.request.n + j,
            text=completion.text,
            logprobs=_logprobs(generation, completion.notes, vocabulary),
            finish_reason=completion.finish_reason,
        )
        for i, (generation, group) in enumerate(zip(generations, completions, strict=True))
        for j, completion in enumerate(group)
    ]
    return TextCompletion.model_construct(
        **identity.fields,
        object="text_completion",
        choices=choices,
        usage=usage(generations),
        **identity.steering(generations, as_list=len(generations) > 1),
    )


async def text_chunks(
    identity: AnswerIdentity, generations: Sequence[Generation], vocabulary: Vocabulary, include_usage: bool
) -> AsyncIterator[TextCompletion]:
    """The answer's chunks, for generations that have all been started; the first and the last one hold `steering`."""
    steering = identity.steering(generations, as_list=len(generations) > 1)
    extra = {"usage": None} if include_usage else {}
    unfinished = sum(generation.request.n for generation in generations)
    first = True
    async for which, delta in merged([generation.deltas() for generation in generations]):
        unfinished -= delta.finish_reason is not None
        last = not unfinished and not include_usage
        if not (first or last or delta.text or delta.notes or delta.finish_reason):
            continue
        generation = generations[which]
        choice = TextChoice(
            index=which * generation.request.n + delta.index,
            text=delta.text,
            logprobs=_logprobs(generation, delta.notes, vocabulary),
            finish_reason=delta.finish_reason,
        )
        yield TextCompletion.model_construct(
            **identity.fields,
            object="text_completion",
            choices=[choice],
            **extra,
            **(steering if first or last else {}),
        )
        first = False
    if include_usage:
        yield TextCompletion.model_construct(
            **identity.fields, object="text_completion", choices=[], usage=usage(generations), **steering
        )


def _logprobs(generation: Generation, notes: Sequence[TokenNote], vocabulary: Vocabulary) -> TextLogprobs | None:
    if generation.request.sampling.logprobs is None:
        return None

    def text(token_id: int) -> str:
        return vocabulary.raw_bytes(token_id).decode("utf-8", "replace")

    top = [{text(token_id): max(value, -9999.0) for token_id, value in note.logprobs.top} for note in notes]
    return TextLogprobs(
        tokens=[text(note.token_id) for note in notes],
        token_logprobs=[max(note.logprobs.logprob, -9999.0) for note in notes],
        top_logprobs=top if generation.request.sampling.logprobs else None,
        text_offset=[note.offset for note in notes],
    )
