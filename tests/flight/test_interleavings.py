"""Every order of leading, following, leaving and dying that hypothesis finds, on a real Redis.

Two servers' flights live in one loop. Dying is what a SIGKILL is to the others: nothing is released, nothing is said
any more. Whoever is aboard a server that lives gets the whole text, each word once; and so does who lost the
connection and came back, to whichever server, also where flights meet their limit and are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.cache.link import Link
from app.domain import Endpoint, Timings
from app.errors import StreamLost
from app.flight.flight import Flight, Seat, Ticket
from app.flight.flights import Flights
from app.flight.names import Position, position
from app.flight.ride import Ride
from app.settings import Settings
from tests.conftest import RedisServer, make_settings

WORDS = [f"w{number} " for number in range(8)]
TRUTH = "".join(WORDS)
LEASE_S = 0.3


@dataclass
class World:
    """How much the model may have said, and who asked it to."""

    said: int = 0
    generations: int = 0
    running: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def fly(self, flight: Flight) -> AsyncGenerator[bytes, None]:
        self.generations += 1
        self.running += 1
        ident = f"chatcmpl-{secrets.token_hex(4)}"

        def event(delta: dict, finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            document = {"id": ident, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"

        try:
            yield event({"role": "assistant", "content": ""})
            for number, word in enumerate(WORDS):
                while self.said <= number:
                    changed = self.changed
                    await changed.wait()
                yield event({"content": word})
            yield event({"content": ""}, "stop")
            yield b"data: [DONE]\n\n"
        finally:
            self.running -= 1

    def say(self, words: int) -> None:
        self.said = min(len(WORDS), self.said + words)
        self.changed.set()
        self.changed = asyncio.Event()


class Server:
    def __init__(self, options: Settings, url: str) -> None:
        self.link = Link(options, url)
        self.flights = Flights(options, self.link, url, is_alone=False)

    async def die(self) -> None:
        async def silence(_: object) -> None:
            await asyncio.Event().wait()

        self.link._up = False  # nothing it would still say reaches Redis
        await self.flights.close()
        await self.link.close()


OWNER = "tenant t"


@dataclass
class Client:
    server: Server
    is_kept: bool = False
    text: str = ""
    is_whole: bool = False
    seen: Position | None = None
    task: asyncio.Task[None] | None = None

    async def ask(self, world: World, key: str) -> None:
        ticket = Ticket(key, Endpoint.CHAT, OWNER, "m@0", is_stream=True, is_shared=True, is_kept=self.is_kept)
        with self.server.flights.board(ticket, world.fly, is_streaming=True, position=self.seen) as seat:
            await self._read(seat)

    async def come_back(self, world: World, key: str) -> None:
        """As a POST with `Last-Event-ID` does: the stream if it is here, else aboard whatever flies of it, or anew."""
        while not self.is_whole:
            with contextlib.suppress(StreamLost):  # its server died after all: once more
                if self.seen is not None:
                    async with self.server.flights.resume(self.seen, [OWNER], here_alone=True) as seat:
                        if seat is not None:
                            await self._read(seat)
                            continue
                await self.ask(world, key)

    async def _read(self, seat: Seat) -> None:
        answer = await Ride(seat, True, False, {}, Timings()).answer()
        async for event in answer.events:
            head, _, data = event.rpartition(b"data: ")
            if head:
                self.seen = position(head[4:].strip().decode())
            if data == b"[DONE]\n\n":
                self.is_whole = True
            else:
                self.text += json.loads(data)["choices"][0]["delta"].get("content") or ""


class Interleavings(RuleBasedStateMachine):
    redis: RedisServer
    home: Path
    resume_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.key = secrets.token_hex(32)
        self.namespace = f"s{secrets.token_hex(6)}"
        self.deaths = self.emptied = 0
        self.clients: list[Client] = []
        self.run(self._begin())

    async def _begin(self) -> None:
        self.world = World()
        self.servers = [self._server(), self._server()]

    def _server(self) -> Server:
        options = make_settings(
            self.home,
            self.redis,
            redis_namespace=self.namespace,
            flight_lease_s=LEASE_S,
            stream_resume_s=self.resume_s,
        )
        return Server(options, self.redis.url)

    def run(self, work) -> None:
        self.runner.run(work)

    @rule(at=st.integers(0, 1))
    def ask(self, at: int) -> None:
        async def asking() -> None:
            client = Client(self.servers[at], is_kept=self.resume_s > 0)
            client.task = asyncio.create_task(client.ask(self.world, self.key))
            self.clients.append(client)
            await asyncio.sleep(0.02)  # time to board; the loop stands still between the rules

        self.run(asking())

    @rule(words=st.integers(1, 3))
    def say(self, words: int) -> None:
        async def saying() -> None:
            self.world.say(words)
            await asyncio.sleep(0.02)

        self.run(saying())

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = self.clients.pop(data.draw(st.integers(0, len(self.clients) - 1)))
        self.run(self._gone([client]))
        self.emptied += not self.clients

    @rule(at=st.integers(0, 1))
    def die(self, at: int) -> None:
        """A server is killed, its clients with it, and another starts in its place."""
        self._die(at)

    def _die(self, at: int) -> None:
        async def dying() -> None:
            dead = self.servers[at]
            theirs = [client for client in self.clients if client.server is dead]
            self.clients = [client for client in self.clients if client.server is not dead]
            await dead.die()
            await self._gone(theirs)
            self.servers[at] = self._server()

        self.deaths += 1
        self.run(dying())
        self.emptied += not self.clients

    @rule()
    def time_passes(self) -> None:
        """Longer than a lease."""
        self.run(asyncio.sleep(2 * LEASE_S))

    async def _gone(self, clients: list[Client]) -> None:
        for client in clients:
            client.task.cancel()
        await asyncio.gather(*(client.task for client in clients), return_exceptions=True)

    @invariant()
    def nobody_got_a_word_twice_or_out_of_order(self) -> None:
        for client in self.clients:
            assert TRUTH.startswith(client.text), client.text

    def teardown(self) -> None:
        async def ending() -> None:
            self.world.say(len(WORDS))
            async with asyncio.timeout(20):
                await asyncio.gather(*(client.task for client in self.clients))
                for client in self.clients:
                    assert (client.text, client.is_whole) == (TRUTH, True)
                while self.world.running:
                    await asyncio.sleep(0.02)  # an engine that goes on for nobody would be found here
            for server in self.servers:
                await server.flights.close()
                await server.link.close()

        try:
            self.run(ending())
        finally:
            self.runner.close()


class ComingBack(Interleavings):
    """Clients lose their connections, also with the server, and come back; flights may be closed for their size."""

    resume_s = 30.0

    def __init__(self) -> None:
        self.limit_bytes: int | None = None
        self.lost: list[Client] = []
        super().__init__()

    @initialize(limit_bytes=st.sampled_from([None, 600, 1200]))
    def limit(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        for server in self.servers:
            self._limit(server)

    def _server(self) -> Server:
        server = super()._server()
        self._limit(server)
        return server

    def _limit(self, server: Server) -> None:
        if self.limit_bytes:
            server.flights._hold._each_bytes = self.limit_bytes

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        client = self.clients.pop(data.draw(st.integers(0, len(self.clients) - 1)))
        self.run(self._gone([client]))
        self.lost.append(client)

    @rule(at=st.integers(0, 1))
    def die(self, at: int) -> None:
        self.lost += [client for client in self.clients if client.server is self.servers[at]]
        self._die(at)

    @precondition(lambda self: self.lost)
    @rule(data=st.data(), at=st.integers(0, 1))
    def come_back(self, data: st.DataObject, at: int) -> None:
        self.run(self._back(self.lost.pop(data.draw(st.integers(0, len(self.lost) - 1))), self.servers[at]))

    async def _back(self, client: Client, server: Server) -> None:
        client.server = server
        client.task = asyncio.create_task(client.come_back(self.world, self.key))
        self.clients.append(client)
        await asyncio.sleep(0.02)

    def teardown(self) -> None:
        for client in self.lost:
            self.run(self._back(client, self.servers[0]))
        super().teardown()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("machine", "examples"), [(Interleavings, 15), (ComingBack, 12)])
def test_every_interleaving_gives_everybody_the_whole_text(
    shared_redis: RedisServer, tmp_path: Path, machine: type[Interleavings], examples: int
) -> None:
    Interleavings.redis, Interleavings.home = shared_redis, tmp_path
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            derandomize=True,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )
