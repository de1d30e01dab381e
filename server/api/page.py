"""`/`: the page that shows steering happen, and its files. It asks for no key; what it calls does."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.errors import UnknownPathError
from server.page.files import INDEX

router = APIRouter(include_in_schema=False)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for anew each time, and answered 304 while it is the same
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, INDEX)


@router.get("/page/{file}")
async def file(request: Request, file: str) -> Response:
    """What the page is made of."""
    if file == INDEX or file not in request.app.state.page_files:  # the page's addresses are relative to `/`
        raise UnknownPathError(f"GET {request.url.path}: no such path. The page is at the server's root.")
    return _answer(request, file)


def _answer(request: Request, name: str) -> Response:
    found = request.app.state.page_files[name]
    headers = HEADERS | {"ETag": found.etag}
    if found.unchanged(request.headers.get("If-None-Match", "")):
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)
