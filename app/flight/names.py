"""The names of everything this room keeps in Redis, and of streams. Pure.

The names of one flight share a hash tag, the first characters of its key, so that in a Redis Cluster its scripts
find all of them on one node.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from hashlib import sha256

TAG_CHARS = 8
_UID_CHARS = TAG_CHARS + 16
_EVENT_ID = re.compile(
    rf"(?P<uid>[0-9a-f]{{{_UID_CHARS}}})(?P<rider>[0-9a-f]{{6}})(?P<usage>[un])(-(?P<number>\d{{1,9}})-(?P<check>[0-9a-f]{{8}}))?"
)
# The rider whose stream bears the names that the engine gave.
FIRST = "000000"


def lease(namespace: str, key: str) -> str:
    """A string, `<token> <uid>`, that expires: who leads, and under which name the flight's stream is kept."""
    return f"{namespace}:flight:{{{key[:TAG_CHARS]}}}:{key}:lease"


def current(namespace: str, key: str) -> str:
    """The uid of the flight that has begun and not ended: what a lease leaves behind when its holder dies."""
    return f"{namespace}:flight:{{{key[:TAG_CHARS]}}}:{key}:uid"


def riders(namespace: str, key: str) -> str:
    """A sorted set of the processes that follow from afar, each with the time (ms) until which it is believed."""
    return f"{namespace}:flight:{{{key[:TAG_CHARS]}}}:{key}:riders"


def live(namespace: str, uid: str) -> str:
    """The Redis stream that the flight's events are in."""
    return f"{namespace}:live:{{{uid[:TAG_CHARS]}}}:{uid}"


def claim(namespace: str, key: str) -> str:
    """What an `Idempotency-Key` was used for."""
    return f"{namespace}:idempotency:{key}"


def new_uid(key: str) -> str:
    """A name for a flight under this key; it begins as the key does, so that both have one hash tag."""
    return key[:TAG_CHARS] + secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Position:
    """One client's stream, and the last event of it that the client has seen.

    `rider` tells this client's stream from others of the same flight, `wants_usage` whether the usage event is in
    it. `check` is a checksum over all events up to `number`: whoever goes on from there has sent the same.
    """

    uid: str
    rider: str
    wants_usage: bool
    number: int = 0
    check: int = 0

    @property
    def stream_id(self) -> str:
        return f"{self.uid}{self.rider}{'u' if self.wants_usage else 'n'}"

    def event_id(self, number: int, check: int) -> str:
        return f"{self.stream_id}-{number}-{check:08x}"


def position(given: str) -> Position | None:
    """From a stream id or an event id; None for anything else."""
    if (found := _EVENT_ID.fullmatch(given)) is None:
        return None
    number, check = found["number"], found["check"]
    return Position(found["uid"], found["rider"], found["usage"] == "u", int(number or 0), int(check or "0", 16))


def new_rider() -> str:
    return secrets.token_hex(3)


def rider_seed(uid: str, rider: str) -> str:
    """32 hex digits that follow from a stream's name: its answer's id is the same wherever it is resumed."""
    return sha256(f"{uid}{rider}".encode()).hexdigest()[:32]
