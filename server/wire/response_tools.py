"""`tools` and `tool_choice` of a Responses request. Functions only; OpenAI's other tools are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from server.tools.base import Tool, ToolUse
from server.wire.base import RequestModel, unsupported
from server.wire.parsing import shown
from server.wire.tools import MAX_TOOLS, NO_PARAMETERS, FunctionName, Mode, check_tools, tool_use


def _function(tool: Any) -> Any:
    if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
        raise unsupported("type", f"{shown(kind)} tools are not built here; send functions only")
    return tool


class FunctionTool(RequestModel):
    """A function that the model may call; no `parameters` means that it takes none."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    output_schema: None = None

    def tool(self) -> Tool:
        """For the server."""
        return Tool(self.name, self.description, self.parameters or NO_PARAMETERS, bool(self.strict))

    def shown(self) -> dict[str, Any]:
        """As the response repeats it."""
        shown_ = self.model_dump(include={"type", "name", "description", "parameters"})
        return shown_ | {"strict": bool(self.strict)}


class NamedFunction(RequestModel):
    """`{"type": "function", "name": …}`."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(RequestModel):
    """The model is told of all tools, and may call these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedFunction, BeforeValidator(_function)]], Field(min_length=1, max_length=MAX_TOOLS)
    ]


def _chosen(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        raise unsupported("type", f"{shown(kind)} is not built here; choose a function")
    return choice


def _tag(choice: Any) -> str | None:
    """The union's member; in angle brackets, which keep it out of the path that a message names."""
    if isinstance(choice, str):
        return "<mode>"
    return f"<{choice.get('type')}>" if isinstance(choice, dict) else None


ToolChoice = Annotated[
    Annotated[Mode, Tag("<mode>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(
        _tag,
        custom_error_type="choice",
        custom_error_message="must be none, auto, required, or an object whose type is 'function' or 'allowed_tools'",
    ),
    BeforeValidator(_chosen),
]


class ResponseToolFields(RequestModel):
    """The tool fields of a Responses request."""

    tools: Annotated[list[Annotated[FunctionTool, BeforeValidator(_function)]], Field(max_length=MAX_TOOLS)] | None = (
        None
    )
    tool_choice: ToolChoice | None = Field(
        None, description="`none`, `auto`, `required`, a function by its name, or `allowed_tools`"
    )
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ResponseToolFields:
        mode, named = self._choice()
        check_tools([tool.name for tool in self.tools or ()], named, mode)
        return self

    def _choice(self) -> tuple[Mode, list[str] | None]:
        match self.tool_choice:
            case NamedFunction(name=name):
                return "required", [name]
            case AllowedTools(mode=mode, tools=tools):
                return mode, [tool.name for tool in tools]
            case str() as mode:
                return mode, None
        return "auto", None

    def tool_use(self) -> ToolUse | None:
        """What the model may call; a function that is named is called once."""
        mode, named = self._choice()
        parallel = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedFunction)
        return tool_use(
            [tool.tool() for tool in self.tools or ()], mode, named, parallel, schema_param="tools[{}].parameters"
        )

    def shown_choice(self) -> str | dict[str, Any]:
        """`tool_choice` as the response repeats it."""
        match self.tool_choice:
            case None:
                return "auto"
            case str() as mode:
                return mode
            case choice:
                return choice.model_dump()
