"""Hot hits, answered where their last byte is parsed.

A hit that this process holds needs nobody: no task, no ASGI messages, no turn of the event loop. What that machinery
costs is more than all the rest of such a hit. So a request that may be one is held back until it is complete. If it is
one, its response is written there and then; else it goes to the app as if nothing had been.

```
on_headers_complete    may it be a hot hit? then hold it back          else: uvicorn's way
on_message_complete    it is: write the response                       it is not: hand it on
after a moment         its rest is still on its way:                   hand it on, so that the app can time it out
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from app.api.answers import MEMO_BODY_BYTES, AnswerRoute, Headers
from app.api.corked import CorkedProtocol
from app.api.edge import Ends, own_headers, request_id_of
from app.ledger.record import Record

# How long a request is held back whose body is on its way.
PATIENCE_S = 0.2
# Where the app puts its `HotHits` in the lifespan's state, and the protocol finds it.
STATE = "hot_hits"


class HotHits:
    """The answering routes, by the bytes of their path."""

    def __init__(self, routes: Mapping[str, AnswerRoute], ends: Ends) -> None:
        self._routes = {path.encode(): (path, route) for path, route in routes.items()}
        self._ends = ends

    def __contains__(self, url: bytes) -> bool:
        return url in self._routes

    def response(self, url: bytes, headers: Headers, content: bytes) -> tuple[Headers, bytes] | None:
        """Headers and body of the response, counted and logged; None where the app is to answer."""
        began = time.perf_counter()
        path, route = self._routes[url]
        fields: dict[str, Any] = {}
        record = Record(endpoint=path)
        found = route.at_once(headers, content, fields, record)
        if found is None:
            return None
        request_id = request_id_of(headers)
        self._ends.note(request_id, "POST", path, 200, time.perf_counter() - began, fields, record)
        return [*found[0], *own_headers(request_id)], found[1]


class HotProtocol(CorkedProtocol):
    """uvicorn's protocol, with hot hits answered in it."""

    _held: bytearray | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hot: HotHits | None = self.app_state.get(STATE)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None and self._patience is None:  # most clients send head and body apart
            self._patience = self.loop.call_later(PATIENCE_S, self._hand_on)

    def on_headers_complete(self) -> None:
        if self._may_be_hot():
            self._held = bytearray()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
            return
        self._held += body
        if len(self._held) > MEMO_BODY_BYTES:
            self._hand_on()

    def on_message_complete(self) -> None:
        if self._held is not None:
            if self._answered(bytes(self._held)):
                self._let_go()
                return
            self._hand_on()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._let_go()
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._held is not None:  # the app counts who left
            self._hand_on()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._held is not None:
            self._hand_on()
        super().shutdown()

    def _may_be_hot(self) -> bool:
        return (
            self._hot is not None
            and self.url in self._hot
            and self.parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
            and not self.expect_100_continue
            and not self.flow.write_paused
        )

    def _let_go(self) -> bytes:
        held, self._held = bytes(self._held or b""), None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        return held

    def _hand_on(self) -> None:
        held = self._let_go()
        super().on_headers_complete()
        super().on_body(held)

    def _answered(self, content: bytes) -> bool:
        response = self._hot.response(self.url, self.headers, content) if self._hot is not None else None
        if response is None:
            return False
        self.transport.write_at_once(self._rendered(*response))  # type: ignore[attr-defined]
        self.on_response_complete()
        return True

    def _rendered(self, headers: Headers, body: bytes) -> bytes:
        every = [*self.server_state.default_headers, *headers, (b"content-length", b"%d" % len(body))]
        return b"HTTP/1.1 200 OK\r\n" + b"".join([b"%b: %b\r\n" % header for header in every]) + b"\r\n" + body
