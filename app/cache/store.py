"""Recordings in Redis: find, keep, count, purge. Every failure here is a miss, counted, never an error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from redis.exceptions import ResponseError

from app.cache.link import Link
from app.cache.near import Held, Near
from app.cache.recording import Recording, pack, unpack
from app.cache.seal import Purpose, Seal
from app.cache.tracking import Tracking
from app.errors import BrokenRecording, RedisDown
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

TTL_JITTER = 0.1  # entries written together should not all expire together
SCAN_COUNT = 500
MEASURE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one answer is kept: the key, and whose it is (for `purge` and `stats`); how long, if not as all are."""

    tenant: str
    model: str
    key: str
    ttl_s: int | None = None

    def name(self, namespace: str) -> str:
        """`refrain:answer:<tenant>:<model>:<key>`; names are percent-encoded, so `:` and `*` cannot mislead."""
        return f"{namespace}:answer:{quote(self.tenant, safe='')}:{quote(self.model, safe='')}:{self.key}"


@dataclass(slots=True)
class Tally:
    """How much is kept for one tenant and model."""

    tenant: str
    model: str
    entries: int = 0


class Store:
    """The recordings that this server, and every other on the same Redis, has kept; `kept` counts this process's."""

    def __init__(self, settings: Settings, link: Link) -> None:
        self.kept = 0
        self._settings = settings
        self._namespace = settings.redis_namespace
        self.link = link
        self._seal = Seal(Purpose.RECORD, settings.cache_secrets, encrypts=settings.cache_encrypt)
        self._near = Near(settings.cache_near_mib * 2**20)
        self._lookups = _Lookups(link, self._near, self._seal, one_by_one=settings.redis_cluster)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """While it is entered, recordings are held in this process too, as far as Redis tells of their changes."""
        async with contextlib.AsyncExitStack() as stack:
            # A Cluster tells of changes node by node; there every hit asks.
            if self._settings.cache_near_mib and not self._settings.redis_cluster:
                await stack.enter_async_context(Tracking(self.link, self._near, f"{self._namespace}:answer:"))
            if self._settings.redis_url is None:  # anybody else's server may forbid INFO, and has an exporter
                measuring = asyncio.create_task(self._measure(), name="redis-memory")
                stack.callback(measuring.cancel)
            yield

    async def _measure(self) -> None:
        while True:
            with contextlib.suppress(RedisDown, ResponseError):
                memory = await self.memory()
                metrics.redis_bytes.set(memory["used_memory"])
                metrics.redis_evicted.set(memory["evicted_keys"])
            await asyncio.sleep(MEASURE_EVERY_S)

    @property
    def is_near(self) -> bool:
        """Whether recordings are held in this process now."""
        return self._near.is_open

    def held(self, slot: Slot) -> Held | None:
        """The recording, if this process holds it."""
        return self._near.get(slot.key)

    async def find(self, slot: Slot) -> Held | None:
        """The recording, whole, or None: not there, Redis down, or not one of ours."""
        held = self._near.get(slot.key)
        if held is not None:
            metrics.hits.near += 1
            return held
        return await self._lookups.find(slot.name(self._namespace), slot.key)

    async def keep(self, slot: Slot, recording: Recording) -> bool:
        """Write it, to be gone when it expires. False: too large, or Redis would not take it."""
        compress_above = self._settings.cache_compress_above_bytes
        value = pack(recording, slot.key, compress_above_bytes=compress_above, seal=self._seal)
        if len(value) > self._settings.cache_max_entry_bytes:
            metrics.cache_errors.labels("too_large").inc()
            return False
        ttl_ms = max(1, int((recording.expires_at - recording.recorded_at) * 1000))
        name = slot.name(self._namespace)
        try:
            await self.link.ask(lambda redis: redis.set(name, value, px=ttl_ms))
        except (RedisDown, ResponseError):
            metrics.cache_errors.labels("not_written").inc()
            return False
        self.kept += 1
        return True

    async def tallies(self) -> list[Tally]:
        """Entries by tenant and model. Raises RedisDown."""
        found: dict[tuple[str, str], Tally] = {}
        async for name in self._names("*", "*"):
            _, tenant, model, _ = name.rsplit(":", 3)
            tally = found.setdefault((tenant, model), Tally(unquote(tenant), unquote(model)))
            tally.entries += 1
        return sorted(found.values(), key=lambda tally: -tally.entries)

    async def memory(self) -> dict[str, int]:
        """Bytes in use and allowed, and keys evicted since the server started. Raises RedisDown."""
        info = await self.link.ask(lambda redis: redis.info())
        nodes = [info] if "used_memory" in info else list(info.values())  # a Cluster answers per node
        names = ("used_memory", "maxmemory", "evicted_keys", "expired_keys")
        return {name: sum(int(node.get(name, 0)) for node in nodes) for name in names}

    async def purge(self, *, model: str | None = None, tenant: str | None = None) -> int:
        """Delete recordings: of a model, of a tenant, of both, or all. Returns how many. Raises RedisDown."""
        self._near.clear()  # at once here; the other processes hear of it from Redis
        deleted, batch = 0, []
        pattern = ["*" if name is None else quote(name, safe="") for name in (tenant, model)]
        async for name in self._names(*pattern):
            batch.append(name)
            if len(batch) == SCAN_COUNT:
                deleted += await self._unlink(batch)
                batch = []
        return deleted + (await self._unlink(batch) if batch else 0)

    async def _names(self, tenant: str, model: str) -> AsyncIterator[str]:
        # Percent-encoding leaves no glob character in a name, so the pattern means what it says.
        pattern = f"{self._namespace}:answer:{tenant}:{model}:*"
        nodes: list[Any] = [None]
        if self._settings.redis_cluster:
            await self.link.ask(lambda redis: redis.initialize())
            nodes = self.link.client.get_primaries()
        for node in nodes:
            cursor = 0
            while True:  # a page is one question, however many of them hold none of these names
                cursor, names = await self.link.ask(_scan(cursor, pattern, node))
                for name in names:
                    yield name.decode()
                if not cursor:
                    break

    async def _unlink(self, names: list[str]) -> int:
        if self._settings.redis_cluster:  # keys of one command must share a slot there
            return sum([await self.link.ask(_unlink(name)) for name in names])
        return int(await self.link.ask(lambda redis: redis.unlink(*names)))


class _Lookups:
    """Reads of one moment go to Redis as one MGET: under load a round trip costs more than what it carries.

    At most ROUND_TRIPS are on their way; what is asked meanwhile goes with the next. Several who ask for the
    same key in one batch share one value, unpacked once.
    """

    ROUND_TRIPS = 2

    def __init__(self, link: Link, near: Near, seal: Seal, *, one_by_one: bool) -> None:
        self._link = link
        self._near = near
        self._seal = seal
        self._one_by_one = one_by_one  # in a Cluster the keys of one command must share a slot
        self._waiting: dict[str, tuple[str, list[asyncio.Future[Held | None]]]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def find(self, name: str, key: str) -> Held | None:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Held | None] = loop.create_future()
        if not self._waiting and len(self._under_way) < self.ROUND_TRIPS:
            loop.call_soon(self._go)
        self._waiting.setdefault(name, (key, []))[1].append(found)
        return await found

    def _go(self) -> None:
        if self._waiting and len(self._under_way) < self.ROUND_TRIPS:
            batch, self._waiting = self._waiting, {}
            task = asyncio.create_task(self._look_up(batch))
            self._under_way.add(task)
            task.add_done_callback(self._back)

    def _back(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._go()

    async def _look_up(self, batch: dict[str, tuple[str, list[asyncio.Future[Held | None]]]]) -> None:
        names = list(batch)
        broken: dict[str, str] = {}
        with self._near.reading() as take_in:
            values = await self._values_or_none(names)
            for name, value in zip(names, values, strict=True):
                key, futures = batch[name]
                held = None
                if value is not None:
                    try:
                        held = Held(unpack(value, key, seal=self._seal))
                        take_in(key, held)
                    except BrokenRecording as error:
                        broken[name] = str(error)
                for future in futures:
                    if not future.done():  # its caller may have left
                        future.set_result(held)
        if broken:
            await self._discard(broken)

    async def _values_or_none(self, names: list[str]) -> list[bytes | None]:
        try:
            return await self._values(names)
        except RedisDown:
            metrics.cache_errors.labels("down").inc(len(names))
        except Exception:  # this task's edge: whatever it was, those who wait must not wait for ever
            log.exception("redis refused to read recordings; they count as misses")
            metrics.cache_errors.labels("not_read").inc(len(names))
        return [None] * len(names)

    async def _values(self, names: list[str]) -> list[bytes | None]:
        """The values, in order; None where there is none, or (MGET says so) something that is not a string.

        Raises RedisDown.
        """
        if not self._one_by_one:
            return list(await self._link.ask(lambda redis: redis.mget(names)))

        async def value(name: str) -> bytes | None:
            try:
                return bytes(found) if (found := await self._link.ask(lambda redis: redis.get(name))) else None
            except ResponseError:
                return None

        return [await value(name) for name in names]

    async def _discard(self, broken: dict[str, str]) -> None:
        """What lies there is no answer of ours: count it and take it away, so that the next one is."""
        for name, reason in broken.items():
            metrics.cache_errors.labels(reason).inc()
            log.warning("a value in redis is no recording of ours (%s); it reads as a miss and is removed", reason)
            with contextlib.suppress(RedisDown, ResponseError):
                await self._link.ask(_unlink(name))


def jittered(ttl_s: float) -> float:
    """A time to live, give or take TTL_JITTER."""
    return ttl_s * random.uniform(1 - TTL_JITTER, 1 + TTL_JITTER)  # noqa: S311 - no secret


def _scan(cursor: int, pattern: str, node: Any) -> Callable[[Any], Awaitable[tuple[int, list[bytes]]]]:
    """A page of names and where the next begins, 0 after the last; `node` is one of a Cluster's, or None."""

    async def page(redis: Any) -> tuple[int, list[bytes]]:
        if node is None:
            return await redis.scan(cursor, match=pattern, count=SCAN_COUNT)  # type: ignore[no-any-return]
        cursors, names = await redis.scan(cursor, match=pattern, count=SCAN_COUNT, target_nodes=node)
        return cursors[node.name], names

    return page


def _unlink(name: str) -> Callable[[Any], Awaitable[Any]]:
    return lambda redis: redis.unlink(name)


def age_s(recording: Recording) -> float:
    """Seconds since it was recorded; never negative, should clocks disagree."""
    return max(0.0, time.time() - recording.recorded_at)
