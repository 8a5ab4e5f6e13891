"""From a flight's events to one client's answer: in its form, under its own id, with the usage event if it asked."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from app import wire
from app.domain import Answer, Endpoint, Timings
from app.flight import names
from app.flight.flight import Seat

Renaming = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Ride:
    """What one client wants of the flight that it sits on. `request_body` is {} where the call was not seen."""

    seat: Seat
    is_streaming: bool
    wants_usage: bool
    request_body: dict[str, Any]
    timings: Timings

    @property
    def stream_id(self) -> str | None:
        """Under which this client can come back, if it can."""
        if not (self.is_streaming and self.seat.flight.ticket.is_kept and self.seat.flight.is_stream):
            return None
        return self.seat.position(wants_usage=self.wants_usage).stream_id

    @property
    def has_ids(self) -> bool:
        """Whether its events carry ids."""
        return self.is_streaming and self.seat.flight.ticket.is_kept

    async def answer(self) -> Answer:
        """The answer, once there is something to send.

        Raises:
            AppError: refused or broken before that. Incomplete: this stream has no whole body in it.
        """
        is_stream = await self.seat.opened()
        self._note_timings()
        if self.is_streaming:
            return Answer(events=self._streamed() if is_stream else self._unfolded(), timings=self.timings)
        content = await self.seat.whole()
        self._note_timings()
        body = wire.dump(wire.fold(self._endpoint, content)) if is_stream else content[0]
        return Answer(body=self._renaming()(body), timings=self.timings)

    @property
    def _endpoint(self) -> Endpoint:
        return self.seat.flight.ticket.endpoint

    async def _streamed(self) -> AsyncGenerator[bytes, None]:
        flight, endpoint = self.seat.flight, self._endpoint
        position = self.seat.position(wants_usage=self.wants_usage) if flight.ticket.is_kept else None
        renamed: Renaming | None = None
        async with aclosing(self.seat.events()) as events:
            async for number, event in events:
                if not self.wants_usage and is_usage_event(endpoint, event):
                    continue
                if event.startswith(b":"):  # a comment; among ids, one with a blank line is an empty event to clients
                    yield event if position is None else event.rstrip() + b"\n"
                    continue
                if wire.is_last(endpoint, event):  # whoever sends it says what the engine's seconds went into
                    self._note_timings()
                renamed = renamed or self._renaming()
                event = renamed(event)
                if position is not None:
                    event = f"id: {position.event_id(number, flight.checks[number - 1])}\n".encode() + event
                yield event

    async def _unfolded(self) -> AsyncGenerator[bytes, None]:
        (body,) = await self.seat.whole()
        self._note_timings()
        renamed = self._renaming()
        for event in wire.unfold(self._endpoint, json.loads(body)):
            if self.wants_usage or not is_usage_event(self._endpoint, event):
                yield renamed(event)

    def _renaming(self) -> Renaming:
        """What puts content under the client's own names; those that the engine gave are the first client's."""
        flight = self.seat.flight
        position = self.seat.position(wants_usage=self.wants_usage)
        if position.rider == names.FIRST or flight.identity is None:
            return _as_it_is
        fresh = wire.named(self._endpoint, names.rider_seed(position.uid, position.rider))
        return wire.renaming(self._endpoint, flight.identity, fresh, self.request_body)

    @contextmanager
    def paid(self) -> Iterator[None]:
        """Aboard until the context ends: then the timings say what was used, and what this client pays of it."""
        try:
            yield
        finally:
            self._note_timings()
            self.timings.paid_s += self.seat.pay()

    def _note_timings(self) -> None:
        """What the flight knows by now; what this client waited for the cache, and pays, is its own."""
        for each in fields(Timings):
            if each.name not in ("cache_s", "paid_s"):
                setattr(self.timings, each.name, getattr(self.seat.flight.timings, each.name))


def is_usage_event(endpoint: Endpoint, event: bytes) -> bool:
    """Whether only clients that asked for usage get it."""
    # Quotes inside JSON strings are escaped, so generated text cannot look like this.
    return endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS) and b'"choices":[],' in event and b'"usage":{' in event


def _as_it_is(content: bytes) -> bytes:
    return content
