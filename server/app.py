"""The ASGI application: routes, middleware, error handlers, and the engine's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api import chat, completions, models, ops, steering, tokenize
from server.api.context import REQUEST_ID_HEADER, RequestContext, error_response
from server.api.engine_errors import api_error
from server.config import ServerConfig
from server.engine.base import Engine, EngineError
from server.errors import ApiError, InternalError, InvalidRequestError, MethodNotAllowedError, NotFoundError
from server.grammar.compiler import GrammarCompiler
from server.observability.metrics import Metrics
from server.prompting.prompter import Prompter
from server.service import Service


def create_app(config: ServerConfig, engine: Engine, prompter: Prompter, metrics: Metrics) -> FastAPI:
    """Everything that varies is an argument. The engine starts and stops with the application's lifespan.

    Args:
        metrics: the engine's observer, not yet attached to it.
    """
    metrics.attach(engine)
    markers = prompter.tools.format.markers if prompter.tools.format else ()
    grammars = GrammarCompiler(prompter.vocabulary, prompter.eos_token_ids, engine.info.vocab_size, markers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            prompter.close()
            grammars.close()

    app = FastAPI(
        title="FineSteer server",
        description="OpenAI-compatible inference that steers per query and says what it did.",
        version=version("finesteer-server"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = Service(config, engine, prompter, metrics, grammars)
    for module in (chat, completions, models, tokenize, steering, ops):
        app.include_router(module.router)
    app.add_middleware(RequestContext, api_key=config.api_key)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(EngineError, _on_engine_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_defect)
    return app


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_engine_error(request: Request, error: EngineError) -> Response:
    return error_response(api_error(error))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """The framework's own: unknown paths and methods."""
    where = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            answer: ApiError = NotFoundError(f"{where}: no such path. /docs lists what there is.")
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            answer = MethodNotAllowedError(f"{where}: not allowed here; use {allowed}.")
        case _:
            answer = InvalidRequestError(f"{where}: {error.detail}")
            answer.status = error.status_code
    response = error_response(answer)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this; 499 is what the log line shows."""
    return Response(status_code=499)


async def _on_defect(request: Request, error: Exception) -> Response:
    """A defect of ours: the log has the traceback, the client has the id to ask about it."""
    request_id = getattr(request.state, "request_id", "unknown")
    response = error_response(InternalError(f"The server made a mistake. Ask its operator about request {request_id}."))
    response.headers[REQUEST_ID_HEADER] = request_id
    return response
