"""Hears from Redis what changed there, so that `Near` may keep what did not: client-side caching, in broadcasting mode.

One connection is told of every key under our prefix that was written, deleted, evicted or has expired, whoever did
it (https://redis.io/docs/latest/develop/reference/client-side-caching/). Not of those alone that we have read: that
would take the same connection for the reads, or memory for them in Redis.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from redis.exceptions import RedisError, ResponseError

from app.cache.link import Link, ended
from app.cache.near import Near

log = logging.getLogger(__name__)

# A connection over which nothing came for so long is asked whether it is still one.
PING_AFTER_S = 1.0
RETRY_S = 0.5
# How long hot hits go on without Redis. Nobody can purge a Redis that is down; one that only we cannot reach may be
# purged meanwhile, and this bounds how long its old answers, right for these weights all the same, are still given.
GRACE_S = 30.0


class Tracking:
    """Keeps `near` right while it is entered (`async with`)."""

    def __init__(self, link: Link, near: Near, prefix: str) -> None:
        self._link = link
        self._near = near
        self._prefix = prefix
        self._task: asyncio.Task[None] | None = None
        self._has_said = False

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run(), name="near-tracking")

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            await ended(self._task)

    async def _run(self) -> None:
        forgetting: asyncio.TimerHandle | None = None
        while True:
            try:
                async with self._link.connection() as connection:
                    async with self._link.deadline():
                        await self._subscribe(connection)
                    if forgetting:
                        forgetting.cancel()
                    self._near.open()
                    forgetting = None
                    await self._listen(connection)
            except ResponseError as error:  # no such command, or not for this user
                self._say_once(error)
            except (RedisError, OSError) as error:
                log.debug("changes in redis are not heard of: %s", error)
            self._near.close()
            forgetting = forgetting or asyncio.get_running_loop().call_later(GRACE_S, self._near.clear)
            await asyncio.sleep(RETRY_S)

    def _say_once(self, error: ResponseError) -> None:
        if not self._has_said:
            log.warning("redis does not tell of changes (%s): every hit asks it", error)
        self._has_said = True

    async def _subscribe(self, connection: Any) -> None:
        connection._parser.set_invalidation_push_handler(self._changed)
        await connection.send_command("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix)
        await connection.read_response()

    async def _listen(self, connection: Any) -> None:
        """Until the connection breaks, which raises."""
        is_asked = False
        while True:
            said = await connection.read_response(timeout=PING_AFTER_S, push_request=True)
            if said is not None:
                is_asked = False
            elif is_asked:
                raise TimeoutError("redis does not answer")
            else:
                await connection.send_command("PING")
                is_asked = True

    async def _changed(self, push: list[Any]) -> list[Any]:
        """`[b"invalidate", names]`; no names where the whole database was emptied."""
        if push[1] is None:
            self._near.clear()
        else:
            self._near.forget(key_of(name) for name in push[1])
        return push


def key_of(name: bytes) -> str:
    """The cache key in a Redis key, its last part; see `Slot.name`."""
    return name.rpartition(b":")[2].decode("ascii", "replace")
