"""Text completions, whole and in chunks, of one prompt or several. Choice `i·n + j` is completion j of prompt i."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.answers.echo import Echo
from server.answers.extras import LOWEST, prompt_fields
from server.answers.generation import Completion, Generation, TextDelta
from server.answers.identity import AnswerIdentity, usage
from server.answers.merge import merged
from server.engine.base import TokenLogprobs
from server.prompting.vocabulary import Vocabulary
from server.wire.completions import TextChoice, TextCompletion, TextLogprobs


@dataclass(frozen=True)
class TextForm:
    """What the client is given of each prompt's completions.

    Attributes:
        n: how many; the best of them, where more were made.
        logprobs: likeliest tokens at each place, beside the token itself; None gives no log-probabilities.
        echoes: each prompt's, or None.
        prompt_logprobs: whether the field of that name is given, with that many of the likeliest.
        token_ids: whether they are given.
    """

    n: int
    logprobs: int | None = None
    echoes: Sequence[Echo] | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False


def text_completion(
    identity: AnswerIdentity,
    generations: Sequence[Generation],
    completions: Sequence[Sequence[Completion]],
    vocabulary: Vocabulary,
    form: TextForm,
) -> TextCompletion:
    """The whole answer; `completions[i]` are those of `generations[i]`."""
    choices = []
    for i, (generation, group) in enumerate(zip(generations, completions, strict=True)):
        writer = _Writer(generation, vocabulary, form, None if form.echoes is None else form.echoes[i])
        about_prompt = writer.prompt_fields()
        for j, made in enumerate(best(generation, form.n)):
            completion = group[made]
            logprobs = _joined(writer.echoed(), writer.chosen(completion.notes))
            choices.append(
                TextChoice.model_construct(
                    index=i * form.n + j,
                    text=writer.echo_text + completion.text,
                    logprobs=logprobs,
                    finish_reason=completion.finish_reason,
                    **about_prompt,
                    **({"token_ids": generation.token_ids[made]} if form.token_ids else {}),
                )
            )
    return TextCompletion.model_construct(
        **identity.fields,
        object="text_completion",
        choices=choices,
        usage=usage(generations),
        **identity.steering(generations, as_list=len(generations) > 1),
    )


def best(generation: Generation, n: int) -> list[int]:
    """The n completions whose tokens are likeliest on average, the best first; where no more than n were made, all in order."""
    made = range(generation.request.n)
    return list(made) if len(made) <= n else sorted(made, key=generation.mean_logprob, reverse=True)[:n]


async def text_chunks(
    identity: AnswerIdentity,
    generations: Sequence[Generation],
    vocabulary: Vocabulary,
    form: TextForm,
    include_usage: bool,
) -> AsyncIterator[TextCompletion]:
    """The answer's chunks, for generations that have all been started; the first and the last one hold `steering`.

    Echoes come before anything else, one for each choice.
    """
    steering = identity.steering(generations, as_list=len(generations) > 1)
    unfinished = len(generations) * form.n
    first = True

    def chunk(choice: dict[str, Any], *, last: bool = False) -> TextCompletion:
        nonlocal first
        told, first = (steering if first or last else {}), False
        return TextCompletion.model_construct(
            **identity.fields,
            object="text_completion",
            choices=[TextChoice.model_construct(**choice)],
            **told,
        )

    writers = [
        _Writer(generation, vocabulary, form, None if form.echoes is None else form.echoes[i])
        for i, generation in enumerate(generations)
    ]
    about_prompt = {i * form.n + j: writer.prompt_fields() for i, writer in enumerate(writers) for j in range(form.n)}
    if form.echoes is not None:
        for index, fields in about_prompt.items():
            writer = writers[index // form.n]
            echo = {"text": writer.echo_text, "logprobs": writer.echoed(), "finish_reason": None}
            yield chunk({"index": index} | echo | fields)
        about_prompt.clear()
    async for which, delta in merged([generation.deltas() for generation in generations]):
        unfinished -= delta.finish_reason is not None
        last = not unfinished and not include_usage
        if not (first or last or delta.text or delta.notes or delta.finish_reason or form.token_ids):
            continue
        index = which * form.n + delta.index
        yield chunk(
            {
                "index": index,
                "text": delta.text,
                "logprobs": writers[which].chosen(delta.notes),
                "finish_reason": delta.finish_reason,
                **about_prompt.pop(index, {}),
                **({"token_ids": _ids(delta)} if form.token_ids else {}),
            },
            last=last,
        )
    if include_usage:
        yield TextCompletion.model_construct(
            **identity.fields, object="text_completion", choices=[], usage=usage(generations), **steering
        )


def _ids(delta: TextDelta) -> list[int]:
    return [] if delta.token_id is None else [delta.token_id]


@dataclass(frozen=True)
class _Writer:
    """Writes what is said of one prompt's tokens and of its completions'."""

    generation: Generation
    vocabulary: Vocabulary
    form: TextForm
    echo: Echo | None

    @property
    def echo_text(self) -> str:
        return "" if self.echo is None else self.echo.text

    def prompt_fields(self) -> dict[str, Any]:
        """`prompt_token_ids` and `prompt_logprobs`, which an echo may have asked more of than the field shows."""
        wanted, found = self.form.prompt_logprobs, self.generation.prompt_logprobs
        shown = None if wanted is None or found is None else [_cut(entry, wanted) for entry in found]
        return prompt_fields(self.generation, self.vocabulary, token_ids=self.form.token_ids, logprobs=shown)

    def echoed(self) -> TextLogprobs | None:
        """The prompt's tokens, if they are shown with log-probabilities."""
        found = self.generation.prompt_logprobs
        if self.form.logprobs is None or self.echo is None or found is None:
            return None
        return self._logprobs(
            list(zip(self.generation.request.prompt_token_ids, found, self.echo.offsets, strict=True))
        )

    def chosen(self, notes: Sequence[Any]) -> TextLogprobs | None:
        """A completion's tokens, likewise."""
        if self.form.logprobs is None:
            return None
        start = len(self.echo_text)
        return self._logprobs([(note.token_id, note.logprobs, start + note.offset) for note in notes])

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs | None, int]]) -> TextLogprobs:
        """Of (token id, log-probabilities, offset), one by one."""
        return TextLogprobs.model_construct(
            tokens=[self._name(token_id) for token_id, _, _ in tokens],
            token_logprobs=[None if found is None else max(found.logprob, LOWEST) for _, found, _ in tokens],
            top_logprobs=[None if found is None else self._top(token_id, found) for token_id, found, _ in tokens],
            text_offset=[offset for _, _, offset in tokens],
        )

    def _top(self, token_id: int, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest first; the token itself last, unless it is among them."""
        pairs = (*found.top[: self.form.logprobs], (token_id, found.logprob))
        top: dict[str, float] = {}
        for likely, logprob in pairs:
            top.setdefault(self._name(likely), max(logprob, LOWEST))
        return top

    def _name(self, token_id: int) -> str:
        raw = self.vocabulary.raw_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:  # part of a character: OpenAI's way to write it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _cut(entry: TokenLogprobs | None, num_top: int) -> TokenLogprobs | None:
    return None if entry is None else TokenLogprobs(entry.logprob, entry.top[:num_top], entry.rank)


def _joined(first: TextLogprobs | None, second: TextLogprobs | None) -> TextLogprobs | None:
    if first is None or second is None:
        return second
    return TextLogprobs.model_construct(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )
