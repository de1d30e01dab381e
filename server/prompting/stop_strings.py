"""Stop strings as a pure state machine: text goes in piece by piece, what is safe to show comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """`text` may be shown now; `matched` is the stop string that ended the text, which is never shown."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the first of several stop strings in a growing text, however it is cut into pieces.

    Holds back the longest end of the text that might still grow into a stop string. The string that is complete first
    wins, the longer one where two end together: the result does not depend on how the text was cut. After a match, or
    `flush`, the matcher is spent.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> Shown:
        """Add `piece`; returns what has become safe to show."""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return Shown(text[:at], stop)
        shown = len(text) - self._longest_beginning(text)
        self._held = text[shown:]
        return Shown(text[:shown])

    def flush(self) -> str:
        """The text ended: what was held back is shown after all."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
