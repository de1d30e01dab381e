"""What an engine's exception becomes on the wire."""

from __future__ import annotations

from server.engine.base import (
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineStoppedError,
    GenerationError,
    PromptTooLongError,
    UnsupportedRequestError,
)
from server.errors import (
    ApiError,
    DeadlineError,
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
)


def api_error(error: EngineError) -> ApiError:
    """The answer that a client gets for it."""
    message = str(error)
    message = message[:1].upper() + message[1:].rstrip(".") + "."
    match error:
        case PromptTooLongError():
            return InvalidRequestError(message, code="context_length_exceeded")
        case UnsupportedRequestError():
            return InvalidRequestError(message, code="unsupported_by_engine")
        case EngineOverloadedError():
            return OverloadedError(message)
        case DeadlineExceededError():
            return DeadlineError(message)
        case EngineStoppedError():
            return ShuttingDownError(message)
        case EngineDeadError():
            return EngineUnavailableError(message)
        case GenerationError(code=code):
            return InternalError(message, code=code)
        case _:
            return InternalError(message)
