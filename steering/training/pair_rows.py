"""A row of preference: the two forms that it may have, as a query and its two answers. No torch.

Ours: `query`, `preferred`, `undesired`. The published one: `chosen`, `rejected`, two conversations that differ in their last
message only, the assistant's; or those two as bare answers, and `prompt`. A query or prompt is a string or a list of messages;
an answer is a string, or a list of one message, the assistant's.
"""

from __future__ import annotations

from typing import Any

from steering.errors import TrainingDataError
from steering.training.rows import OPTIONAL, Query, asks, messages_field, query_field, text_field

OURS, PUBLISHED = ("query", "preferred", "undesired"), ("prompt", "chosen", "rejected")
PAIR_COLUMNS = {*OURS, *PUBLISHED, *OPTIONAL}


def preference(row: dict[str, Any], where: str) -> tuple[Query, str, str]:
    """The row's query, its preferred answer and its undesired one. Raises TrainingDataError."""
    ours, published = ([key for key in form if key in row] for form in (OURS, PUBLISHED))
    if ours and published:
        raise TrainingDataError(
            f"{where}: fields {ours[0]!r} and {published[0]!r} are of two forms of row. Use {', '.join(OURS)}; or chosen and "
            "rejected, with or without prompt."
        )
    ask, good, bad = PUBLISHED if published else OURS
    if published and ask not in row:
        query, preferred, undesired = _conversations(row, where)
    else:
        query = query_field(row, where, ask)
        preferred, undesired = _answer(row, good, where), _answer(row, bad, where)
    if preferred.strip() == undesired.strip():
        raise TrainingDataError(
            f"{where}: {good!r} and {bad!r} are the same answer, so there is no shift to learn. "
            "Change one of them or remove the row."
        )
    return query, preferred, undesired


def _answer(row: dict, key: str, where: str) -> str:
    """A string, or the content of the one message of a list."""
    if not isinstance(row.get(key), list):
        return text_field(row, key, where)
    messages = messages_field(row, key, where)
    if len(messages) != 1 or messages[0][0] != "assistant" or not messages[0][1].strip():
        hint = " Remove 'prompt' where 'chosen' and 'rejected' hold the whole conversation." if "prompt" in row else ""
        raise TrainingDataError(
            f"{where}: field {key!r} must be a string, or a list of just one message, the assistant's, not empty.{hint}"
        )
    return messages[0][1]


def _conversations(row: dict, where: str) -> tuple[Query, str, str]:
    """Two conversations that are the same but for the last message."""
    answers, before = [], []
    for key in PUBLISHED[1:]:
        if key not in row:
            raise TrainingDataError(f"{where}: field {key!r} is missing. Add it or remove the row.")
        if not isinstance(row[key], list):
            raise TrainingDataError(
                f"{where}: field {key!r} must be a list of messages, unless the row has a 'prompt'. Add that, or the messages."
            )
        messages = messages_field(row, key, where)
        if not messages or messages[-1][0] != "assistant" or not messages[-1][1].strip():
            raise TrainingDataError(f"{where}: field {key!r} must end with an assistant's message that is not empty.")
        if not asks(messages[:-1]):
            raise TrainingDataError(
                f"{where}: field {key!r} must have a message that asks something (role user or tool, not empty) before its last."
            )
        answers.append(messages[-1][1])
        before.append(messages[:-1])
    if before[0] != before[1]:
        raise TrainingDataError(
            f"{where}: fields 'chosen' and 'rejected' differ before their last message. Make those equal or remove the row."
        )
    return Query(before[0], where), answers[0], answers[1]
