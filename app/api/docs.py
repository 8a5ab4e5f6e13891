"""The pages for people: `/docs` (Swagger UI, from a pip package: no other host is asked), `/openapi.json`, `/`."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from app import __version__

_HERE = Path(__file__).parent
# Swagger UI styles its elements inline and draws its icons from data URIs; scripts come from here alone.
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def mount_docs(app: FastAPI) -> None:
    """Add `/docs`, `/docs/static/...`, `/openapi.json` and `/`, with what the package ships: no engine is needed."""
    # Our own page first, then the `resources` folder of fastapi-swagger, which holds Swagger UI's files.
    static = StaticFiles(directory=_HERE / "static", packages=[("fastapi_swagger", "resources")])
    app.router.routes += [
        Route("/", _root, name="root"),
        Route("/docs", _page, name="docs"),
        Mount("/docs/static", static, name="docs-static"),
        Route("/openapi.json", _openapi, name="openapi"),
    ]


async def _root(request: Request) -> Response:
    """A person is led to the docs, a program is told where things are."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("docs")
    told = {"name": "refrain", "version": __version__, "docs": "/docs", "openapi": "/openapi.json"}
    return JSONResponse({**told, "models": "/v1/models", "ready": "/readyz"}, headers={"vary": "accept"})


async def _page(_: Request) -> Response:
    return FileResponse(_HERE / "static" / "docs.html", headers=_PAGE_HEADERS)


async def _openapi(request: Request) -> Response:
    plain, packed = _document()
    headers = {"vary": "accept-encoding", "cache-control": "no-cache"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(packed, media_type="application/json", headers={**headers, "content-encoding": "gzip"})
    return Response(plain, media_type="application/json", headers=headers)


@cache
def _document() -> tuple[bytes, bytes]:
    """`openapi.json` without its white space, plain and packed: 0.4 MB and a tenth of that."""
    parsed = json.loads((_HERE / "openapi.json").read_bytes())
    plain = json.dumps(parsed, ensure_ascii=False, separators=(",", ":")).encode()
    return plain, gzip.compress(plain, mtime=0)
