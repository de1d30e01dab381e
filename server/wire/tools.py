"""Tools on the wire of chat completions: definitions, choices, calls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.tools.base import Tool, ToolUse
from server.wire.base import RequestModel, ResponseModel, absent, inconsistent

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
NO_PARAMETERS = {"type": "object", "properties": {}}


class FunctionDefinition(RequestModel):
    """A function; no `parameters` means that it takes none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """For the server."""
        return Tool(self.name, self.description, self.parameters or NO_PARAMETERS, bool(self.strict))


class FunctionTool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(RequestModel):
    name: FunctionName


class NamedFunction(RequestModel):
    """`{"type": "function", "function": {"name": …}}`."""

    type: Literal["function"]
    function: FunctionReference


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(RequestModel):
    """`{"type": "allowed_tools", "allowed_tools": {…}}`: the model is told of all tools, and may call these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Mode = Literal["none", "auto", "required"]
ToolChoice = Mode | Annotated[NamedFunction | AllowedToolsChoice, Field(discriminator="type")]


def tool_use(
    tools: Sequence[Tool],
    choice: Mode,
    named: Sequence[str] | None,
    parallel: bool,
    schema_param: str = ToolUse.schema_param,
) -> ToolUse | None:
    """What the server makes of tools and choice; `named`: the callable ones, None for all. None: no tools at hand."""
    if not tools or choice == "none":
        return None
    callable_names = frozenset(tool.name for tool in tools) if named is None else frozenset(named)
    return ToolUse(tuple(tools), choice, callable_names, parallel, schema_param=schema_param)


def check_tools(names: Sequence[str], named: Sequence[str] | None, choice: Mode) -> None:
    """Raise a validation error at `tools` or `tool_choice` where they do not fit together."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise inconsistent("tools", f"the name {json.dumps(twice[0])} is given to two of them")
    if not names and (named is not None or choice == "required"):
        raise inconsistent("tool_choice", "needs tools")
    for name in named or ():
        if name not in names:
            raise inconsistent("tool_choice", f"no tool is called {json.dumps(name)}")


class ToolFields(RequestModel):
    """The tool fields of a chat request."""

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ToolFields:
        mode, named = self._choice()
        check_tools([tool.function.name for tool in self.tools or ()], named, mode)
        return self

    def _choice(self) -> tuple[Mode, list[str] | None]:
        match self.tool_choice:
            case NamedFunction(function=function):
                return "required", [function.name]
            case AllowedToolsChoice(allowed_tools=allowed):
                return allowed.mode, [tool.function.name for tool in allowed.tools]
            case str() as mode:
                return mode, None
        return "auto", None

    def tool_use(self) -> ToolUse | None:
        """What the model may call; a function that is named is called once."""
        mode, named = self._choice()
        parallel = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedFunction)
        use = tool_use([tool.function.tool() for tool in self.tools or ()], mode, named, parallel)
        return replace(use, named=True) if use and isinstance(self.tool_choice, NamedFunction) else use


class CalledFunction(RequestModel):
    """`parsed_arguments`: what the official clients' helpers add, and send back; the text is what counts."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class PastToolCall(RequestModel):
    """A call that the assistant made earlier, as it comes back with the conversation. `index`: its place in a stream."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> PastToolCall:
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise inconsistent("function.arguments", "must hold a JSON object")
        return self

    def for_template(self) -> dict[str, Any]:
        """Templates want the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": "function", "function": function}


class Called(ResponseModel):
    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A call in a whole answer."""

    id: str
    type: Literal["function"]
    function: Called


class CalledDelta(ResponseModel):
    name: str = absent()
    arguments: str


class CallDelta(ResponseModel):
    """A call in a stream: id, type and name come once, then arguments."""

    index: int
    id: str = absent()
    type: Literal["function"] = absent()
    function: CalledDelta
