"""The ASGI application: routes, middleware, error handlers, and the engine's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from server.answers.response_store import ResponseStore
from server.api import admin, chat, completions, evidence, models, ops, page, responses, steering, tokenize
from server.api.admission import Admission
from server.api.context import REQUEST_ID_HEADER, RequestContext, error_response
from server.api.documentation import describe
from server.api.elsewhere import OPERATIONS, why_not
from server.api.engine_errors import api_error
from server.api.respond import APPLIED_HEADER, PROFILES_HEADER
from server.api.route_names import RouteNames
from server.config import ServerConfig
from server.draining import Draining
from server.engine.base import Engine, EngineError
from server.errors import ApiError, InternalError, InvalidRequestError, MethodNotAllowedError, UnknownPathError
from server.grammar.compiler import GrammarCompiler
from server.observability.account import Recorder
from server.observability.audit import AuditLog
from server.observability.metrics import Metrics
from server.observability.tracing import Tracer
from server.page.files import page_files
from server.prompting.prompter import Prompter
from server.service import Service

GZIP_FROM_BYTES = 1024
MODULES = (chat, completions, responses, models, tokenize, admin, steering, evidence, ops, page)


def create_app(
    config: ServerConfig,
    engine: Engine,
    prompter: Prompter,
    metrics: Metrics,
    *,
    audit: AuditLog | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Everything that varies is an argument. The engine starts and stops with the application's lifespan.

    Args:
        metrics: the engine's observer, not yet attached to it.
        audit, tracer: closed with the application.
    """
    modules = [module for module in MODULES if config.ui or module is not page]
    routes = RouteNames(route for module in modules for route in module.router.routes)
    metrics.attach(engine, routes.all, audit)
    if config.metrics_compat == "vllm":
        metrics.add_vllm_names()
    text_of = prompter.vocabulary.text if config.log_prompts else None
    markers = prompter.tools.format.markers if prompter.tools.format else ()
    grammars = GrammarCompiler(prompter.vocabulary, prompter.eos_token_ids, engine.info.vocab_size, markers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        grammars.warm_up()
        try:
            yield
        finally:
            await engine.stop()
            prompter.close()
            grammars.close()
            for sink in (audit, tracer):
                if sink is not None:
                    await asyncio.to_thread(sink.close)

    app = FastAPI(
        title="FineSteer server",
        description="OpenAI-compatible inference that steers per query and says what it did.",
        version=version("finesteer-server"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service = Service(
        config,
        engine,
        prompter,
        metrics,
        grammars,
        responses=ResponseStore(max_bytes=config.responses_memory),
        audit=audit,
    )
    if config.ui:
        app.state.page_files = page_files()
    for module in modules:
        app.include_router(module.router)
    describe(app)
    _add_middleware(app, config, service.draining, routes, Recorder(metrics, audit, tracer, text_of))
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(EngineError, _on_engine_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_defect)
    return app


def _add_middleware(
    app: FastAPI, config: ServerConfig, draining: Draining, routes: RouteNames, recorder: Recorder
) -> None:
    """From the inside out: compression of whole answers, refusal of all once the server drains, id and key and log, CORS,
    whose preflights carry no key."""
    app.add_middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES, compresslevel=6)  # leaves event streams alone
    app.add_middleware(Admission, draining=draining)
    app.add_middleware(RequestContext, access=config.access, routes=routes, recorder=recorder)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, APPLIED_HEADER, PROFILES_HEADER),
        )


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_engine_error(request: Request, error: EngineError) -> Response:
    return error_response(api_error(error))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """The framework's own: unknown paths and methods."""
    path = request.url.path
    where = f"{request.method} {path}"
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            reason = why_not(path)
            said = "no such path" if reason is None else f"not an endpoint of this server: {reason}"
            answer: ApiError = UnknownPathError(f"{where}: {said}. /docs lists what there is.")
        case 405 if path in OPERATIONS:  # a name that a route takes for an id
            answer = UnknownPathError(
                f"{where}: not an endpoint of this server: {why_not(path)}. /docs lists what there is."
            )
        case 405:
            headers["Allow"] = _methods(request)
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            answer = MethodNotAllowedError(f"{where}: not allowed here; use {headers['Allow']}.")
        case _:
            answer = InvalidRequestError(f"{where}: {error.detail}")
            answer.status = error.status_code
    response = error_response(answer)
    response.headers.update(headers)
    return response


def _methods(request: Request) -> str:
    """What may be done with a path, all its routes together (the framework names the first one's methods only). Routes of just
    this path come before those that take a part of it for a name."""
    routes = [*request.app.routes, *(route for module in MODULES for route in module.router.routes)]
    matching = [r for r in routes if getattr(r, "methods", None) and r.matches(request.scope)[0] is not Match.NONE]
    own = [route for route in matching if getattr(route, "path", None) == request.url.path]
    methods = {"OPTIONS"}.union(*(getattr(route, "methods", ()) for route in own or matching))
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this; 499 is what the log line shows."""
    return Response(status_code=499)


async def _on_defect(request: Request, error: Exception) -> Response:
    """A defect of ours: the log has the traceback, the client has the id to ask about it."""
    request_id = getattr(request.state, "request_id", "unknown")
    response = error_response(InternalError(f"The server made a mistake. Ask its operator about request {request_id}."))
    response.headers[REQUEST_ID_HEADER] = request_id
    return response
