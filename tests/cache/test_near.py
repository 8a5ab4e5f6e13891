"""Hot hits come from this process's own memory, and are right all the same: a real Redis tells of every change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from app.cache import tracking
from app.cache.near import Held, Near
from app.cache.recording import Recording
from app.cache.store import Slot
from app.domain import Form
from tests.conftest import RedisServer, Running, chat, until

PATH = "/v1/chat/completions"
FAR = 4e9


def recording(size: int = 100, expires_at: float = FAR) -> Recording:
    return Recording(Form.BODY, 1.7e9, "chatcmpl-1", 1, b"x" * size, b"", b"", 3, 5, 0.25, expires_at, "m@0")


@pytest.fixture
def near() -> Near:
    near = Near(2**20)
    near.open()
    return near


def put(near: Near, key: str, held: Held) -> None:
    with near.reading() as take_in:
        take_in(key, held)


# --- the memory ------------------------------------------------------------------------------------


def test_nothing_is_taken_in_before_changes_are_heard_of_nor_after() -> None:
    near = Near(2**20)
    put(near, "a", Held(recording()))
    assert near.get("a") is None
    near.open()
    put(near, "a", Held(recording()))
    near.close()
    assert near.get("a") is not None
    put(near, "b", Held(recording()))
    assert near.get("b") is None
    near.open()
    assert near.get("a") is None, "what was held while nobody listened may be old"


def test_what_changed_while_it_was_being_read_is_not_taken_in(near: Near) -> None:
    with near.reading() as take_in:
        near.forget(["a"])
        take_in("a", Held(recording()))
        take_in("b", Held(recording()))
    assert near.get("a") is None
    assert near.get("b") is not None
    with near.reading() as take_in:
        near.clear()
        take_in("c", Held(recording()))
    assert near.get("c") is None


def test_an_expired_recording_is_gone(near: Near) -> None:
    put(near, "a", Held(recording(expires_at=time.time() - 1)))
    assert near.get("a") is None


def test_replays_count_and_the_bound_in_bytes_holds() -> None:
    near = Near(100_000)
    near.open()
    for number in range(100):
        put(near, str(number), Held(recording(3000)))
    kept = [key for number in range(100) if near.get(key := str(number))]
    assert 5 < len(kept) < 34
    assert kept[-1] == "99", "the oldest go first"
    held = near.get("99")
    assert held is not None
    made = [held.replay("stream", lambda: (lambda *_: b"", 60_000)) for _ in range(2)]
    assert made[0] is made[1]
    assert near.get("99") is None, "grown past what one entry may take"
    assert near.get("98") is not None
    put(near, "big", Held(recording(50_000)))
    assert near.get("big") is None


def test_what_is_made_of_a_recording_for_other_calls_counts_too_however_deep() -> None:
    near = Near(1_000_000)
    near.open()
    put(near, "a", whole := Held(recording()))
    part = whole.part(recording(2000))
    whole.replay("cut", lambda: (part, part.size_bytes))
    before = whole.size_bytes
    part.replay("stream", lambda: (lambda *_: b"", 10_000))
    assert whole.size_bytes == before + 10_000
    assert near.get("a") is whole
    part.replay("body", lambda: (lambda *_: b"", 60_000))
    assert near.get("a") is None, "grown past what one entry may take"


@given(st.lists(st.sampled_from(["read", "answer", "write", "hear"]), max_size=30))
def test_in_every_order_of_reads_writes_and_words_of_them_the_last_word_wins(steps: list[str]) -> None:
    """Redis holds a number; reads take it in when answered, words of writes come late but in order."""
    near = Near(2**20)
    near.open()
    stored, unheard = 0, 0
    reads: list[tuple] = []
    for step in steps:
        if step == "read":
            context = near.reading()
            reads.append((context, context.__enter__(), stored))
        elif step == "answer" and reads:
            context, take_in, value = reads.pop(0)
            take_in("a", Held(msgspec.structs.replace(recording(), prompt_tokens=value)))
            context.__exit__(None, None, None)
        elif step == "write":
            stored, unheard = stored + 1, unheard + 1
        elif step == "hear" and unheard:
            unheard -= 1
            near.forget(["a"])
        if not unheard and (held := near.get("a")):
            assert held.recording.prompt_tokens == stored


# --- with a real Redis -----------------------------------------------------------------------------


def ask(running: Running, content: str = "hello", **fields: object) -> tuple[str, str]:
    with running.client() as client:
        response = client.post(PATH, json=chat(content, **fields))
    response.raise_for_status()
    return response.headers["x-cache"], response.headers["x-cache-key"]


def metric(running: Running, name: str) -> float:
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def is_held(running: Running, key: str) -> bool:
    return running.app.state.service.store._near.get(key) is not None


@pytest.fixture
def hot(
    serve: Callable[..., Running], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, redis.Redis, str]]:
    """A server that holds one recording itself; a client of its Redis; the recording's key."""
    monkeypatch.setattr(tracking, "PING_AFTER_S", 20.0)  # who stands still for a moment is not taken for away
    running = serve(own_redis)
    until(lambda: running.app.state.service.store.is_near)
    ask(running)
    _, key = ask(running)
    until(lambda: ask(running)[0] == "hit" and is_held(running, key))
    with redis.Redis.from_url(own_redis.url) as client:
        until(lambda: not list(client.scan_iter("*:flight:*:lease")))  # until then the flight may be shared
        yield running, client, key


def name_of(running: Running, key: str) -> str:
    return Slot("default", "scripted", key).name(running.settings.redis_namespace)


def test_a_hot_hit_asks_nobody(hot: tuple[Running, redis.Redis, str]) -> None:
    running, client, _ = hot
    client.config_resetstat()
    for streaming in (False, True, False, True):
        assert ask(running, stream=streaming)[0] == "hit"
    asked = client.info("commandstats")
    assert "cmdstat_mget" not in asked  # what is left is the flight that is still being written down


@pytest.mark.parametrize("change", ["overwritten", "deleted", "expired", "flushed"])
def test_a_change_by_anybody_is_heard_of(hot: tuple[Running, redis.Redis, str], change: str) -> None:
    running, client, key = hot
    name = name_of(running, key)
    if change == "overwritten":
        client.set(name, b"something else")
    elif change == "deleted":
        client.unlink(name)
    elif change == "expired":
        client.pexpire(name, 1)
    else:
        client.flushdb()
    until(lambda: not is_held(running, key))
    assert ask(running)[0] == "miss"


def test_a_purge_counts_at_once(hot: tuple[Running, redis.Redis, str]) -> None:
    running, _, key = hot
    store = running.app.state.service.store
    asyncio.run_coroutine_threadsafe(store.purge(), running.engine.loop).result(10)
    assert not is_held(running, key)
    assert ask(running)[0] == "miss"


def test_what_changed_while_the_connection_was_away_is_not_given_after_it(
    hot: tuple[Running, redis.Redis, str],
) -> None:
    running, client, key = hot
    near = running.app.state.service.store._near
    name = name_of(running, key)
    mine = str(client.client_id())
    transaction = client.pipeline(transaction=True)  # the word of the change has no connection to come by
    for other in client.client_list():
        if str(other["id"]) != mine:
            transaction.client_kill_filter(_id=other["id"])
    transaction.unlink(name)
    transaction.execute()
    until(lambda: not is_held(running, key))
    until(lambda: near.is_open)
    until(lambda: ask(running)[0] == "hit")
    assert len(running.engine.calls) == 2, "the answer was generated anew, once"


def test_hot_hits_go_on_for_a_while_without_redis(
    hot: tuple[Running, redis.Redis, str], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _, key = hot
    near = running.app.state.service.store._near
    monkeypatch.setattr(tracking, "GRACE_S", 4.0)  # in which the next hit has to be asked for
    own_redis.send(9)
    until(lambda: not near.is_open)
    assert ask(running)[0] == "hit"
    until(lambda: not is_held(running, key))
    assert ask(running)[0] == "miss"
    own_redis.start()
    until(lambda: near.is_open)
    until(lambda: ask(running)[0] == "hit")


def test_a_redis_that_stands_still_is_noticed(serve: Callable[..., Running], own_redis: RedisServer) -> None:
    near = serve(own_redis).app.state.service.store._near
    until(lambda: near.is_open)
    own_redis.send(19)
    until(lambda: not near.is_open)
    own_redis.send(18)
    until(lambda: near.is_open)


def test_a_redis_that_does_not_tell_of_changes_is_asked_each_time(
    serve: Callable[..., Running], own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.acl_setuser(
            "plain", enabled=True, passwords=["+word"], keys=["*"], commands=["+@all", "-client|tracking"]
        )
    path = own_redis.url.removeprefix("unix://")
    running = serve(None, redis_url=f"unix://plain:word@{path}")
    assert [ask(running)[0] for _ in range(3)] == ["miss", "hit", "hit"]
    until(lambda: "does not tell of changes" in caplog.text)
    assert metric(running, "refrain_near_on") == 0


def test_none_is_held_where_the_setting_says_so(serve: Callable[..., Running], own_redis: RedisServer) -> None:
    running = serve(own_redis, cache_near_mib=0)
    assert ask(running)[0] == "miss"
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_resetstat()
        assert [ask(running)[0] for _ in range(3)] == ["hit"] * 3
        assert client.info("commandstats")["cmdstat_mget"]["calls"] == 3
