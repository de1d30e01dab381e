"""The body of every answer that is an error, as the API's description has it; `server.errors` writes it."""

from __future__ import annotations

from server.wire.base import ResponseModel


class ErrorDetail(ResponseModel):
    """What is wrong and what to do; `param` names the field at fault; `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseModel):
    """OpenAI's shape of an error. In a stream it is an event, and the last one."""

    error: ErrorDetail
