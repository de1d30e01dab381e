"""A model's tokens as the grammar engine must see them: their bytes, and how text is cut into them."""

from __future__ import annotations

import json
from collections.abc import Collection

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from server.prompting.vocabulary import Vocabulary

SENTINEL = (
    "\x02"  # takes the "▁" that SentencePiece tokenizers put before a text, so that what follows is a continuation
)


def build_tokenizer(
    vocabulary: Vocabulary, eos_token_ids: Collection[int], vocab_size: int, marker_texts: Collection[str] = ()
) -> LLTokenizer:
    """The grammar engine's tokenizer; up to a second for 130,000 tokens.

    Args:
        eos_token_ids: at least one; allowed where a grammar may end.
        vocab_size: the model's, which may be padded: ids that name no token are never allowed.
        marker_texts: special tokens that a grammar may spell as plain text. No other special token is ever allowed.
    """
    return LLTokenizer(
        TokenizerWrapper(_Tokens(vocabulary, eos_token_ids, vocab_size, marker_texts)), eos_token=sorted(eos_token_ids)
    )


def markers_among(vocabulary: Vocabulary, marker_texts: Collection[str]) -> frozenset[int]:
    """The ids of special tokens whose text is one of `marker_texts`."""
    wanted = {text.encode() for text in marker_texts}
    return frozenset(i for i in vocabulary.special_ids if vocabulary.raw_bytes(i) in wanted)


class _Tokens:
    """What `TokenizerWrapper` asks for: attributes by these names, and text or bytes → ids by a call."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos_token_ids: Collection[int],
        vocab_size: int,
        marker_texts: Collection[str],
    ) -> None:
        special = vocabulary.special_ids - markers_among(vocabulary, marker_texts)
        self.eos_token_id = min(eos_token_ids)
        self.bos_token_id = None
        self.special_token_ids = sorted(i for i in special | set(eos_token_ids) if i < vocab_size)
        self.tokens = [vocabulary.raw_bytes(i) for i in range(vocab_size)]
        self._id_of = {token: i for i, token in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self.tokens))
        self._backend = _plain_copy(vocabulary.backend, special)
        self._sentinel = self._encode(SENTINEL)

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that goes on, as the model's tokenizer cuts it; by longest tokens where that would alter the text."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._encode(SENTINEL + raw.decode("utf-8", "replace"))
        head, ids = ids[: len(self._sentinel)], ids[len(self._sentinel) :]
        if head == self._sentinel and self._spelt(ids) == raw:
            return ids
        return self._longest_tokens(raw)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _spelt(self, ids: list[int]) -> bytes | None:
        known = all(i < len(self.tokens) for i in ids)
        return b"".join(self.tokens[i] for i in ids) if known else None

    def _longest_tokens(self, raw: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(raw):
            for end in range(min(len(raw), at + self._longest), at, -1):
                if (found := self._id_of.get(raw[at:end])) is not None:
                    ids.append(found)
                    at = end
                    break
            else:
                return ids  # a byte that no token holds: the model cannot write it
        return ids


def _plain_copy(backend: Tokenizer, special_ids: Collection[int]) -> Tokenizer:
    """A tokenizer of our own, which another thread's settings do not reach; it reads special tokens' texts as plain text."""
    spec = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    for token in spec.get("added_tokens") or ():
        token["special"] = token["id"] in special_ids
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy
