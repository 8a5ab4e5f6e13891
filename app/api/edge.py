"""The outermost layer: every response gets a request id, every error OpenAI's shape, every call a log line.

Plain ASGI: Starlette's BaseHTTPMiddleware breaks context variables and re-wraps streams.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.body import ClientLeft
from app.api.browsers import Browsers
from app.errors import AppError
from app.ledger.ledger import Ledger
from app.ledger.record import Record
from app.observe import logs, metrics
from app.observe.access import AccessLog
from app.observe.traces import Tracer

log = logging.getLogger(__name__)

_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
# Asked for all the time by machines; a line each would drown the rest.
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class Edge:
    """Wraps the whole app. `scope["refrain"]` is a dict that inner layers add log fields to.

    `direct` are the routes that answer, by path: a POST goes to them past FastAPI's layers and router, which
    would cost a hit more than all the rest of its way. Everything else, refusals included, goes through the app.
    `scope["record"]` is the ledger's record of a call for an answer, which inner layers fill in; up to `text_bytes` of
    its response are recorded.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        direct: Mapping[str, ASGIApp],
        ends: Ends,
        browsers: Browsers,
        text_bytes: int = 0,
    ) -> None:
        self._app = app
        self._browsers = browsers
        self._direct = direct
        self._ends = ends
        self._text_bytes = text_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        token = logs.request_id.set(request_id)
        fields: dict[str, Any] = {}
        scope["refrain"] = fields
        if self._ends.tracer is not None:
            fields["trace"] = self._ends.tracer.begin(scope["headers"], scope["method"], scope["path"])
        record = scope["record"] = Record(endpoint=_endpoint(scope["path"]))
        began = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own_headers(request_id)]
            elif self._text_bytes and message.get("body"):
                room = self._text_bytes - len(record.response.encode())
                record.response += message["body"][: max(0, room)].decode(errors="replace")
            await send(message)

        app = self._direct.get(scope["path"], self._app) if scope["method"] == "POST" else self._app
        try:
            self._browsers.check(scope["headers"])
            await app(scope, receive, send_with_id)
        except ClientLeft:  # there is nobody to answer
            record.finish = "left"
        except Exception as error:
            record.finish = "broken"
            if status:  # too late for another status; the connection ends, which no client takes for an end
                log.exception("a response broke after it had begun")
                raise
            if not isinstance(error, AppError):
                log.exception("unexpected error")
                error = AppError("the server failed on this request; its log names the reason", code="internal_error")
            record.error = error.code or error.type
            if error.status < 500:
                record.finish = "refused"
            await send_error(error, send_with_id, request_id)
        finally:
            status = status or 499  # nginx's number for a client that left first
            seconds = time.perf_counter() - began
            self._ends.note(request_id, scope["method"], scope["path"], status, seconds, fields, record)
            logs.request_id.reset(token)


class Ends:
    """What is done when a response has ended, whichever way it went."""

    def __init__(self, access: AccessLog | None, ledger: Ledger | None, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        self._access = access
        self._ledger = ledger

    def note(
        self,
        request_id: str,
        method: str,
        path: str,
        status: int,
        seconds: float,
        fields: dict[str, Any],
        record: Record,
    ) -> None:
        """Count it, write its line, and record a call. `fields` and `record` are what inner layers told of it.

        A call of nobody we know is not recorded: whoever has no key must not be able to fill the disk.
        """
        metrics.child(metrics.responses, str(status)).inc()
        if self._access is not None and path not in _QUIET:
            self._access.note(request_id, method, path, status, seconds * 1000, fields)
        if self.tracer is not None:
            self.tracer.note(request_id, method, path, status, seconds, fields)
        if self._ledger is not None and record.tenant:
            record.id, record.status, record.total_s, record.time = request_id, status, seconds, time.time()
            self._ledger.note(record)


def _endpoint(path: str) -> str:
    """Without the id that the path of a stream ends in."""
    return "/v1/streams" if path.startswith("/v1/streams/") else path


def own_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    """What every response carries."""
    return [(b"x-request-id", request_id.encode()), _NO_SNIFFING]


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own `x-request-id` if it is sane, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value, "ascii")
    return new_request_id()


def new_request_id() -> str:
    # Unique is enough, it opens nothing; the kernel's generator would cost a hit more than its look-up.
    return f"req_{_random.getrandbits(128):032x}"


_random = random.Random()  # noqa: S311


async def send_error(error: AppError, send: Send, request_id: str) -> None:
    """A whole response with OpenAI's error object."""
    body = json.dumps(error.body(request_id), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
