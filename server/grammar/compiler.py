"""Compiles grammars beside the event loop, each once, and keeps the latest."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from server.conversation import TextFormat
from server.engine.base import Grammar, GrammarSource
from server.errors import InvalidRequestError
from server.grammar.matcher import CompiledGrammar
from server.grammar.schema import SchemaError, schema_texts, without_white_space
from server.grammar.vocabulary import build_tokenizer, markers_among
from server.prompting.vocabulary import Vocabulary

MAX_COMPILED = 64  # grammars that are kept
MAX_COMPILE_S = 5.0
NUM_THREADS = 2
ANY_OBJECT = {"type": "object"}


class GrammarCompiler:
    """Grammars for one model. All methods are called from one event loop; the work is done in threads.

    Two tokenizers, each built once: for JSON no special token is ever allowed, in Lark grammars those of
    `marker_texts` are plain text.

    Args:
        vocab_size: of the model's logits, which may be wider than the tokenizer.
        marker_texts: tokens such as `<tool_call>` that Lark grammars may spell in plain quotes, special or not.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos_token_ids: Collection[int],
        vocab_size: int,
        marker_texts: Collection[str] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._eos_token_ids = frozenset(i for i in eos_token_ids if i < vocab_size)
        self._vocab_size = vocab_size
        self._marker_texts = tuple(marker_texts) if markers_among(vocabulary, marker_texts) else ()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._tokenizers: dict[tuple[str, ...], Future[LLTokenizer]] = {}
        self._compiled: OrderedDict[tuple[str, tuple[str, ...]], Future[CompiledGrammar]] = OrderedDict()

    async def text_format(self, wanted: TextFormat) -> Grammar | None:
        """What an answer's text must spell; None where it may be anything. Raises InvalidRequestError."""
        return None if wanted.type == "text" else await self.json_schema(**_schema_of(wanted))

    async def json_schema(self, schema: Mapping[str, Any] | bool, *, strict: bool, what: str, param: str) -> Grammar:
        """JSON after a schema; with `strict` all of it, else as much of it as can be enforced.

        Args:
            what, param: what the schema is, and the request's field that holds it, for messages.
        Raises:
            InvalidRequestError: code `invalid_json_schema`.
        """
        grammar, _ = await self._json(schema, strict, what, param)
        return grammar

    async def embeddable(self, schema: Mapping[str, Any] | bool, *, strict: bool, what: str, param: str) -> str:
        """The text to write after `%json` in a Lark grammar: known to compile, with this server's white space and strictness.

        Arguments and errors as for `json_schema`.
        """
        _, text = await self._json(schema, strict, what, param)
        return text

    async def embeddable_format(self, wanted: TextFormat) -> str:
        """The same for a text format that is not "text"."""
        return await self.embeddable(**_schema_of(wanted))

    async def lark(self, text: str, *, what: str, param: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, its start rule `start`. Schemas in it come from `embeddable`.

        Raises InvalidRequestError: code `invalid_grammar`.
        """
        try:
            source = None if self._marker_texts else GrammarSource("grammar", without_white_space(text))
            return await self._compile(LLMatcher.grammar_from_lark(text), self._marker_texts, source)
        except SchemaError as error:
            raise _refusal(what, param, error, "invalid_grammar") from error

    def warm_up(self) -> None:
        """Begin to build the tokenizers, so that the first grammar need not wait for them."""
        if self._eos_token_ids:
            for markers in {(), self._marker_texts}:
                self._build(markers)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _json(
        self, schema: Mapping[str, Any] | bool, strict: bool, what: str, param: str
    ) -> tuple[CompiledGrammar, str]:
        try:
            *tries, last = schema_texts(schema, strict=strict)
            for text in tries:
                try:
                    return await self._schema(text), text
                except SchemaError:
                    continue
            return await self._schema(last), last
        except ValueError as error:  # SchemaError, and what llguidance's reader of JSON says
            raise _refusal(what, param, error, "invalid_json_schema") from error

    async def _schema(self, text: str) -> CompiledGrammar:
        return await self._compile(
            LLMatcher.grammar_from_json_schema(text), (), GrammarSource("json", without_white_space(text))
        )

    async def _compile(self, grammar: str, markers: tuple[str, ...], source: GrammarSource | None) -> CompiledGrammar:
        """From memory, or in a thread. A thread that takes too long is left to end, and its grammar to be found."""
        tokenizer = await self._tokenizer(markers)
        key = grammar, markers
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(CompiledGrammar, tokenizer, grammar, source)
        self._compiled.move_to_end(key)
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        try:
            return await asyncio.wait_for(_result(self._compiled[key]), MAX_COMPILE_S)
        except TimeoutError as error:
            raise SchemaError(f"compiling it takes more than {MAX_COMPILE_S:g} s") from error

    async def _tokenizer(self, markers: tuple[str, ...]) -> LLTokenizer:
        if not self._eos_token_ids:
            raise SchemaError("this model has no end-of-sequence token, so no answer could end")
        return await _result(self._build(markers))

    def _build(self, markers: tuple[str, ...]) -> Future[LLTokenizer]:
        if markers not in self._tokenizers:
            self._tokenizers[markers] = self._pool.submit(
                build_tokenizer, self._vocabulary, self._eos_token_ids, self._vocab_size, markers
            )
        return self._tokenizers[markers]


def _schema_of(wanted: TextFormat) -> dict[str, Any]:
    """The arguments for `json_schema` that a text format stands for."""
    schema = ANY_OBJECT if wanted.schema is None else wanted.schema
    return {"schema": schema, "strict": wanted.strict, "what": f"the schema {wanted.name!r}", "param": wanted.param}


async def _result(future: Future) -> Any:
    """A thread's result; whoever waits for it may leave without ending it for others."""
    return future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))


def _refusal(what: str, param: str, error: Exception, code: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {what} cannot be enforced: {error}.", param=param, code=code)
