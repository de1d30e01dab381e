"""From a growing list of tokens to a growing text, one completion at a time. Pure but for the vocabulary it is given."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from server.prompting.stop_strings import StopMatcher

Note = TypeVar("Note")


class TokenBytes(Protocol):
    """`Vocabulary`, as far as it is needed here."""

    def text_bytes(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """Text of tokens as they come. A character whose bytes are spread over tokens appears with its last byte.

    The pieces together are exactly the UTF-8 text of all bytes, what is not UTF-8 replaced by U+FFFD.
    """

    def __init__(self, vocabulary: TokenBytes) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._vocabulary.text_bytes(token_id))

    def flush(self) -> str:
        """The tokens ended: what remains of an unfinished character."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Piece(Generic[Note]):
    """What may be shown after a token: text, and the notes of tokens whose text is now out. `stopped`: by a stop string."""

    text: str
    notes: tuple[tuple[int, Note], ...] = ()
    stopped: bool = False


class TextStream(Generic[Note]):
    """Detokenizer and stop strings of one completion, with a note (log-probabilities, say) carried by each token.

    A note comes out with its token's text, together with the offset in the text at which that token began; the notes of
    tokens that lie wholly behind a stop string never do.
    """

    def __init__(self, vocabulary: TokenBytes, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        """Stop strings are looked for from token `min_tokens` on."""
        self._detokenizer = IncrementalDetokenizer(vocabulary)
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._made = self._shown = 0  # characters decoded, characters shown
        self._notes: deque[tuple[int, int, Note]] = deque()  # begins at, ends at, note

    def push(self, token_id: int, note: Note | None = None, *, hidden: bool = False, last: bool = False) -> Piece[Note]:
        """Add a token. `hidden` does not show its text (an end-of-sequence token); `last` ends the text."""
        self._num_tokens += 1
        start = self._made
        decoded = "" if hidden else self._detokenizer.push(token_id)
        if last:
            decoded += self._detokenizer.flush()
        self._made += len(decoded)
        if note is not None:
            self._notes.append((start, self._made, note))
        if self._num_tokens < self._min_tokens:
            return self._piece(decoded, last=last)
        shown = self._matcher.push(decoded)
        if shown.matched is not None:
            return self._piece(shown.text, stopped=True)
        return self._piece(shown.text + (self._matcher.flush() if last else ""), last=last)

    def _piece(self, text: str, *, last: bool = False, stopped: bool = False) -> Piece[Note]:
        self._shown += len(text)
        notes = []
        while self._notes:
            start, end, note = self._notes[0]
            if not (last or end <= self._shown or (stopped and start < self._shown)):
                break
            self._notes.popleft()
            notes.append((start, note))
        return Piece(text, tuple(notes), stopped)
