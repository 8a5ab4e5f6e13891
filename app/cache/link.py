"""The link to Redis: a small deadline on everything, and a breaker, so that what is down costs nothing.

While Redis is down no call waits for it: every question raises RedisDown at once, and one task in the
background asks until it answers again. One warning when it goes, one line when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ChildDeadlockedError,
    ClusterDownError,
    IncorrectPolicyType,
    MaxConnectionsError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from app.errors import RedisDown, StartRefused
from app.observe import metrics
from app.settings import Settings, mask_url

log = logging.getLogger(__name__)

PROBE_EVERY_S = 0.5
CANCEL_AGAIN_S = 0.5
# A deadline passes in so many parts, with the loop listening between them. To connect and ask takes up to 26 rounds of
# the loop, measured with asyncio's and with uvloop; to ask over a connection that is there, 6.
PARTS = 40
MAX_CONNECTIONS = 64

# All that redis-py and the system raise; some of redis-py's own are no RedisErrors.
FAILURES = (RedisError, RedisClusterException, ChildDeadlockedError, IncorrectPolicyType, OSError)
# What says "the server cannot serve us now", as against "this question was wrong for this key".
_DOWN = (AuthenticationError, NoPermissionError, ReadOnlyError, ClusterDownError)
# Errors of a server that is up and refuses all the same: full, loading, in a failover, in protected mode.
_REFUSALS = ("DENIED", "OOM", "LOADING", "MISCONF", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS", "BUSY", "UNBLOCKED")


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task that speaks to Redis, and return when it has ended.

    Asked again and again: redis-py sends by `asyncio.wait_for`, which on Python 3.11 loses a cancellation that comes in
    the moment in which it is done (bpo-37658).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)


class Deadline:
    """Like `asyncio.timeout`, but time in which the loop was busy, and could not have heard, hardly counts.

    It passes in `PARTS`, each begun when the loop comes round after the one before. So a loop that was held up for a
    second, by a burst of calls or by a machine that stood still, takes a healthy server for a dead one no more; one
    that has nothing to do waits `seconds`, never less. Raises TimeoutError in the task that entered it.
    """

    __slots__ = ("_due", "_left", "_loop", "_part_s", "_seconds", "_timer", "_within")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._part_s = seconds / PARTS
        self._left = PARTS
        self._within = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._within.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + self._seconds
        self._timer = self._loop.call_later(self._part_s, self._passed)

    def _passed(self) -> None:
        self._left -= 1
        if self._left > 0 or self._loop.time() < self._due:  # uvloop rounds a part to milliseconds, also to none
            self._timer = self._loop.call_later(self._part_s, self._passed)
        else:
            self._within.reschedule(self._loop.time())

    async def __aexit__(self, *error: Any) -> None:
        self._timer.cancel()
        await self._within.__aexit__(*error)


class Link:
    """Owns the Redis client. `ask` is the only way to it."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._where = mask_url(url)
        self.client = client(settings, url)
        self._up = True  # until something says otherwise; the first question finds out
        self._probe: asyncio.Task[None] | None = None
        metrics.redis_up.set(1)

    @property
    def is_up(self) -> bool:
        return self._up

    async def ask(self, question: Callable[[Any], Awaitable[Any]]) -> Any:
        """`await question(client)` within `redis_timeout_s` of the loop's time (see `Deadline`).

        Raises:
            RedisDown: no answer in time, no server, or one that refuses everybody. Errors that are about
                the key alone (WRONGTYPE) stay what they are, a redis ResponseError.
        """
        if not self._up:
            raise RedisDown(self._where)
        try:
            async with self.deadline():
                return await question(self.client)
        except MaxConnectionsError as error:  # we are too many; the server is well
            raise RedisDown(self._where) from error
        except ResponseError as error:
            if isinstance(error, _DOWN) or str(error).startswith(_REFUSALS):
                self._went_down(error)
                raise RedisDown(self._where) from error
            raise
        except FAILURES as error:  # our deadline's TimeoutError is an OSError
            self._went_down(error)
            raise RedisDown(self._where) from error

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection of one's own, for what is no question with one answer. Raises redis's and the system's errors.

        Who has it sets the deadlines. It is closed on leaving, since nobody else may get what was still on its way.
        """
        pool = self.client.connection_pool
        async with self.deadline():
            connection = await pool.get_connection()
        try:
            yield connection
        finally:
            await connection.disconnect(nowait=True)
            await pool.release(connection)

    async def close(self) -> None:
        if self._probe:
            await ended(self._probe)
        with contextlib.suppress(*FAILURES):
            async with self.deadline():
                await self.client.aclose()

    def deadline(self) -> Deadline:
        """`async with` it around what is to be over within `redis_timeout_s`."""
        return Deadline(self._settings.redis_timeout_s)

    def _went_down(self, error: BaseException) -> None:
        if not self._up:
            return
        self._up = False
        metrics.redis_up.set(0)
        reason = str(error) or f"no answer within {self._settings.redis_timeout_s:g} s"
        log.warning(
            "redis is down (%s: %s): answers are generated and not recorded until it is back", self._where, reason
        )
        self._probe = asyncio.create_task(self._ask_until_up(), name="redis-probe")

    async def _ask_until_up(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            # A write, since a full or read-only server still answers PING.
            with contextlib.suppress(*FAILURES):
                async with self.deadline():
                    await self.client.set(f"{self._settings.redis_namespace}:probe", b"1", px=1000)
                self._up = True
                metrics.redis_up.set(1)
                log.info("redis is back (%s)", self._where)
                return


def client(settings: Settings, url: str, timeout_s: float | None = None) -> Any:
    """An asyncio client for a URL, a Sentinel set-up or a Cluster, without hidden retries.

    redis-py's own defaults (5 s and several tries) let one call hang for a minute when a server stalls. `timeout_s` is
    the longest that each step may take; None leaves that to the caller.

    Raises:
        StartRefused: what the settings say cannot be understood.
    """
    try:
        return _client(settings, url, timeout_s)
    except (ValueError, TypeError):  # what redis-py says may hold a part of the password
        raise StartRefused(
            f"{mask_url(url)} is not understood: REFRAIN_REDIS_URL is redis://user:password@host:port/db (with what is "
            "special in a password percent-encoded), REFRAIN_REDIS_SENTINEL is host:port,host:port/service"
        ) from None


def _client(settings: Settings, url: str, timeout_s: float | None) -> Any:
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "protocol": 3,
        "client_name": "refrain",
    }
    if settings.redis_cluster:
        return aioredis.RedisCluster.from_url(url, **options, max_connections=MAX_CONNECTIONS)
    options |= {"retry": Retry(NoBackoff(), 0), "retry_on_error": []}
    if settings.redis_sentinel:
        hosts, _, service = settings.redis_sentinel.partition("/")
        nodes = [(host, int(port)) for host, _, port in (node.rpartition(":") for node in hosts.split(","))]
        parsed = aioredis.connection.parse_url(url)
        given = {name: value for name, value in parsed.items() if name in ("username", "password", "db")}
        sentinel = Sentinel(nodes, sentinel_kwargs=options, **options, **given)  # type: ignore[no-untyped-call]
        return sentinel.master_for(service or "mymaster")
    pool = aioredis.BlockingConnectionPool.from_url(url, **options, max_connections=MAX_CONNECTIONS, timeout=timeout_s)
    pool.connection_class(**pool.connection_kwargs)  # connects to nothing, and refuses options that there are not
    return aioredis.Redis.from_pool(pool)
