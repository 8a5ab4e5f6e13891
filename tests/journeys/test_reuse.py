"""Recordings that serve more than the call they were made for; pools; what is past its time; what is refused."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable

import pytest
import redis

from app.errors import BadCall, EngineFailed
from app.gate.keys import KeyFile
from tests.conftest import RedisServer, Running, chat, until
from tests.flight.asking import CHAT, Asking, on_loop, script_of


def post(running: Running, body: dict, **headers: str):
    with running.client() as client:
        return client.post(CHAT, json=body, headers={name.replace("_", "-"): each for name, each in headers.items()})


def said(response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def nobody_leads(running: Running) -> bool:
    """Clients of a flight that failed hear of it before Redis does; until then, who asks the same shares its end."""
    client = redis.Redis.from_url(running.settings.redis_url.get_secret_value())
    return not client.keys(f"{running.settings.redis_namespace}:flight:*:lease")


@pytest.fixture(params=["a shared redis", "its own redis"])
def either(request: pytest.FixtureRequest, serve: Callable[..., Running]) -> Running:
    """Where nobody else records, a miss is looked for once."""
    return serve() if request.param == "a shared redis" else serve(None)


def test_a_longer_answer_serves_smaller_limits_cut_at_the_token(either: Running) -> None:
    whole = said(post(either, chat(max_tokens=12)))
    cut = post(either, chat(max_tokens=5))
    assert cut.headers["x-cache"] == "hit"
    assert said(cut) == "".join(f"{word} " for word in whole.split()[:5])
    assert cut.json()["usage"]["completion_tokens"] == 5
    assert cut.json()["choices"][0]["finish_reason"] == "length"
    assert post(either, chat(max_completion_tokens=5)).headers["x-cache"] == "hit"
    assert post(either, chat(max_tokens=13)).headers["x-cache"] == "miss", "it did not end by itself"
    assert post(either, chat(max_tokens=12)).headers["x-cache"] == "hit", "and the longer one serves them all"


def test_messages_are_cut_too_in_either_form(server: Running) -> None:
    body = chat(max_tokens=12)
    with server.client() as client:
        whole = client.post("/v1/messages", json=body).json()["content"][0]["text"]
        cut = client.post("/v1/messages", json=body | {"max_tokens": 5})
        streamed = client.post("/v1/messages", json=body | {"max_tokens": 5, "stream": True})
    words = "".join(f"{word} " for word in whole.split()[:5])
    assert (cut.headers["x-cache"], streamed.headers["x-cache"]) == ("hit", "hit")
    assert cut.json()["content"] == [{"type": "text", "text": words}]
    assert (cut.json()["stop_reason"], cut.json()["usage"]["output_tokens"]) == ("max_tokens", 5)
    kinds = [line[7:] for line in streamed.text.splitlines() if line.startswith("event: ")]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_miss_is_looked_for_once_where_nobody_else_records(serve: Callable[..., Running]) -> None:
    running = serve(None)
    link = running.app.state.service.store.link

    def looks() -> int:
        asked = asyncio.run_coroutine_threadsafe(
            link.ask(lambda redis: redis.info("commandstats")), running.engine.loop
        )
        return int(asked.result(30)["cmdstat_mget"]["calls"])

    post(running, chat("first"))
    before = looks()
    assert post(running, chat("second")).headers["x-cache"] == "miss"
    assert looks() == before + 1
    assert post(running, chat("second")).headers["x-cache"] == "hit"


def test_what_cannot_be_cut_is_kept_beside_and_both_stay_hits(either: Running) -> None:
    """A tool call cut short is none; so each limit has an answer of its own, and neither drives the other out."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    one, other = chat(max_tokens=5, tools=[tool]), chat(max_tokens=9, tools=[tool])
    assert [post(either, body).headers["x-cache"] for body in (one, other)] == ["miss", "miss"]
    assert [post(either, body).headers["x-cache"] for body in (one, other, one)] == ["hit"] * 3


def test_no_cache_refreshes_what_a_family_serves(server: Running) -> None:
    post(server, chat(max_tokens=9))
    assert post(server, chat(max_tokens=5), cache_control="no-cache").headers["x-cache"] == "miss"
    assert post(server, chat(max_tokens=5)).headers["x-cache"] == "hit"


def test_a_pool_keeps_its_variety_and_stops_the_cost(serve: Callable[..., Running]) -> None:
    running = serve(cache_samples=4)
    drawn = Counter(post(running, chat(temperature=1)).headers["x-cache-key"] for _ in range(80))
    assert len(drawn) == 4
    assert len(running.engine.calls) == 4
    assert min(drawn.values()) >= 5, "uniform: fewer than 5 of 80 happens once in 100,000"
    assert post(running, chat()).headers["x-cache-key"] not in drawn, "a greedy call draws nothing"
    assert post(running, chat(temperature=1, seed=5)).headers["x-cache-key"] not in drawn


def test_a_pool_can_be_asked_for_by_a_call_and_follow_its_user(server: Running) -> None:
    assert post(server, chat(temperature=1)).headers["x-cache"] == "bypass"
    pool = {"samples": 16, "sticky": True}
    for user in ("ann", "bob"):
        keys = {post(server, chat(temperature=1, user=user, cache=pool)).headers["x-cache-key"] for _ in range(5)}
        assert len(keys) == 1, user
    refused = post(server, chat(temperature=1, cache={"samples": 1000}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cache.samples"


def test_an_idempotency_key_holds_one_draw(serve: Callable[..., Running]) -> None:
    running = serve(cache_samples=8)
    replies = [post(running, chat(temperature=1), idempotency_key="k") for _ in range(6)]
    assert len({reply.headers["x-cache-key"] for reply in replies}) == 1


def test_past_its_time_a_recording_answers_while_one_call_refreshes_it(serve: Callable[..., Running]) -> None:
    running = serve(cache_ttl_s=1, cache_stale_while_revalidate_s=60, is_driven=True)
    first, script = Asking(running.url, chat()), script_of(running)
    on_loop(running, script.say, "old ")
    on_loop(running, script.finish)
    assert first.done().status == "miss"

    def told() -> tuple[str, str]:
        reply = post(running, chat())
        assert reply.headers["x-cache"] == "hit" or int(reply.headers["age"]) >= 1, "past its time"
        return reply.headers["x-cache"], said(reply)

    assert until(lambda: None if (reply := told())[0] == "hit" else reply) == ("stale", "old ")
    script = script_of(running)
    assert [told() for _ in range(5)] == [("stale", "old ")] * 5, "nobody waited"
    assert len(running.engine.calls) == 2
    on_loop(running, script.say, "new ")
    on_loop(running, script.finish)
    status, _ = until(lambda: reply if (reply := told())[1] == "new " else None)
    assert status in ("hit", "stale"), "it may be past its time by now, as the old one was"


def test_past_its_time_a_recording_answers_where_the_engine_fails(serve: Callable[..., Running]) -> None:
    running = serve(cache_ttl_s=1, cache_stale_if_error_s=60, is_driven=True)
    first, script = Asking(running.url, chat()), script_of(running)
    on_loop(running, script.say, "hello ")
    on_loop(running, script.finish)
    assert first.done().text == "hello "
    until(lambda: int(post(running, chat(), cache_control="only-if-cached").headers.get("age", 9)) >= 1)
    until(lambda: post(running, chat(), cache_control="only-if-cached").status_code == 504)
    for stream in (False, True):
        until(lambda: nobody_leads(running))
        asked, script = Asking(running.url, chat(stream=stream)), script_of(running)
        on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
        assert asked.done().status == "stale"
        assert asked.text == "hello "


def test_a_call_refused_for_good_is_refused_from_memory(serve: Callable[..., Running]) -> None:
    running = serve(cache_negative_s=60, is_driven=True)
    first, script = Asking(running.url, chat()), script_of(running)
    on_loop(running, script.fail, BadCall("the prompt is too long", param="messages"))
    first.done()
    for _ in range(5):
        again = post(running, chat())
        assert (again.status_code, again.json()["error"]["param"]) == (400, "messages")
    assert len(running.engine.calls) == 1


def test_without_the_settings_nothing_of_this_happens(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    for _ in range(2):
        until(lambda: nobody_leads(running))
        asked, script = Asking(running.url, chat()), script_of(running)
        on_loop(running, script.fail, BadCall("the prompt is too long", param="messages"))
        assert asked.done().response.status_code == 400
    assert len(running.engine.calls) == 2


@pytest.mark.parametrize(
    ("scope", "shared"), [("tenant", (True, False)), ("global", (True, True)), ("key", (False, False))]
)
def test_who_shares_answers_is_the_servers_setting_alone(
    serve: Callable[..., Running], settings, scope: str, shared: tuple[bool, bool]
) -> None:
    file = KeyFile(settings.home / "keys.json")
    first, colleague, stranger = ({"authorization": f"Bearer {file.create(who)[0]}"} for who in ("one", "one", "two"))
    running = serve(cache_scope=scope)
    assert post(running, chat(), **first).headers["x-cache"] == "miss"
    assert post(running, chat(), **first).headers["x-cache"] == "hit"
    for other, is_shared in zip((colleague, stranger), shared, strict=True):
        assert (post(running, chat(), **other).headers["x-cache"] == "hit") is is_shared
    widened = post(running, chat("new", cache={"scope": "global"}), **first)
    assert widened.status_code == 400, "a request cannot widen it"


def everything_in(redis_server: RedisServer) -> bytes:
    """Every value that it holds, strings and streams, and every name."""
    client = redis.Redis(unix_socket_path=str(redis_server.directory / "r.sock"))
    values = []
    for name in client.keys("*"):
        kind = client.type(name)
        values += [name, client.get(name) or b"" if kind == b"string" else repr(client.xrange(name)).encode()]
    return b"".join(values)


@pytest.mark.parametrize("encrypts", [False, True])
def test_encrypted_redis_holds_no_word_of_an_answer_and_serves_it_all_the_same(
    serve: Callable[..., Running], own_redis: RedisServer, encrypts: bool
) -> None:
    """Recordings and live streams; without encryption the words are there to be found, so the test can fail."""
    options = {"redis_namespace": "r", "cache_secret": "s" * 32, "cache_encrypt": encrypts, "stream_resume_s": 30}
    here, there = (serve(own_redis, **options, cache_near_mib=0, is_driven=True) for _ in range(2))
    asked, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, "confidential ")
    follower = Asking(there.url, chat(stream=True))
    until(lambda: "confidential" in follower.text)
    on_loop(here, script.finish)
    assert asked.done().text == follower.done().text == "confidential "
    assert post(there, chat()).headers["x-cache"] == "hit"
    assert (b"confidential" in everything_in(own_redis)) is not encrypts


def test_what_cannot_be_decrypted_is_a_miss_and_counted_and_an_older_secret_opens_it(
    serve: Callable[..., Running], own_redis: RedisServer
) -> None:
    options = {"redis_namespace": "r", "cache_encrypt": True, "cache_near_mib": 0}
    before, rotated = serve(own_redis, **options, cache_secret="a" * 32), "b" * 32
    assert post(before, chat()).headers["x-cache"] == "miss"
    patient = serve(own_redis, **options, cache_secret=rotated, cache_old_secrets=f"{'c' * 16}, {'a' * 32}")
    assert post(patient, chat()).headers["x-cache"] == "hit"
    hasty = serve(own_redis, **options, cache_secret=rotated)
    with hasty.client() as client:
        counted = 'refrain_cache_errors_total{cause="corrupt"}'
        said = client.get("/metrics").text
        corrupt = float(said.split(f"{counted} ")[1].split()[0]) if counted in said else 0.0
        assert post(hasty, chat()).headers["x-cache"] == "miss"
        assert f"{counted} {corrupt + 1}" in client.get("/metrics").text
    assert post(hasty, chat()).headers["x-cache"] == "hit"


def test_with_a_secret_nobody_else_can_plant_an_answer(serve: Callable[..., Running], own_redis: RedisServer) -> None:
    """A writer in Redis without the secret makes a valid recording by the book; it does not open."""
    namespace = f"mac{secrets.token_hex(4)}"
    with_secret = serve(own_redis, redis_namespace=namespace, cache_secret="s" * 32)
    without = serve(own_redis, redis_namespace=namespace)
    assert post(without, chat()).headers["x-cache"] == "miss", "planted"
    assert post(with_secret, chat()).headers["x-cache"] == "miss"
    assert post(with_secret, chat()).headers["x-cache"] == "hit"
    client = redis.Redis(unix_socket_path=str(own_redis.directory / "r.sock"))
    (name,) = client.keys(f"{namespace}:answer:*")
    assert post(without, chat()).headers["x-cache"] == "miss", "and it opens none of theirs"
    assert client.get(name)
