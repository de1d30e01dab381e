"""A prompt given back before its completion: its text, and where in it each token begins."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from server.prompting.vocabulary import Vocabulary


@dataclass(frozen=True)
class Echo:
    """`offsets`: for each of the prompt's tokens the character of `text` at which it begins; they never fall."""

    text: str
    offsets: tuple[int, ...]


def echo_of(prompt: str | Sequence[int], token_ids: Sequence[int], vocabulary: Vocabulary) -> Echo:
    """The echo of a prompt as it was sent: text comes back as it is, token ids as the text of their bytes.

    A token is looked for where the one before it ended. One that is not there, since the tokenizer added it (a
    beginning-of-sequence token), has no length; where the tokenizer has changed the text (its case, say), as many bytes are
    passed as the token has, so offsets there are near, not exact.
    """
    pieces = [vocabulary.raw_bytes(token_id) for token_id in token_ids]
    raw = prompt.encode() if isinstance(prompt, str) else b"".join(pieces)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[int] = []
    texts: list[str] = []
    length = at = 0  # characters, bytes
    for token_id, piece in zip(token_ids, pieces, strict=True):
        offsets.append(length)
        bare = piece.lstrip(b" ")  # a tokenizer may put a space before the first word
        if raw.startswith(piece, at):
            size = len(piece)
        elif raw.startswith(bare, at):
            size = len(bare)
        else:
            size = 0 if token_id in vocabulary.special_ids else len(piece)
        texts.append(decoder.decode(raw[at : at + size]))
        length, at = length + len(texts[-1]), at + size
    texts.append(decoder.decode(raw[at:], final=True))
    return Echo("".join(texts), tuple(offsets))
