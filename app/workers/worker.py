"""The worker's process: the rooms that a hit needs, kept right by the server's word and by Redis's.

It has the server's settings, keys and Redis, memory of its own for hot recordings, and no engine. Which weights are
served it is told; between that word and the server's own switch lies the time of one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import cast

from app.api.answers import AnswerRoute
from app.api.edge import Ends
from app.api.hot import HotHits
from app.cache.link import Link
from app.cache.store import Store
from app.domain import Endpoint, Weights
from app.engine import Engine
from app.flight.flights import Flights
from app.gate.keys import Gate, KeyFile
from app.gate.limits import defaults
from app.ledger.ledger import Ledger
from app.observe import logs, metrics
from app.observe.access import AccessLog
from app.service import Service
from app.serving import Catalog, Serving
from app.settings import Settings, handed_down
from app.workers.channel import Begin, Channel, Connection, Done, Message, Serve, Stop, Tell, Told
from app.workers.front import RETRY_S, Front, Hall

# What needs an engine is handed to the server.
_NO_ENGINE = cast(Engine, None)
# Of what a worker does not answer, the server makes a plan again, and counts it.
_COUNTED_BY_THE_SERVER = "refrain_cache_bypass"


async def serve(end: socket.socket, listener: socket.socket) -> None:
    """Until the server says `Stop`, or has ended."""
    channel = Channel(end)
    messages = aiter(channel)
    begin, _ = await anext(messages)
    assert isinstance(begin, Begin)  # noqa: S101 - the server's first word
    settings = handed_down(begin.settings)
    logs.configure(format=settings.log_format, level=settings.log_level)
    logging.getLogger("app.cache").setLevel(logging.ERROR)  # a Redis that is down the server tells of
    async with contextlib.AsyncExitStack() as stack:
        worker = Worker(settings, channel, is_locked=begin.is_locked)
        await worker.open(stack)
        channel.send(Done(begin.number))
        async for message, connection in messages:
            if isinstance(message, Stop):
                await worker.stop()
                return
            await worker.heed(message, connection, listener)


class Worker:
    def __init__(self, settings: Settings, channel: Channel, *, is_locked: bool) -> None:
        self._channel = channel
        self._access = AccessLog(settings.log_format) if settings.access_log else None
        assert settings.redis_url is not None  # noqa: S101 - handed down, also where it is the embedded one's
        url = settings.redis_url.get_secret_value()
        self._link = Link(settings, url)
        store, flights = Store(settings, self._link), Flights(settings, self._link, url, is_alone=True)
        self._service = Service(settings, _NOTHING_YET, _NO_ENGINE, store, flights)
        gate = Gate(KeyFile(settings.keys_path), defaults(settings), is_locked=is_locked)
        routes = {endpoint.value: AnswerRoute(endpoint, self._service, gate, None, settings) for endpoint in Endpoint}
        self._ledger = Ledger(settings, _NO_DEVICES) if settings.ledger else None
        self._hall = Hall(HotHits(routes, Ends(self._access, self._ledger)), self._hand_over)
        self._server: asyncio.Server | None = None

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """What is opened, the stack closes."""
        if self._access is not None:
            await stack.enter_async_context(self._access)
        if self._ledger is not None:
            await stack.enter_async_context(self._ledger)
        stack.push_async_callback(self._link.close)
        await stack.enter_async_context(self._service.store.opened())
        house = asyncio.create_task(self._hall.keep_house(), name="keep-house")
        stack.callback(house.cancel)

    async def heed(self, message: Message, connection: socket.socket | None, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(message, Serve):
            self._service.catalog = _catalog(message.weights)
            if self._server is None:
                self._server = await loop.create_server(lambda: Front(self._hall), sock=listener)
            self._channel.send(Done(message.number))
        elif isinstance(message, Tell):
            self._channel.send(Told(message.number, dict(metrics.counts(but=_COUNTED_BY_THE_SERVER))))
        elif connection is not None:
            with contextlib.suppress(OSError):  # its client has left
                await loop.connect_accepted_socket(lambda: Front(self._hall), connection)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._hall.clear()
        while self._channel.has_unsent:
            await asyncio.sleep(RETRY_S)  # polling: the server takes what it is handed in a moment

    def _hand_over(self, connection: int, received: bytes) -> None:
        self._channel.send(Connection(received), connection)


class _NoDevices:
    """The engine's time is the server's to tell."""

    busy_s = idle_s = 0.0


_NO_DEVICES = _NoDevices()
# Nothing is listened to before the first word of what is served.
_NOTHING_YET = Weights("", "", "", "", {})


def _catalog(weights: list[Weights]) -> Catalog:
    base = Serving(weights[0], _NO_ENGINE)
    return Catalog(base, {each.name: Serving(each, _NO_ENGINE, base) for each in weights[1:]})
