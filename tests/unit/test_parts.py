"""Parts of a completion: which tokens' notes go with its text."""

from __future__ import annotations

from server.answers.generation import TextDelta, TokenNote
from server.answers.parts import CallArguments, CallBegins, End, Text, _Reader
from server.engine.base import TokenLogprobs
from server.tools.parsers import HermesParser

PIECES = ["Look", ":", "\n<tool_call>", '{"name": "f", "arg', 'uments": {"a"', ": 1}}", "</tool_call>", "Done", "."]


def test_notes_go_with_text_once_and_those_of_calls_nowhere():
    reader = _Reader(2, HermesParser({"f"}), lambda: "call_1", "tool_calls")
    parts = []
    for i, piece in enumerate(PIECES):
        note = TokenNote(i, TokenLogprobs(-float(i)), 0)
        parts += reader.read(TextDelta(2, piece, (note,), "stop" if i == len(PIECES) - 1 else None))
    assert [type(part) for part in parts if isinstance(part, CallBegins | End)] == [CallBegins, End]
    assert "".join(part.text for part in parts if isinstance(part, CallArguments)) == '{"a": 1}'
    texts = [part for part in parts if isinstance(part, Text)]
    assert "".join(part.text for part in texts) == "Look:Done."
    noted = [note.token_id for part in texts for note in part.notes]
    assert noted[:2] == [0, 1] and noted[-2:] == [7, 8]
    assert not {3, 4, 5} & set(noted) and len(set(noted)) == len(noted)
    assert (parts[-1].index, parts[-1].finish_reason) == (2, "tool_calls")
