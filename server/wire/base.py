"""What all wire models share: strict types, nothing unknown, nothing infinite; and the refusals of what is not built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's that this server does not act on. Its `neutral` values ask for nothing and are let pass."""

    remedy: str
    neutral: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether `value` asks for nothing: null, or equal in value and type to a neutral one."""
        return value is None or any(type(value) is type(n) and value == n for n in self.neutral)


def _refused(schema: dict[str, Any], model: type[RequestModel]) -> None:
    """Write the unsupported fields, with the values that are let pass, into a request's JSON schema."""
    for name, refusal in model.unsupported.items():
        said = {"enum": [None, *refusal.neutral], "description": f"Not supported. {refusal.remedy}"}
        schema.setdefault("properties", {})[name] = said


class RequestModel(BaseModel):
    """A request body. `unsupported` lists fields by name; `parsing.parse_body` refuses them by their own message.

    `no_ops` are fields that are read, checked, and have no effect here, by design.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, json_schema_extra=_refused)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    no_ops: ClassVar[frozenset[str]] = frozenset()


class ResponseModel(BaseModel):
    """A response body; what was not set is not sent, what was set to None is sent as null."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> str:
        """Compact JSON text."""
        return self.model_dump_json(exclude_unset=True)


def _no_default(schema: dict[str, Any]) -> None:
    del schema["default"]


def absent() -> Any:
    """The default of an answer's field that is left out, and never null, where there is nothing to say."""
    return Field(default=None, json_schema_extra=_no_default)


def inconsistent(field: str, sentence: str) -> PydanticCustomError:
    """The error of a model validator, laid at the door of one field of that model."""
    return PydanticCustomError("inconsistent", sentence, {"field": field})  # type: ignore[arg-type]


def unsupported(field: str, sentence: str) -> PydanticCustomError:
    """As `inconsistent`, for a value that OpenAI knows and this server does not act on."""
    return PydanticCustomError("unsupported", sentence, {"field": field})  # type: ignore[arg-type]
