"""From token ids to the bytes they stand for. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from server.prompting.detokenizer import TokenBytes
from steering.errors import ModelError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """The byte-level BPE alphabet: each byte's printable stand-in → the byte.

    Printable Latin-1 stands for itself; the other 68 bytes are moved, in order, to U+0100 and up (GPT-2's table).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


class Vocabulary:
    """The bytes of each token, special tokens aside.

    Works for byte-level BPE (GPT-2, Llama 3, Qwen, …) and for `▁` with byte fallback (Llama 2, Mistral, Gemma). Unlike
    `tokenizer.decode`, it keeps the space before a completion's first word: a completion goes on where its prompt ended.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer backed by the tokenizers library. Raises ModelError for other kinds."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer. Serve a model whose folder holds tokenizer.json."
            )
        decoders = _types(json.loads(backend.to_str()).get("decoder"))
        if "ByteLevel" in decoders:
            self._byte_level = True
        elif {"ByteFallback", "Metaspace"} & decoders:
            self._byte_level = False
        else:
            raise ModelError(
                f"tokenizer.json: decoder {sorted(decoders) or 'null'} cannot be streamed; "
                "byte-level BPE, and pieces with byte fallback, can."
            )
        self.backend = backend
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._tokenizer)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens in it; bytes that are not UTF-8 replaced."""
        return b"".join(map(self.raw_bytes, token_ids)).decode("utf-8", "replace")

    def text_bytes(self, token_id: int) -> bytes:
        """What the token adds to the answer's text: nothing for special tokens and for ids that name no token."""
        return b"" if token_id in self.special_ids else self.raw_bytes(token_id)

    def showing(self, texts: Collection[str]) -> TokenBytes:
        """The same, special tokens with one of these texts shown: markers of tool calls, say."""
        wanted = {text.encode() for text in texts}
        return _Showing(self, frozenset(i for i in self.special_ids if self.raw_bytes(i) in wanted))

    def raw_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, of special tokens too (log-probabilities name them)."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._look_up(token_id)
        return self._bytes[token_id]

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._byte_level:
            table = byte_of_char()
            return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.replace(SPACE_MARK, " ").encode()


class _Showing:
    def __init__(self, vocabulary: Vocabulary, shown_ids: frozenset[int]) -> None:
        self._vocabulary, self._shown_ids = vocabulary, shown_ids

    def text_bytes(self, token_id: int) -> bytes:
        vocabulary = self._vocabulary
        return vocabulary.raw_bytes(token_id) if token_id in self._shown_ids else vocabulary.text_bytes(token_id)


def _types(decoder: dict | None) -> set[str]:
    """The types of a decoder and of those that a sequence of decoders holds."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(inner) for inner in decoder.get("decoders", ())))
