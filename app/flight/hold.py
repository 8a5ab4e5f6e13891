"""The memory that flights take: a limit for each, one for all, and what happens beyond.

A flight beyond its limit is *closed*, and so is the largest where all together are beyond theirs: nobody comes aboard
or back any more (who asks the same gets a flight of its own), it is published no further, and what everybody aboard
has read is dropped. So what it still holds is the backlog of whoever reads slowest:

```
nobody has read all      the generation waits for them, for as long as they read on
some have read all       they wait for who is behind, PATIENCE_S in all; then it is put off, with an error event
nothing is read at all   the same after PATIENCE_S
```
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from app.flight.flight import Flight, Seat
from app.observe import metrics
from app.settings import Settings

# How long a generation waits for a client that reads nothing, and how long one client may make others wait.
PATIENCE_S = 10.0
# What each flight may hold of its clients' backlog even where all together are beyond their limit.
FLOOR_BYTES = 64 * 2**10


class Hold:
    """Weighs the flights of one process: `bytes` is what they take. `spawn` runs a task that outlives the call."""

    def __init__(self, settings: Settings, spawn: Callable[[Coroutine[Any, Any, None], str], object]) -> None:
        self._each_bytes = settings.flight_max_bytes
        self._all_bytes = settings.flights_max_bytes
        self._patience_s = PATIENCE_S
        self._spawn = spawn
        self._flights: set[Flight] = set()
        self.bytes = 0

    def take(self, flight: Flight) -> None:
        """Weigh it from now on."""
        self._flights.add(flight)
        self.bytes += flight.size_bytes
        flight.on_weight = self._weighed

    def leave(self, flight: Flight) -> None:
        """Nobody needs what it holds."""
        if flight in self._flights:
            self._flights.discard(flight)
            self.bytes -= flight.size_bytes
            flight.on_weight = lambda _flight, _bytes: None

    async def room(self, flight: Flight) -> None:
        """Wait until those aboard a closed flight have read enough of it; who holds it up for too long is put off."""
        while self._is_over(flight) and (readers := flight.readers):
            slowest, began = min(readers, key=lambda seat: seat.read), time.monotonic()
            has_read = await self._has_read_on(slowest)
            if any(seat.read == flight.said for seat in readers):
                slowest.held_up_s += time.monotonic() - began
            if not has_read or slowest.held_up_s > self._patience_s:
                metrics.flight_put_off.inc()
                slowest.put_off()

    async def _has_read_on(self, seat: Seat) -> bool:
        """Whether there is no need to wait for it any more, within PATIENCE_S."""
        flight, before = seat.flight, seat.read
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                while seat in flight.seats and seat.read == before and self._is_over(flight):
                    await flight.news()
                return True
        return False

    def _weighed(self, flight: Flight, change_bytes: int) -> None:
        self.bytes += change_bytes
        if change_bytes > 0 and flight.size_bytes > self._each_bytes:
            self._close(flight, "own")
        while self.bytes > self._all_bytes:
            largest = max(filter(_can_be_held_in_part, self._flights), key=lambda each: each.size_bytes, default=None)
            if largest is None or largest.is_closed:  # then it waits for its readers, and to close others helps nobody
                break
            self._close(largest, "all")

    def _close(self, flight: Flight, limit: str) -> None:
        if _can_be_held_in_part(flight) and not flight.is_closed:
            flight.close()
            metrics.flights_closed.labels(limit).inc()
            if flight.is_over:  # its pilot, who would wait for its readers, has gone
                self._spawn(self.room(flight), "flight-room")

    def _is_over(self, flight: Flight) -> bool:
        if flight.size_bytes > self._each_bytes:
            return True
        return self.bytes > self._all_bytes and flight.size_bytes > FLOOR_BYTES


def _can_be_held_in_part(flight: Flight) -> bool:
    """Not a body; nor what another server leads: that publishes only so much of it, and if it dies all is needed."""
    return flight.is_stream and flight.is_led_here
