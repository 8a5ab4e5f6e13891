"""What a leader writes of its flight, behind its back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from app.errors import LeaseLost, RedisDown
from app.flight.flight import Flight
from app.flight.lease import Lease
from app.flight.live import About, Entry, Script
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

# Followers on other servers see text this much later at most; in between, events are collected into one write. The end
# is written at once: until then whoever asks shares the flight, also after a purge of what it recorded.
PUBLISH_GAP_S = 0.05
# How long the end of a flight may take to be written; a lease that is not ended expires.
CLOSE_S = 2.0


class Publisher:
    """Writes what a leader says into the live stream, behind its back: a task that holds the lease as well."""

    def __init__(self, flight: Flight, lease: Lease, script: Script, settings: Settings) -> None:
        self._flight = flight
        self._lease = lease
        self._script = script
        self._room_bytes = settings.stream_max_bytes
        self._resume_ms = int(max(settings.stream_resume_s, settings.flight_lease_s) * 1000)
        self._number = 0
        self._said: list[bytes] = []
        self._ended = asyncio.Event()
        self._news = asyncio.Event()
        ticket = flight.ticket
        about = About(ticket.key, ticket.endpoint.value, ticket.owner, ticket.weights, ticket.is_stream)
        self._opening = self.entry("open", about=about)
        self._task = asyncio.create_task(self._write_on(), name="flight-publisher")

    def say(self, event: bytes) -> None:
        if self._room_bytes >= 0:
            self._room_bytes -= len(event)
            if self._flight.is_closed:
                self._room_bytes = -1
            if self._room_bytes < 0:
                metrics.streams_cut.inc()
            self._said.append(event)
            self._news.set()

    def entry(self, kind: str, **members: object) -> Callable[[], bytes]:
        """Numbered when it is written, since entries follow each other without a gap."""

        def made() -> bytes:
            number, self._number = self._number, self._number + 1
            return self._script.write(Entry(kind, self._lease.token, number, **members), self._lease.uid)  # type: ignore[arg-type]

        return made

    async def end(self, last: Callable[[], bytes]) -> None:
        """Write what is left, and the last entry."""
        self._ended.set()
        self._news.set()
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.shield(asyncio.wait({self._task}))
                if self._flight.may_record:
                    await self._write(last(), is_last=True)
        except LeaseLost:
            self._lost()
        except TimeoutError:  # Redis is gone; the lease expires by itself
            return

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _write_on(self) -> None:
        try:
            await self._write(self._opening())
            while not (self._ended.is_set() and not self._said):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._lease.beat_s):
                        await self._news.wait()
                self._news.clear()
                await self._write(self._collected())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PUBLISH_GAP_S):
                        await self._ended.wait()
        except LeaseLost:
            self._lost()

    def _lost(self) -> None:
        """We were away too long: another leads. Our clients go on with what we generate; the world hears no more."""
        self._flight.may_record = False
        metrics.leases_lost.inc()
        log.warning("a flight lost its lease; it goes on for the clients of this server alone")

    def _collected(self) -> bytes:
        said, self._said = self._said, []
        if self._room_bytes < 0:
            return self.entry("cut")() if said else b""
        return self.entry("events", content=b"".join(said))() if said else b""

    async def _write(self, entry: bytes, *, is_last: bool = False) -> None:
        """Once, or again until it is there: readers know an entry that comes twice by its number. Raises LeaseLost."""
        while True:
            try:
                await self._lease.publish(entry, is_last=is_last, keep_ms=self._resume_ms if is_last else None)
            except RedisDown:
                await asyncio.sleep(self._lease.beat_s)
            else:
                return
