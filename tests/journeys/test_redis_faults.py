"""Redis is stopped, killed, started again, filled with garbage, and full, under load: no call fails or is wrong."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from app.cache.embedded import EmbeddedRedis
from tests.conftest import RedisServer, Running, chat, make_settings, until

PROMPTS = [f"question {number}" for number in range(12)]
PATH = "/v1/chat/completions"
NUMBERS = itertools.count()


def answer(running: Running, prompt: str) -> tuple[str, str]:
    """`x-cache` and the text. Anything but a 200 fails the test."""
    with running.client() as client:
        response = client.post(PATH, json=chat(prompt))
    assert response.status_code == 200, response.text
    return response.headers["x-cache"], response.json()["choices"][0]["message"]["content"]


@contextlib.contextmanager
def load(running: Running, right: dict[str, str]) -> Iterator[None]:
    """Eight clients that ask all the time; at the end each of their answers was given, and right."""
    stop = threading.Event()
    wrong: list[str] = []
    answered = [0]

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            prompt = chance.choice(PROMPTS)
            _, text = answer(running, prompt)
            answered[0] += 1
            if text != right[prompt]:
                wrong.append(prompt)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, seed) for seed in range(8)]
        try:
            yield
            until(lambda: answered[0] > 8 or any(client.done() for client in clients))
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert answered[0] > 8
    assert wrong == []


@pytest.fixture
def right(serve: Callable[..., Running]) -> dict[str, str]:
    """What the engine says to each prompt, without any cache."""
    plain = serve(cache="off")
    return {prompt: answer(plain, prompt)[1] for prompt in PROMPTS}


@pytest.fixture
def warm(serve: Callable[..., Running], own_redis: RedisServer) -> Running:
    """A server on a Redis of its own, every prompt recorded."""
    running = serve(own_redis, redis_timeout_s=3)
    for prompt in PROMPTS:
        answer(running, prompt)
    return running


def gauge(running: Running, name: str) -> float:
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def is_missed(running: Running) -> bool:
    """Whether it is known that Redis is gone: who asks for what the server does not hold itself finds out."""
    assert answer(running, f"asked by nobody else, {next(NUMBERS)}")[0] == "miss"
    return gauge(running, "refrain_redis_up ") == 0


def test_a_stopped_redis_costs_a_moment_and_comes_back_by_itself(
    warm: Running, right: dict[str, str], own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.cache.link")
    with load(warm, right):
        own_redis.send(signal.SIGSTOP)
        until(lambda: is_missed(warm))
        # The load asks for these too: one may share what is under way, or be held by the server itself since it was
        # read from Redis. Nobody asks for the others.
        assert answer(warm, PROMPTS[0])[1] == right[PROMPTS[0]]
        assert is_missed(warm)
        own_redis.send(signal.SIGCONT)
        until(lambda: gauge(warm, "refrain_redis_up ") == 1)
        until(lambda: answer(warm, PROMPTS[0])[0] == "hit")
    said = [record.getMessage() for record in caplog.records if record.name == "app.cache.link"]
    assert sum("redis is down" in line for line in said) == 1, "one line per change of state, not one per call"
    assert sum("redis is back" in line for line in said) == 1


def test_a_killed_redis_that_starts_again_is_used_again(
    warm: Running, right: dict[str, str], own_redis: RedisServer
) -> None:
    with load(warm, right):
        own_redis.send(signal.SIGKILL)
        until(lambda: is_missed(warm))
        own_redis.start()
        until(lambda: answer(warm, "asked by nobody else")[0] == "hit")  # so it was recorded, and found there


def test_a_redis_that_was_never_there_refuses_nobody(serve: Callable[..., Running], tmp_path) -> None:
    running = serve(RedisServer(tmp_path))
    assert [answer(running, "hello")[0] for _ in range(3)] == ["miss"] * 3
    with running.client() as client:
        assert client.get("/readyz").json()["redis"] == "down"


def test_garbage_in_redis_is_never_served_and_is_healed(
    warm: Running, right: dict[str, str], own_redis: RedisServer
) -> None:
    """Noise, a value cut short, another key's value, a flipped byte, another type: all read as a miss."""
    client = redis.Redis(unix_socket_path=str(own_redis.directory / "r.sock"))
    chance = random.Random(3)
    before = gauge(warm, "refrain_cache_errors_total")
    planted: dict[bytes, bytes] = {}

    def are_hits() -> bool:
        for prompt in PROMPTS:
            status, text = answer(warm, prompt)
            assert text == right[prompt]
            if status != "hit":
                return False
        return True

    with load(warm, right):
        for _ in range(3):
            names = sorted(client.keys("*:answer:*"))
            values = [client.get(name) for name in names]
            for index, (name, value) in enumerate(zip(names, values, strict=True)):
                value = value or b"RFR2"
                flipped = bytearray(value)
                flipped[chance.randrange(len(flipped))] ^= 1
                garbage = [chance.randbytes(400), value[:-7], values[index - 1] or b"", bytes(flipped), b""]
                planted[name] = garbage[index % len(garbage)]
                client.set(name, planted[name], ex=100)
            for name in names[:2]:
                client.pipeline().delete(name).rpush(name, "not a string").execute()  # nothing may be recorded between
            # A hit proves nothing yet: until it hears of the change, the server answers from what it holds itself.
            until(lambda: all(client.type(name) == b"string" for name in planted))
            until(lambda: all(client.get(name) not in (None, value) for name, value in planted.items()))
    assert gauge(warm, "refrain_cache_errors_total") > before
    until(are_hits)


def test_a_full_redis_that_evicts_nothing_refuses_nobody(
    serve: Callable[..., Running], right: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    full = RedisServer(tmp_path_factory.mktemp("r"), options=("--maxmemory", "1mb", "--maxmemory-policy", "noeviction"))
    full.start()
    try:
        running = serve(full)
        with load(running, right):
            assert [answer(running, "hello")[0] for _ in range(3)] == ["miss"] * 3
    finally:
        full.stop()


async def test_the_embedded_server_evicts_recordings_and_never_what_has_no_ttl(tmp_path) -> None:
    embedded = EmbeddedRedis(make_settings(tmp_path, None, redis_max_memory_mib=8))
    await embedded.start()
    try:
        client = redis.Redis.from_url(embedded.url)
        client.set("counter", "1")
        for number in range(4000):
            client.set(f"recording:{number}", b"x" * 4096, ex=1000)
        assert client.info("stats")["evicted_keys"] > 0
        assert client.get("counter") == b"1"
    finally:
        await embedded.close()


async def test_two_embedded_servers_of_processes_with_the_same_number_leave_each_other_alone(tmp_path) -> None:
    """As in containers that share a volume: each is number 1 there."""
    one, other = (EmbeddedRedis(make_settings(tmp_path, None)) for _ in range(2))
    await one.start()
    try:
        await other.start()
        try:
            redis.Redis.from_url(one.url).set("whose", "one")
            assert redis.Redis.from_url(other.url).get("whose") is None
        finally:
            await other.close()
        assert redis.Redis.from_url(one.url).get("whose") == b"one"
    finally:
        await one.close()
    assert list((tmp_path / "run").iterdir()) == []
