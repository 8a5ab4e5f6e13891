"""What a follower reads of a live stream, put into its flight."""

from __future__ import annotations

from app import wire
from app.domain import Endpoint
from app.errors import Diverged, EngineFailed, Incomplete
from app.flight.flight import Flight, Ticket
from app.flight.live import Entry

DIVERGED = "the answer was generated again after its server died, and came out differently; ask again"

# What is raised over events that are no answer's. Who can write to Redis can send those, and the one task that reads
# for all flights must not end by them.
_NO_ANSWER = (Incomplete, ValueError, KeyError, TypeError, AttributeError, IndexError)


class Unreadable(Exception):
    """Raised when a live stream has an entry missing, or one that is not its leader's."""


class LogBook:
    """Puts a live stream's entries into a flight: each once, in order, also when the leader changes."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._token: str | None = None
        self._next = 0
        self._splice: wire.Splice | None = None
        self.is_unreadable = False

    @property
    def is_open(self) -> bool:
        return self._token is not None

    def take(self, entry: Entry | None) -> None:
        if self.is_unreadable or self._flight.is_over:
            return
        try:
            self._take(entry)
        except Diverged:
            self._flight.fail(EngineFailed(DIVERGED))
        except (Unreadable, *_NO_ANSWER):
            self.is_unreadable = True
            self._flight.wake()

    def _take(self, entry: Entry | None) -> None:
        if entry is None or entry.kind == "cut":
            raise Unreadable
        if entry.kind == "open":
            self._open(entry)
            return
        if entry.token != self._token or entry.number > self._next:
            raise Unreadable
        if entry.number < self._next:
            return
        self._next += 1
        if entry.kind == "end":
            if entry.tokens:
                self._flight.timings.prompt_tokens, self._flight.timings.completion_tokens = entry.tokens
            self._flight.finish()
        elif entry.kind == "fail" and entry.error is not None:
            self._flight.fail(entry.error.error())
        elif self._flight.is_stream:
            for event in wire.split(entry.content):
                fresh = self._splice.fit(event) if self._splice else event
                if fresh is not None:
                    self._flight.add(fresh)
        elif not self._flight.events:
            self._flight.add(entry.content)

    def _open(self, entry: Entry) -> None:
        if entry.token == self._token:
            return
        if entry.about is None or entry.number != 0:
            raise Unreadable
        self._token, self._next = entry.token, 1
        flight, about = self._flight, entry.about
        if not flight.ticket.key:  # found by its uid alone
            endpoint = Endpoint(about.endpoint)
            flight.ticket = Ticket(about.key, endpoint, about.owner, about.weights, about.is_stream, True, True)
        if not flight.events:
            flight.is_stream = about.is_stream
        self._splice = wire.Splice(flight.ticket.endpoint, flight.events) if flight.events else None
        flight.wake()
