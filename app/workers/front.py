"""A client's connection in a worker: a hit is answered; with anything else the connection goes to the server.

```
a request has arrived, alone and whole     held here: answer      not held: ask Redis, then answer or hand over
anything else                              hand over, with what has been received
```
Anything else is also what is slow, long, pipelined, or no HTTP: so a worker has no limits, time-outs or refusals of its
own, and each of them is in one place, the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from email.utils import formatdate

import httptools

from app.api.answers import MEMO_BODY_BYTES, Headers
from app.api.hot import PATIENCE_S, HotHits, rendered
from app.workers.channel import detached

log = logging.getLogger(__name__)

# As uvicorn has it: how long a client may keep a connection open after an answer without asking again.
KEEP_ALIVE_S = 5.0
# How long one may wait that was opened ahead of its first request.
AHEAD_S = 15.0
# Until a slow reader has taken its last answer, its connection cannot go to the server.
RETRY_S = 0.01
_HEAD_BYTES = 16 * 2**10

# One for all connections: what is read into it is taken out before anything else is read.
_buffer = memoryview(bytearray(64 * 2**10))


class Hall:
    """What all connections of a worker share."""

    def __init__(self, hits: HotHits, hand_over: Callable[[int, bytes], None]) -> None:
        """`hand_over` takes a descriptor and what was received on it, and owns both from then on."""
        self.hits = hits
        self.hand_over = hand_over
        self.fronts: set[Front] = set()
        self.looking: set[asyncio.Task[None]] = set()
        self.default_headers: Headers = []

    async def keep_house(self) -> None:
        """Once a second: the date of the responses, and clients that have gone quiet."""
        while True:
            self.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            for front in list(self.fronts):
                front.close_if_idle()
            await asyncio.sleep(1)

    async def clear(self) -> None:
        """Hand over every connection on which something has arrived, and close the others."""
        for front in list(self.fronts):
            front.end()
        await asyncio.gather(*self.looking)
        while self.fronts:
            await asyncio.sleep(RETRY_S)  # polling: those whose clients are slow to take their last answer


class Front(asyncio.BufferedProtocol):
    """One connection, and the request that is arriving on it."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._patience: asyncio.TimerHandle | None = None
        self._is_ending = False
        self._answered_at: float | None = None
        self._opened_at = time.monotonic()
        self._expect_another()

    def _expect_another(self) -> None:
        self._received = b""
        self._begun = 0
        self._is_whole = False
        self._is_plain = True

    # --- the transport's calls -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._hall.fronts.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hall.fronts.discard(self)
        self._wait_no_more()

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._is_ending:
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_buffer[:nbytes])
        self._received += data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._is_plain = False
        if self._begun > 1 or not self._is_plain or len(self._received) > MEMO_BODY_BYTES + _HEAD_BYTES:
            self.leave()
        elif self._is_whole:
            self._answer_or_leave()
        elif self._patience is None:
            self._patience = self._loop.call_later(PATIENCE_S, self.leave)

    # --- the parser's calls --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun += 1
        if self._begun == 1:
            self._url, self._body = b"", b""
            self._headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._is_plain = (
            self._url in self._hall.hits
            and self._parser.get_method() == b"POST"
            and self._parser.get_http_version() == "1.1"
            and self._parser.should_keep_alive()
            and not self._parser.should_upgrade()
            and all(name != b"expect" for name, _ in self._headers)  # it waits for a word before it sends the rest
        )

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._is_whole = True

    # --- what becomes of it --------------------------------------------------------------------

    def _answer_or_leave(self) -> None:
        self._wait_no_more()
        response = self._hall.hits.response(self._url, self._headers, self._body)
        if response is not None:
            self._answer(*response)
            return
        self._transport.pause_reading()
        task = asyncio.create_task(self._look_up(), name="look-up")
        self._hall.looking.add(task)
        task.add_done_callback(self._hall.looking.discard)

    async def _look_up(self) -> None:
        try:
            response = await self._hall.hits.fetched(self._url, self._headers, self._body)
        except Exception:  # this task's edge; whatever it was, the server has an answer
            log.exception("a worker could not look for a recording")
            response = None
        if self._transport.is_closing():
            return
        if response is None:
            self.leave()
            return
        self._answer(*response)
        self.end() if self._is_ending else self._transport.resume_reading()

    def _answer(self, headers: Headers, body: bytes) -> None:
        self._transport.write(rendered(self._hall.default_headers, headers, body))
        self._answered_at = time.monotonic()
        self._expect_another()

    def leave(self) -> None:
        """Hand the connection to the server."""
        self._wait_no_more()
        if self._transport.is_closing():
            return
        self._is_ending = True
        self._transport.pause_reading()
        connection = None
        if not self._transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # no descriptor is left; one will be
                connection = detached(self._transport)
        if connection is None:
            self._loop.call_later(RETRY_S, self.leave)
            return
        self._hall.hand_over(connection, self._received)
        self._transport.abort()

    def end(self) -> None:
        """The worker ends. What is being looked up is answered first."""
        if self._is_whole:
            self._is_ending = True
        elif self._received:
            self.leave()
        else:
            self._transport.close()

    def close_if_idle(self) -> None:
        """After an answer, or where no first request comes."""
        limit_s = KEEP_ALIVE_S if self._answered_at else AHEAD_S
        if not self._received and time.monotonic() - (self._answered_at or self._opened_at) > limit_s:
            self._transport.close()

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
