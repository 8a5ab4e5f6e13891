"""The server's side: starts the workers and starts them again, tells them what is served, adds up what they count.

```
server                                             worker
Begin: settings ─────────────────────────────────► opens its rooms
Serve: weights, and again whenever they change ──► listens; Done (who is silent is ended: it has old weights)
take  ◄─────────────────── Connection, with what the client has sent: it is no hit
give: Connection ────────────────────────────────► its next request may be one
Tell ────────────────────────────────────────────► Told: what it has counted
Stop ────────────────────────────────────────────► closes, hands over what has begun to arrive, ends
```
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from pydantic import SecretStr

from app.gate.keys import Gate
from app.observe import metrics
from app.observe.metrics import Counts
from app.service import Service
from app.settings import Settings, to_hand_down
from app.workers.channel import Begin, Channel, Connection, Done, Message, Serve, Stop, Tell, Told, detached

log = logging.getLogger(__name__)

START_S = 60.0
# One that is silent for so long is ended: it would go on with old weights, and its clients would wait.
SILENT_S = 5.0
LOOK_EVERY_S = 5.0
# A look at the metrics waits so long for a worker; then what it told last counts.
TELL_S = 0.5
STOP_S = 3.0
RESTART_AFTER_S = 0.1
LONGEST_PAUSE_S = 30.0
# One that ends before this age will not be better at once.
YOUNG_S = 10.0

Take = Callable[[socket.socket, bytes], Awaitable[None]]


class Pool:
    """As many workers as the settings say. Does nothing before `start`; after that, `end` it."""

    def __init__(self, settings: Settings, redis_url: str, service: Service, gate: Gate) -> None:
        self._settings = settings.model_copy(update={"redis_url": SecretStr(redis_url)})
        self._service = service
        self._gate = gate
        self._members: set[_Member] = set()
        self._turns = itertools.count()
        self._keepers: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()
        self._left_behind = Counts()
        self._ending = asyncio.Event()

    def start(self, listener: socket.socket, take: Take) -> None:
        """Returns at once; each worker joins when it is ready. `take` gets every connection that asks for no hit."""
        self._keepers = [
            asyncio.create_task(self._keep(listener, take), name="worker-keeper")
            for _ in range(self._settings.http_workers)
        ]

    async def end(self) -> None:
        """Every worker hands over what has begun to arrive and ends; one that does not is killed. Safe to repeat."""
        self._ending.set()
        for member in self._members:
            member.channel.send(Stop())
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=STOP_S)
            for keeper in late:
                keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*self._errands, return_exceptions=True)  # what was handed over last is being taken

    async def tell_served(self) -> None:
        """The catalog has changed. When this returns, no worker answers with what it was before."""
        await asyncio.gather(*(self._serve(member) for member in self._ready))

    def give(self, transport: asyncio.Transport) -> bool:
        """Its connection, on which nothing is asked now, is a worker's from here on. False: there is none."""
        ready = self._ready
        if not ready or self._ending.is_set():
            return False
        try:
            connection = detached(transport)
        except OSError:  # no descriptor is left
            return False
        metrics.child(metrics.connections_handed, "worker").inc()
        ready[next(self._turns) % len(ready)].channel.send(Connection(), connection)
        return True

    async def counted(self) -> Counts:
        """What all workers have counted, those that have ended too; within TELL_S."""
        await asyncio.gather(*(member.refresh_counts() for member in self._ready))
        total = self._left_behind.copy()
        for member in self._ready:
            total.update(member.counts)
        return total

    @property
    def _ready(self) -> list[_Member]:
        return [member for member in self._members if member.is_ready]

    async def _keep(self, listener: socket.socket, take: Take) -> None:
        """One worker after another."""
        pause_s = RESTART_AFTER_S
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                why = f"code {await self._live(_Member.spawned(listener), take)}"
            except OSError as error:  # no memory, or no descriptor, for another process
                why = str(error)
            if self._ending.is_set():
                return
            pause_s = RESTART_AFTER_S if time.monotonic() - began > YOUNG_S else min(2 * pause_s, LONGEST_PAUSE_S)
            log.warning("an http worker ended (%s); another starts in %.1f s", why, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._ending.wait()

    async def _live(self, member: _Member, take: Take) -> int:
        """With one worker, until it ends; its exit code."""
        self._members.add(member)
        tending = self._spawn(self._tend(member))
        try:
            async for message, connection in member.channel:
                if connection is not None:
                    received = message.received if isinstance(message, Connection) else b""
                    metrics.child(metrics.connections_handed, "server").inc()
                    self._spawn(take(connection, received))
                else:
                    member.hear(message)
        finally:
            tending.cancel()
            self._members.discard(member)
            self._left_behind.update(member.counts)
            member.end()
            code = await asyncio.to_thread(member.process.wait)
            metrics.http_workers.set(len(self._ready))
        return code

    async def _tend(self, member: _Member) -> None:
        """Begin with it, and look after it until it ends."""
        is_locked = not self._gate.is_open
        begun = await self._asked(
            member, lambda number: Begin(number, to_hand_down(self._settings), is_locked), START_S
        )
        if begun is None:
            return
        member.is_ready = True
        await self._serve(member)
        metrics.http_workers.set(len(self._ready))
        while member.is_ready:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._asked(member, Tell, SILENT_S)

    async def _serve(self, member: _Member) -> None:
        weights = [replace(serving.weights, fingerprint={}) for serving in self._service.catalog]
        await self._asked(member, lambda number: Serve(number, weights), SILENT_S)

    async def _asked(self, member: _Member, question: Callable[[int], Message], within_s: float) -> Message | None:
        """Its answer; None where it has ended, or was silent and is ended now."""
        try:
            return await member.ask(question, within_s)
        except TimeoutError:
            log.warning("an http worker was silent for %.0f s and is ended", within_s)
            member.process.kill()
            return None

    def _spawn(self, errand: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(errand)
        assert isinstance(task, asyncio.Task)  # noqa: S101 - of a coroutine
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task


class _Member:
    """One worker's process, and the questions that are on their way to it."""

    def __init__(self, process: subprocess.Popen[bytes], end: socket.socket) -> None:
        self.process = process
        self.channel = Channel(end)
        self.is_ready = False
        self.counts = Counts()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Message | None]] = {}

    @classmethod
    def spawned(cls, listener: socket.socket) -> _Member:
        ours, theirs = Channel.pair()
        with theirs:
            descriptors = (theirs.fileno(), listener.fileno())
            process = subprocess.Popen(
                [sys.executable, "-m", "app.workers", *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # a Ctrl-C is for the server
            )
        return cls(process, ours)

    async def ask(self, question: Callable[[int], Message], within_s: float) -> Message | None:
        """Its answer; None where it ends before. Raises TimeoutError."""
        number = next(self._numbers)
        answer: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self.channel.send(question(number))
        try:
            async with asyncio.timeout(within_s):
                return await answer
        finally:
            del self._asked[number]

    def hear(self, message: Message) -> None:
        if isinstance(message, Told):
            self.counts = Counts(message.counts)
        asked = self._asked.get(message.number) if isinstance(message, Done | Told) else None
        if asked is not None and not asked.done():
            asked.set_result(message)

    def end(self) -> None:
        self.is_ready = False
        for answer in self._asked.values():
            if not answer.done():
                answer.set_result(None)
        self.channel.close()
        self.process.kill()  # it may have closed its end and live on

    async def refresh_counts(self) -> None:
        with contextlib.suppress(TimeoutError):  # then what it told last counts
            await self.ask(Tell, TELL_S)
