"""What the server may answer instead of a result. Each exception knows its HTTP status and OpenAI's four error fields.

No torch and no FastAPI here: routes, resolvers and parsers raise these, one handler in `app.py` turns them into JSON.
"""

from __future__ import annotations

import json
import math


class ApiError(Exception):
    """Root. `message` says what is wrong and what to do; `param` names the field or header at fault; `code` is stable."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: float | None = None
    closes = False  # whether the connection ends with it

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code

    def body(self) -> dict:
        """OpenAI's `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """`body` as UTF-8 JSON."""
        return json.dumps(self.body(), ensure_ascii=False).encode()


class InvalidRequestError(ApiError):
    """The request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"


class AuthenticationError(InvalidRequestError):
    """No API key, or another one."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(InvalidRequestError):
    """The operator's policy does not let a client ask for this."""

    status = 403


class NotFoundError(InvalidRequestError):
    """No such model, profile or path."""

    status = 404
    code = "not_found"


class UnknownPathError(NotFoundError):
    """Nothing of that name here, whatever the method."""

    code = "unknown_url"


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_supported"


class SlowUploadError(InvalidRequestError):
    """The body did not come in time."""

    status = 408
    code = "upload_timeout"
    closes = True  # the rest of the body may still be on its way


class RequestTooLargeError(InvalidRequestError):
    """The body is larger than any prompt could be."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is something else than JSON, by its own headers."""

    status = 415
    code = "unsupported_content_type"


class RateLimitError(ApiError):
    """This key has asked for as much as it may for now."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message} Try again in {math.ceil(retry_after_s)} s.")
        self.retry_after_s = retry_after_s


class OverloadedError(ApiError):
    """The waiting queue is full; a later try may succeed."""

    status = 503
    code = "overloaded"
    retry_after_s = 1.0


class EngineUnavailableError(ApiError):
    """The engine has failed or is not ready."""

    status = 503
    code = "engine_unavailable"
    retry_after_s = 1.0


class ShuttingDownError(EngineUnavailableError):
    """The server is about to end; another one, or this one started again, may answer."""

    code = "shutting_down"
    closes = True


class DeadlineError(ApiError):
    """The answer was not done in the time that the operator allows."""

    status = 504
    code = "request_timeout"


class AuditUnavailableError(ApiError):
    """Answers must be audited, and cannot be for now."""

    status = 503
    code = "audit_log_unavailable"
    retry_after_s = 10.0


class InternalError(ApiError):
    """A defect of ours, or a generation that failed alone."""

    status = 500
    code = "internal_error"
