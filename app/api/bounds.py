"""What one connection may cost: the size of a request's head, the time it takes, and the time that nobody reads.

uvicorn bounds none of these. Each connection looks at itself once a second instead of setting a timer for each
request: a hit takes a tenth of a millisecond, and a timer is a hundredth of that.

| a client that | is bounded by | and gets |
|---|---|---|
| sends its head slowly, or nothing at all | `header_timeout_s` | 408, closed |
| sends a large head, or hundreds of headers | `max_header_bytes`, `MAX_HEADERS`, `MAX_URL_BYTES` | 431 or 414, closed |
| goes on sending a body after it was answered | `body_timeout_s` | closed |
| reads nothing of what it asked for | the transport's buffer, then `write_timeout_s` | closed |
| is one too many | `max_connections` | 503, closed |
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from http import HTTPStatus
from typing import NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.edge import new_request_id, own_headers
from app.errors import AppError, BadCall, Busy, HeadTimedOut, HeadTooLarge, UrlTooLong
from app.observe import metrics

MAX_HEADERS = 100
MAX_URL_BYTES = 8192
LOOK_EVERY_S = 1.0
# Where the app puts its `Bounds` in the lifespan's state, and the protocol finds them.
BOUNDS = "bounds"


class Bounds(NamedTuple):
    """In bytes, seconds and connections of this process."""

    header_bytes: int = 32_768
    header_s: float = 15.0
    body_s: float = 30.0
    write_s: float = 60.0
    connections: int = 4096


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol within `Bounds`. What derives from it says when a head and a message are complete."""

    _refusal: AppError | None = None
    _looking: asyncio.TimerHandle | None = None
    # Loop times: since when a head, the rest of a message, and the client's reading are waited for; None: they are not.
    _head_since: float | None = None
    _message_since: float | None = None
    _stalled_since: float | None = None
    # Of a head that takes several reads, the bytes from the second on, and 1; and those of the last read of all.
    _head_bytes = 0
    _read_bytes = 0
    # Whether a message ended in the last read.
    _has_ended = False
    # What a client that is slow to read had read at the last look.
    _taken_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bounds: Bounds = self.app_state.get(BOUNDS) or Bounds()
        self._head_since = self.loop.time()
        self._looking = self.loop.call_later(LOOK_EVERY_S, self._look)
        if len(self.connections) > self._bounds.connections:
            self.refuse(Busy("there are too many connections", code="too_many_connections", retry_after_s=1))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # it was refused; there may be more on its way
            return
        self._read_bytes, self._has_ended = len(data), False
        super().data_received(data)
        is_between = self._has_ended and not self.is_asking  # a hot hit is answered before this line
        if self._head_since is not None and not is_between and not self.transport.is_closing():
            # httptools keeps a header to itself until it is whole, so what is incomplete is counted here.
            self._head_bytes = self._head_bytes + len(data) if self._head_bytes else 1
            if self._head_bytes > self._bounds.header_bytes:
                self.refuse(_too_large(self._bounds))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_since = self._message_since = self.loop.time()

    def head_is_complete(self) -> None:
        """Raises what the parser hands on as a fault of the request; `send_400_response` says which."""
        is_long = self._head_bytes + self._read_bytes > self._bounds.header_bytes
        self._head_since, self._head_bytes = None, 0
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = UrlTooLong(f"the URL is longer than {MAX_URL_BYTES} bytes")
        elif len(self.headers) > MAX_HEADERS:
            self._refusal = HeadTooLarge(f"there are more than {MAX_HEADERS} headers")
        elif is_long and sum(map(_size, self.headers)) > self._bounds.header_bytes:
            self._refusal = _too_large(self._bounds)
        if self._refusal is not None:
            raise self._refusal

    @property
    def is_asking(self) -> bool:
        """Whether a request has begun to come and is not all there."""
        return self._message_since is not None

    @property
    def is_held(self) -> bool:
        """Whether a request is kept from the app for now, which then has its own limits."""
        return False

    def message_is_complete(self) -> None:
        self._message_since, self._has_ended = None, True
        if self.cycle is not None and self.cycle.response_complete:  # it was answered before it was all there
            self._head_since = self.loop.time()

    def on_response_complete(self) -> None:
        if not self.is_asking:
            self._head_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._stalled_since, self._taken_bytes = self.loop.time(), 0
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or was refused while its head was read, gets our error object."""
        self.refuse(self._refusal or BadCall(msg, code="invalid_http"))

    def refuse(self, error: AppError) -> None:
        """A whole response with OpenAI's error object, and the end of the connection."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_rendered(error))
        self.transport.close()  # in the middle of a response there is no place for another

    def _look(self) -> None:
        """Once a second: has this connection been waited for too long?"""
        now, bounds = self.loop.time(), self._bounds
        self._looking = self.loop.call_later(LOOK_EVERY_S, self._look)
        if self._stalled_since is not None and self._has_read():
            self._stalled_since = now
        if _is_past(self._stalled_since, now, bounds.write_s):
            metrics.cut_off.labels("write").inc()
            self.transport.abort()  # to close it would wait for the client to read
        elif self.is_held or (self.cycle is not None and not self.cycle.response_complete):
            return  # the app has its own limits
        elif _is_past(self._head_since, now, bounds.header_s):
            metrics.cut_off.labels("head").inc()
            if self._head_bytes:
                self.refuse(HeadTimedOut(f"the request's head did not arrive within {bounds.header_s:g} s"))
            self.transport.close()
        elif self._head_since is None and _is_past(self._message_since, now, bounds.body_s):
            metrics.cut_off.labels("body").inc()
            self.transport.close()

    def _has_read(self) -> bool:
        """Whether a client that does not read as fast as we write has read something since the last look. The kernel
        lets us write only when a third of its own megabytes are free, which a slow reader takes its time for."""
        before, self._taken_bytes = self._taken_bytes, _taken(self.transport)
        return self._taken_bytes != before


def _taken(transport: asyncio.Transport) -> int:
    """Bytes that the client has acknowledged so far (Linux 4.1, `tcpi_bytes_acked`); 0 where nobody can tell."""
    try:
        told = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.stop)
    except (OSError, AttributeError):
        return 0
    return int.from_bytes(told[_ACKED], sys.byteorder)


# Where the number lies in the kernel's `struct tcp_info`.
_ACKED = slice(120, 128)


def _is_past(since: float | None, now: float, limit_s: float) -> bool:
    return since is not None and now - since > limit_s


def _size(header: tuple[bytes, bytes]) -> int:
    return len(header[0]) + len(header[1]) + 4


def _too_large(bounds: Bounds) -> HeadTooLarge:
    return HeadTooLarge(f"the request's head is larger than {bounds.header_bytes} bytes")


def _rendered(error: AppError) -> bytes:
    request_id = new_request_id()
    body = json.dumps(error.body(request_id)).encode()
    own = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    own |= {name.decode(): value.decode() for name, value in own_headers(request_id)}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (error.headers | own).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
