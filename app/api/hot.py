"""Hot hits, answered where their last byte is parsed.

A hit that this process holds needs nobody: no task, no ASGI messages, no turn of the event loop. What that machinery
costs is more than all the rest of such a hit. So a request that may be one is held back until it is complete. If it is
one, its response is written there and then; else it goes to the app as if nothing had been.

```
on_headers_complete    may it be a hot hit? then hold it back          else: uvicorn's way
on_message_complete    it is: write the response                       it is not: hand it on
after a moment         its rest is still on its way:                   hand it on, so that the app can time it out
```
Where there are workers (`workers/`), connections go between them and this process: to here with what is no hit, and
back when that is answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.api.answers import MEMO_BODY_BYTES, AnswerRoute, Headers
from app.api.corked import CorkedProtocol
from app.api.edge import Ends, own_headers, request_id_of
from app.ledger.record import Record

# How long a request is held back whose body is on its way.
PATIENCE_S = 0.2
# Where the app puts its `HotHits` in the lifespan's state, and the protocol finds it.
STATE = "hot_hits"
# And a function that takes the connection of an idle transport to a worker, or returns False.
GIVE = "give_connection"
# How often, and for how long in seconds, the last answer is waited for to be taken before a connection can be given.
_TRIES, _TRY_S = 5, 0.002


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
        return None if found is None else self._noted(path, headers, found, fields, record, began)

    async def fetched(self, url: bytes, headers: Headers, content: bytes) -> tuple[Headers, bytes] | None:
        """The same for a hit that Redis has."""
        began = time.perf_counter()
        path, route = self._routes[url]
        fields: dict[str, Any] = {}
        record = Record(endpoint=path)
        found = await route.fetched(headers, content, fields, record)
        return None if found is None else self._noted(path, headers, found, fields, record, began)

    def _noted(
        self,
        path: str,
        asked: Headers,
        found: tuple[Headers, bytes],
        fields: dict[str, Any],
        record: Record,
        began: float,
    ) -> tuple[Headers, bytes]:
        request_id = request_id_of(asked)
        self._ends.note(request_id, "POST", path, 200, time.perf_counter() - began, fields, record)
        return [*found[0], *own_headers(request_id)], found[1]


def rendered(default: Headers, headers: Headers, body: bytes) -> bytes:
    """A whole response, status 200. `default` are those that every response of the server has."""
    every = [*default, *headers, (b"content-length", b"%d" % len(body))]
    return b"HTTP/1.1 200 OK\r\n" + b"".join([b"%b: %b\r\n" % header for header in every]) + b"\r\n" + body


class HotProtocol(CorkedProtocol):
    """uvicorn's protocol, with hot hits answered in it."""

    # What was received on the connection before it came here.
    received_before = b""
    _held: bytearray | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hot: HotHits | None = self.app_state.get(STATE)
        self._give: Callable[[asyncio.Transport], bool] | None = self.app_state.get(GIVE)
        if self.received_before:
            self.data_received(self.received_before)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None and self._patience is None:  # most clients send head and body apart
            self._patience = self.loop.call_later(PATIENCE_S, self._hand_on)

    def on_headers_complete(self) -> None:
        self.head_is_complete()
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
        self.message_is_complete()
        if self._held is not None:
            if self._answered(bytes(self._held)):
                self._let_go()
                return
            self._hand_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._give is not None and self.tasks:  # this answer was no hot hit, or others are being made
            self.loop.call_soon(self._give_away, _TRIES)

    def _give_away(self, tries: int) -> None:
        """To a worker, unless the next request is there already."""
        if self._give is None or self.is_asking or self.transport.is_closing():
            return
        if self.pipeline or not (self.cycle is None or (self.cycle.response_complete and self.cycle.keep_alive)):
            return
        if not self.transport.get_write_buffer_size():
            if self._give(self.transport):
                self.transport.abort()
        elif tries:
            self.loop.call_later(_TRY_S, self._give_away, tries - 1)

    @property
    def is_held(self) -> bool:
        return self._held is not None

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
        self.transport.write_at_once(rendered(self.server_state.default_headers, *response))  # type: ignore[attr-defined]
        self.on_response_complete()
        return True
