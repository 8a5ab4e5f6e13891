"""Leases in Redis: at most one process at a time leads the flight of a key, and proves it with a token.

Each change is one Lua script (`lua/`) that compares the token first. A leader that was paused, and whose lease
another took meanwhile, is told so by its next write, which is not made (`LeaseLost`).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import ResponseError

from app.cache.link import Link
from app.cache.scripts import Scripts
from app.errors import LeaseLost, RedisDown
from app.flight import names
from app.settings import Settings

_SCRIPTS = Scripts(Path(__file__).parent / "lua")
# A follower is believed for so many leases after it last said that it follows.
_BELIEVED_LEASES = 2


@dataclass(frozen=True, slots=True)
class Boarded:
    """`lease` where this process leads; else somebody else does, under this uid."""

    uid: str
    lease: Lease | None
    is_inherited: bool = False


class Leases:
    """The leases of one process."""

    def __init__(self, settings: Settings, link: Link) -> None:
        self._namespace = settings.redis_namespace
        self._link = link
        self.lease_ms = int(settings.flight_lease_s * 1000)
        # What is left of a flight whose leader died waits so long for somebody to carry it on.
        self.keep_ms = int(max(settings.stream_resume_s, 10 * settings.flight_lease_s) * 1000)
        self.process = secrets.token_hex(8)

    async def board(self, key: str, uid: str) -> Boarded:
        """Lead the flight of this key if nobody does, else be noted as a follower. Raises RedisDown."""
        token, named = secrets.token_hex(8), (names.lease, names.current, names.riders)
        keys = [name(self._namespace, key) for name in named]
        arguments = [token, uid, self.lease_ms, self.keep_ms, self.process, _BELIEVED_LEASES * self.lease_ms]
        asking = asyncio.ensure_future(self.run("board", keys, arguments))
        try:
            leads, found, inherited = await asyncio.shield(asking)
        except asyncio.CancelledError:  # who left meanwhile must not hold a lease that nobody renews
            with contextlib.suppress(RedisDown):
                leads, found, _ = await asking  # bounded, as every question to Redis is
                if leads:
                    await Lease(self, self._namespace, key, _text(found), token).abandon()
            raise
        uid = _text(found)
        return Boarded(uid, Lease(self, self._namespace, key, uid, token) if leads else None, bool(inherited))

    async def leave(self, key: str) -> None:
        """This process follows no longer. Raises RedisDown."""
        name = names.riders(self._namespace, key)
        await self._ask(lambda redis: redis.zrem(name, self.process))

    async def is_held(self, key: str) -> bool:
        """Whether anybody leads this key. Raises RedisDown."""
        name = names.lease(self._namespace, key)
        return bool(await self._ask(lambda redis: redis.exists(name)))

    async def run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        return await self._ask(lambda redis: _SCRIPTS.run(redis, script, keys, arguments))

    async def _ask(self, question: Any) -> Any:
        try:
            return await self._link.ask(question)
        except ResponseError as error:  # something foreign lies under one of our names: as good as no Redis
            raise RedisDown(str(error)) from error


class Lease:
    """One held lease."""

    def __init__(self, leases: Leases, namespace: str, key: str, uid: str, token: str) -> None:
        self._leases = leases
        self.uid = uid
        self.token = token
        self._names = [
            names.lease(namespace, key),
            names.current(namespace, key),
            names.riders(namespace, key),
            names.live(namespace, uid),
        ]

    @property
    def beat_s(self) -> float:
        """How often a lease is renewed: twice may fail before it expires."""
        return self._leases.lease_ms / 3000

    async def publish(self, entry: bytes = b"", *, is_last: bool = False, keep_ms: int | None = None) -> None:
        """Write an entry, and renew the lease (or end it, after the last). Raises LeaseLost, RedisDown."""
        keep_ms = self._leases.keep_ms if keep_ms is None else keep_ms
        arguments = [self.token, self.uid, self._leases.lease_ms, keep_ms, entry, "1" if is_last else "0"]
        if not await self._leases.run("publish", self._names, arguments):
            raise LeaseLost(self.uid)

    async def abandon(self) -> bool:
        """End the flight unless other processes follow it; True: they do, and it goes on. Raises RedisDown."""
        return bool(await self._leases.run("abandon", self._names, [self.token, self.uid]))

    async def release(self) -> None:
        """Leave the flight to whoever follows. Raises RedisDown."""
        await self._leases.run("release", self._names[:1], [self.token, self.uid])


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
