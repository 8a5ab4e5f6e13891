"""Every order of leading, following, leaving and dying that hypothesis finds, on a real Redis.

Two servers' flights live in one loop. Dying is what a SIGKILL is to the others: nothing is released, nothing is said
any more. Whoever is aboard a server that lives gets the whole text, each word once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from app.cache.link import Link
from app.domain import Endpoint, Timings
from app.flight.flight import Flight, Ticket
from app.flight.flights import Flights
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


@dataclass
class Client:
    server: Server
    text: str = ""
    is_whole: bool = False
    task: asyncio.Task[None] | None = None

    async def ask(self, world: World, key: str) -> None:
        ticket = Ticket(key, Endpoint.CHAT, "tenant t", "m@0", is_stream=True, is_shared=True, is_kept=False)
        with self.server.flights.board(ticket, world.fly, is_streaming=True) as seat:
            answer = await Ride(seat, True, False, {}, Timings()).answer()
            async for event in answer.events:
                if event == b"data: [DONE]\n\n":
                    self.is_whole = True
                else:
                    self.text += json.loads(event[6:])["choices"][0]["delta"].get("content") or ""


class Interleavings(RuleBasedStateMachine):
    redis: RedisServer
    home: Path
    numbers = itertools.count()

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
        options = make_settings(self.home, self.redis, redis_namespace=self.namespace, flight_lease_s=LEASE_S)
        return Server(options, self.redis.url)

    def run(self, work) -> None:
        self.runner.run(work)

    @rule(at=st.integers(0, 1))
    def ask(self, at: int) -> None:
        async def asking() -> None:
            client = Client(self.servers[at])
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


@pytest.mark.timeout(300)
def test_every_interleaving_gives_everybody_the_whole_text(shared_redis: RedisServer, tmp_path: Path) -> None:
    Interleavings.redis, Interleavings.home = shared_redis, tmp_path
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=15,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )
