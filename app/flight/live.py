"""A flight's events in Redis: what its leader writes, and one reader for all that this process follows.

The live stream is a Redis stream of entries. Each leader opens with an `open` entry under its token; its others
are numbered on from there, so that a reader knows an entry that is missing. The last is `end` or `fail`: a stream
without either is one whose leader still works, or died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from redis.exceptions import ResponseError

from app.cache.link import FAILURES, Link, client, ended
from app.cache.seal import NotOurs, Seal
from app.errors import AppError, RedisDown
from app.flight import names
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

# Longest that a read waits at the server; a stream that is newly followed joins the next read.
BLOCK_MS = 100
# Entries taken per stream and read, so that one long stream does not hold up the others.
READ_COUNT = 64
RETRY_S = 0.25


class Told(msgspec.Struct, frozen=True, array_like=True):
    """The public face of an error, on its way to another process."""

    message: str
    status: int
    type: str
    code: str | None
    param: str | None
    headers: dict[str, str]

    @classmethod
    def of(cls, error: AppError) -> Told:
        return cls(error.message, error.status, error.type, error.code, error.param, error.headers)

    def error(self) -> AppError:
        return AppError(
            self.message,
            status=self.status,
            type=self.type,
            code=self.code,
            param=self.param,
            headers=self.headers,
        )


class About(msgspec.Struct, frozen=True, array_like=True):
    """What a flight is: enough to follow or resume it without having seen its call."""

    key: str
    endpoint: str
    owner: str
    weights: str
    is_stream: bool


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """`content` are whole events of the leader's form (or the body); `about` is in `open`, `error` in `fail`.

    `cut`: the leader goes on and publishes no more, for the stream has become too large.
    """

    kind: Literal["open", "events", "end", "fail", "cut"]
    token: str
    number: int
    content: bytes = b""
    about: About | None = None
    error: Told | None = None
    tokens: tuple[int, int] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


class Script:
    """Entries to bytes and back, closed for the stream that they are in."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal

    def write(self, entry: Entry, uid: str) -> bytes:
        return self._seal.close(_encode(entry), uid.encode())

    def read(self, value: bytes, uid: str) -> Entry | None:
        """The entry, or None: foreign, broken, or closed by somebody else."""
        try:
            return _decode(self._seal.open(value, uid.encode()))
        except (NotOurs, ValueError):
            metrics.cache_errors.labels("stream_unreadable").inc()
            return None


class Following:
    """One who follows a stream, and how far it has come."""

    def __init__(self, namespace: str, uid: str, take: Callable[[Entry | None], None]) -> None:
        self.name = names.live(namespace, uid)
        self.uid = uid
        self.take = take
        self.last = b"0"


class Reader:
    """Reads the live streams that this process follows, all in one blocking read, on a connection of its own."""

    def __init__(self, settings: Settings, link: Link, url: str, script: Script) -> None:
        self._namespace = settings.redis_namespace
        self._one_by_one = settings.redis_cluster  # in a Cluster the keys of one command must share a slot
        patience_s = settings.redis_timeout_s + BLOCK_MS / 1000 + 0.5
        self._open_client: Callable[[], Any] = lambda: client(settings, url, patience_s)
        self._client: Any = None
        self._link = link
        self._script = script
        self._following: set[Following] = set()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def follow(self, uid: str, take: Callable[[Entry | None], None]) -> Following:
        """Give `take` every entry from the stream's first on, in order; None for one that is not ours.

        What is there already has been taken when this returns; give what it returns to `leave`. Raises RedisDown.
        """
        following = Following(self._namespace, uid, take)
        await self.catch_up(following)
        self._following.add(following)
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.create_task(self._read_on(), name="live-reader")
        return following

    def leave(self, following: Following) -> None:
        self._following.discard(following)

    async def catch_up(self, following: Following) -> None:
        """Take what the stream holds and has not been taken. Raises RedisDown."""
        while True:
            after = "-" if following.last == b"0" else b"(" + following.last
            try:
                found = await self._link.ask(_range(following.name, after))
            except ResponseError as error:
                raise RedisDown(str(error)) from error
            self._hand(following, found)
            if len(found) < READ_COUNT:
                return

    async def close(self) -> None:
        if self._task:
            await ended(self._task)
        if self._client is not None:
            await self._client.aclose()

    async def _read_on(self) -> None:
        while True:
            if not self._following:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                await self._read()
            except FAILURES as error:  # who follows finds out by its lease whether Redis is gone
                log.debug("a read of live streams failed: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        if self._client is None:
            self._client = self._open_client()
        asked = list(self._following)
        if self._one_by_one:
            for each in asked:
                after = "-" if each.last == b"0" else b"(" + each.last
                self._hand(each, await self._client.xrange(each.name, after, "+", count=READ_COUNT))
            await asyncio.sleep(BLOCK_MS / 1000)
            return
        positions: dict[Any, Any] = {}
        for each in sorted(asked, key=lambda each: _order(each.last), reverse=True):
            positions[each.name] = each.last  # of several on one stream the one that is furthest back
        answer = await self._client.xread(positions, count=READ_COUNT, block=BLOCK_MS) or {}
        for name, found in answer.items() if isinstance(answer, dict) else answer:
            batch = found[0] if isinstance(answer, dict) else found
            for each in asked:
                if each.name == name.decode() and each in self._following:
                    self._hand(each, batch)

    def _hand(self, following: Following, found: list[Any]) -> None:
        for ident, members in found:
            if _order(ident) > _order(following.last):  # both kinds of read may bring an entry
                following.last = ident
                following.take(self._script.read(members.get(b"e", b""), following.uid))


def _order(ident: bytes) -> tuple[int, int]:
    milliseconds, _, number = ident.partition(b"-")
    return int(milliseconds), int(number or 0)


def _range(name: str, after: Any) -> Callable[[Any], Any]:
    return lambda redis: redis.xrange(name, after, "+", count=READ_COUNT)
