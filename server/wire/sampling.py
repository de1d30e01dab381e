"""The sampling fields that chat and text completions share, and their translation for the engine."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.wire.base import RequestModel, inconsistent
from server.wire.parsing import shown
from server.wire.steering import SteeringFields

MAX_STOP_STRINGS = 4
TokenId = Annotated[int, Field(ge=0)]


def _stop(value: Any) -> Any:
    """One string, or up to four; none of them empty. Always a tuple afterwards."""
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", f"must be a string or a list of strings, not {shown(value)}")
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", f"must hold at most {MAX_STOP_STRINGS} strings, not {len(stops)}")
    if "" in stops:
        raise PydanticCustomError("stop", "must not hold an empty string")
    return tuple(stops)


def _logit_bias(value: Any) -> Any:
    """`{"token id": bias}` with biases in [-100, 100]; keys are strings in JSON and token ids afterwards."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", f"must be an object {{token id: bias}}, not {shown(value)}")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 9:
            raise PydanticCustomError("logit_bias", f"key {shown(key)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


StopStrings = Annotated[
    Any,
    BeforeValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[
    Any,
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


class StreamOptions(RequestModel):
    """`stream_options`. Obfuscation pads chunks against traffic analysis; we do not, so it can only be declined."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(SteeringFields):
    """Sampling, stopping and streaming; OpenAI's fields first, then those that open servers share (vLLM's names)."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopStrings = Field(default=(), validate_default=True)
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    no_ops: ClassVar[frozenset[str]] = frozenset({"user", "metadata"})

    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise inconsistent("stream_options", "is read only with stream true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
