"""Tools as the server knows them, whichever API they came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters`: a JSON schema; `strict`: arguments must follow it, come what may."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def as_json(self) -> dict[str, Any]:
        """As chat templates read it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request and what the model must do with them.

    Attributes:
        tools: those that the model is told of.
        choice: whether it may call, or must.
        callable: the names that it may call; one of them for a named choice.
        parallel: whether it may call more than once in an answer.
        named: whether the client named the function to call.
        schema_param: the request's field that holds the schema of tool number {}, for messages.
    """

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required"]
    callable: frozenset[str]
    parallel: bool = True
    named: bool = False
    schema_param: str = "tools[{}].function.parameters"
