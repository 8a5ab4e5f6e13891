"""Identical calls at the same time: one generation, in one process and across servers that share a Redis."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from app.engine import Phase
from app.errors import AppError, EngineDown, EngineFailed, QueueFull, QueueShareUsed
from app.flight import publisher
from app.gate.keys import KeyFile
from tests.conftest import RedisServer, Running, chat, start_process, until
from tests.flight.asking import CHAT, Asking, boarded, follows, on_loop, script_of

WORDS = [f"word{number} " for number in range(6)]


@pytest.fixture
def two(serve: Callable[..., Running]) -> tuple[Running, Running]:
    """Two servers on one Redis, whose engines say what the test says.

    Their leases are as long as by default: one that stands still for a second is not taken for dead.
    """
    options = {"redis_namespace": f"two{secrets.token_hex(4)}", "is_driven": True}
    return serve(**options), serve(**options)


def test_followers_share_one_generation_whenever_they_join_and_in_their_own_form(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    body = chat(stream=True)
    leader = Asking(running.url, body)
    script = script_of(running)
    on_loop(running, script.say, WORDS[0])
    until(lambda: leader.text == WORDS[0])
    follower = Asking(running.url, body | {"stream_options": {"include_usage": True}})
    plain = Asking(running.url, chat())
    until(lambda: follower.text == WORDS[0])
    for word in WORDS[1:]:
        on_loop(running, script.say, word)
    until(lambda: follower.text == "".join(WORDS))
    late = Asking(running.url, body)
    until(lambda: late.text == "".join(WORDS))
    until(lambda: boarded(running) == 4)
    on_loop(running, script.finish)
    everybody = [each.done() for each in (leader, follower, plain, late)]
    assert {each.text for each in everybody} == {"".join(WORDS)}
    assert [each.status for each in everybody] == ["miss", "shared", "shared", "shared"]
    assert all(each.is_whole for each in everybody)
    assert len(running.engine.calls) == 1
    streams = [each for each in everybody if each is not plain]
    assert len({each.payloads[0]["id"] for each in streams}) == 3, "each answer has an id of its own"
    assert [sum(1 for each in asked.payloads if each != "[DONE]" and each.get("usage")) for asked in streams] == [
        0,
        1,
        0,
    ]


def test_a_stream_may_follow_a_plain_call_live(serve: Callable[..., Running]) -> None:
    """A plain call of one text is generated as a stream, so that who follows it does not wait for its end."""
    running = serve(is_driven=True)
    plain = Asking(running.url, chat())
    script = script_of(running)
    follower = Asking(running.url, chat(stream=True))
    on_loop(running, script.say, WORDS[0])
    until(lambda: follower.text == WORDS[0])
    on_loop(running, script.finish)
    assert plain.done().text == follower.done().text == WORDS[0]
    assert plain.response.headers["content-type"] == "application/json"


def test_a_leaving_follower_disturbs_nobody_and_a_leaving_leader_does_not_end_it(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    leader, script = Asking(running.url, chat(stream=True)), script_of(running)
    followers = [Asking(running.url, chat(stream=True)) for _ in range(3)]
    on_loop(running, script.say, WORDS[0])
    until(lambda: all(each.text == WORDS[0] for each in (leader, *followers)))
    followers[0].leave()
    leader.leave()
    for word in WORDS[1:]:
        on_loop(running, script.say, word)
    until(lambda: followers[1].text == "".join(WORDS))
    assert not script.was_aborted
    on_loop(running, script.finish)
    assert followers[1].done().text == followers[2].done().text == "".join(WORDS)
    assert followers[1].is_whole


def test_the_engine_is_freed_when_the_last_one_leaves(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    everybody = [Asking(running.url, chat(stream=True))]
    script = script_of(running)
    everybody += [Asking(running.url, chat(stream=True)) for _ in range(2)]
    on_loop(running, script.say, WORDS[0])
    until(lambda: all(each.text for each in everybody))
    for each in everybody:
        each.leave()
    on_loop(running, script.say, WORDS[1])
    until(lambda: running.engine.running == 0)
    assert script.was_aborted


def test_a_failure_reaches_every_follower_as_a_failure(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    leader, script = Asking(running.url, chat(stream=True)), script_of(running)
    on_loop(running, script.say, WORDS[0])
    until(lambda: leader.text)
    follower, plain = Asking(running.url, chat(stream=True)), Asking(running.url, chat())
    until(lambda: follower.text)
    until(lambda: boarded(running) == 3)
    on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
    for each in (leader, follower):
        assert each.done().payloads[-1]["error"]["code"] == "engine_error"
        assert "[DONE]" not in each.payloads
    assert plain.done().response.status_code == 500


@pytest.mark.parametrize("fields", [{"temperature": 1}, {"cache": {"no_cache": True}}, {"cache": {"no_store": True}}])
def test_calls_that_may_not_share_an_answer_share_no_generation(serve: Callable[..., Running], fields: dict) -> None:
    running = serve(is_driven=True)
    asked = [Asking(running.url, chat(stream=True, **fields)) for _ in range(2)]
    for script in [script_of(running) for _ in asked]:
        on_loop(running, script.say, WORDS[0])
        on_loop(running, script.finish)
    assert all(each.done().status != "shared" for each in asked)


def test_tenants_share_no_generation(serve: Callable[..., Running], settings) -> None:
    file = KeyFile(settings.home / "keys.json")
    secrets_of_two = [file.create(tenant)[0] for tenant in ("one", "other")]
    running = serve(is_driven=True)
    asked = [Asking(running.url, chat(stream=True), authorization=f"Bearer {each}") for each in secrets_of_two]
    for script in [script_of(running) for _ in asked]:
        on_loop(running, script.say, WORDS[0])
        on_loop(running, script.finish)
    assert {each.done().status for each in asked} == {"miss"}


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_call_on_another_server_shares_the_generation(two: tuple[Running, Running], is_streaming: bool) -> None:
    here, there = two
    leader, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, WORDS[0])
    until(lambda: leader.text)
    follower = Asking(there.url, chat(stream=is_streaming))
    until(lambda: follows(there, here))
    if is_streaming:
        until(lambda: follower.text == WORDS[0])
    for word in WORDS[1:]:
        on_loop(here, script.say, word)
    on_loop(here, script.finish)
    assert leader.done().text == follower.done().text == "".join(WORDS)
    assert follower.is_whole
    assert there.engine.calls == []


def test_the_leader_goes_on_for_followers_elsewhere_and_no_longer(two: tuple[Running, Running]) -> None:
    here, there = two
    leader, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, WORDS[0])
    follower = Asking(there.url, chat(stream=True))
    until(lambda: follower.text == WORDS[0])
    leader.leave()
    on_loop(here, script.say, WORDS[1])
    until(lambda: follower.text == WORDS[0] + WORDS[1])
    until(lambda: boarded(here) == 0)
    assert not script.was_aborted
    follower.leave()
    on_loop(here, script.say, WORDS[2])
    until(lambda: here.engine.running == 0)
    assert script.was_aborted


def test_a_failure_elsewhere_is_told_with_its_own_status(two: tuple[Running, Running]) -> None:
    here, there = two
    leader, script = Asking(here.url, chat()), script_of(here)
    follower = Asking(there.url, chat())
    until(lambda: follows(there, here))
    on_loop(here, script.fail, EngineFailed("the engine failed on this call"))
    for each in (leader, follower):
        assert each.done().response.status_code == 500
        assert "engine_error" in "".join(each.lines)


@pytest.mark.parametrize("error", [EngineDown("the engine stopped"), QueueFull("full"), QueueShareUsed("too many")])
def test_followers_elsewhere_carry_on_what_a_leader_has_no_engine_for(
    two: tuple[Running, Running], error: AppError
) -> None:
    """503 is about a server, and 429 about a tenant, not about the call: its own clients hear it, the others do not."""
    here, there = two
    leader, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, WORDS[0])
    follower = Asking(there.url, chat(stream=True))
    until(lambda: follower.text == WORDS[0])
    on_loop(here, script.fail, error)
    assert leader.done().payloads[-1]["error"]["code"] == error.code
    again = script_of(there)
    for word in WORDS[:3]:
        on_loop(there, again.say, word)
    on_loop(there, again.finish)
    assert follower.done().text == "".join(WORDS[:3])
    assert follower.is_whole


def test_a_server_that_still_loads_does_not_hold_up_those_that_are_ready(serve: Callable[..., Running]) -> None:
    options = {"redis_namespace": f"two{secrets.token_hex(4)}"}
    loading, ready = serve(**options, is_ready=False, loading_wait_s=30), serve(**options)
    first = Asking(loading.url, chat())
    until(lambda: boarded(loading))
    assert Asking(ready.url, chat()).done().status == "miss"
    on_loop(loading, loading.engine.state.become, Phase.READY)
    assert first.done().status == "shared"
    assert loading.engine.calls == []


def test_a_follower_takes_over_from_a_server_that_died(
    serve: Callable[..., Running], shared_redis: RedisServer, tmp_path: Path
) -> None:
    """Killed in the middle of its stream: the follower elsewhere gets each word once, and the right end."""
    options = {"redis_namespace": f"dies{secrets.token_hex(4)}", "flight_lease_s": 0.6}
    there = serve(weights=_scripted_weights(), **options)
    # It would speak for half a minute: whatever holds up this test, it is killed before its end.
    environment = {f"REFRAIN_{name.upper()}": str(value) for name, value in options.items()}
    environment["REFRAIN_SCRIPTED_TOKENS_PER_S"] = "10"
    (tmp_path / "other").mkdir()
    dying = start_process(
        tmp_path / "other",
        tmp_path / "log",
        "--engine",
        "scripted",
        REFRAIN_REDIS_URL=shared_redis.url,
        **environment,
    )
    weights = there.app.state.service.weights
    dying_body = chat("to be continued", stream=True, max_tokens=300)
    with dying.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == weights.name
    try:
        whole = Asking(there.url, chat("to be continued", max_tokens=300, cache={"no_store": True, "no_cache": True}))
        leader = Asking(dying.url, dying_body)
        until(lambda: leader.text)
        follower = Asking(there.url, dying_body)
        until(lambda: follower.text.count(" ") >= 3)
        dying.process.send_signal(signal.SIGKILL)
        assert follower.done().text == whole.done().text
        assert follower.is_whole
        assert len({each["id"] for each in follower.payloads[:-1]}) == 1
        assert len(there.engine.calls) == 2, "the call without the cache, and the one that was taken over"
    finally:
        dying.process.kill()
        dying.process.wait()


def _scripted_weights():
    """What a process of its own serves with the scripted engine."""
    from app.main import find_weights
    from app.settings import Settings

    return find_weights(Settings(engine="scripted"), lambda _: None)


def test_a_leader_that_was_paused_cannot_write_any_more(
    serve: Callable[..., Running], shared_redis: RedisServer, tmp_path: Path
) -> None:
    """SIGSTOP for longer than the lease; then it goes on. Its follower has taken over and hears it no more."""
    options = {"redis_namespace": f"stop{secrets.token_hex(4)}", "flight_lease_s": 0.6}
    there = serve(weights=_scripted_weights(), **options)
    # Slow enough to be stopped in the middle also where this test is held up.
    environment = {f"REFRAIN_{name.upper()}": str(value) for name, value in options.items()}
    environment["REFRAIN_SCRIPTED_TOKENS_PER_S"] = "10"
    (tmp_path / "other").mkdir()
    paused = start_process(
        tmp_path / "other", tmp_path / "log", "--engine", "scripted", REFRAIN_REDIS_URL=shared_redis.url, **environment
    )
    try:
        body = chat("pause", stream=True, max_tokens=60)
        leader = Asking(paused.url, body)
        until(lambda: leader.text)
        follower = Asking(there.url, body)
        until(lambda: follower.text.count(" ") >= 3)
        paused.process.send_signal(signal.SIGSTOP)
        until(lambda: len(there.engine.calls) == 1)
        paused.process.send_signal(signal.SIGCONT)
        assert follower.done().is_whole
        assert leader.done().text == follower.text, "its own clients get all of it from it"
        with paused.client() as client:
            until(lambda: "refrain_flight_leases_lost_total 1.0" in client.get("/metrics").text)
    finally:
        paused.process.kill()
        paused.process.wait()


def test_without_redis_calls_of_one_server_still_share(serve: Callable[..., Running], tmp_path: Path) -> None:
    running = serve(RedisServer(tmp_path), is_driven=True)
    asked = [Asking(running.url, chat(stream=True))]
    script = script_of(running)
    asked += [Asking(running.url, chat(stream=True)), Asking(running.url, chat())]
    until(lambda: boarded(running) == 3)
    on_loop(running, script.say, WORDS[0])
    on_loop(running, script.finish)
    assert {each.done().text for each in asked} == {WORDS[0]}
    assert len(running.engine.calls) == 1


def test_a_redis_that_dies_in_the_middle_loses_nobody(
    serve: Callable[..., Running], own_redis: RedisServer, tmp_path: Path
) -> None:
    """The follower elsewhere has lost its leader's stream: it generates, and goes on where it was."""
    options = {"redis_namespace": "gone", "is_driven": True}
    here, there = serve(own_redis, **options), serve(own_redis, **options)
    leader, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, WORDS[0])
    follower = Asking(there.url, chat(stream=True))
    until(lambda: follower.text == WORDS[0])
    own_redis.send(signal.SIGKILL)
    again = script_of(there)
    for running, each in ((here, script), (there, again)):
        for word in WORDS[1 if each is script else 0 :]:
            on_loop(running, each.say, word)
        on_loop(running, each.finish)
    assert leader.done().text == follower.done().text == "".join(WORDS)
    assert follower.is_whole


def test_a_generation_made_again_that_differs_ends_in_an_error_and_is_never_mixed(
    serve: Callable[..., Running], own_redis: RedisServer
) -> None:
    options = {"redis_namespace": "gone", "is_driven": True}
    here, there = serve(own_redis, **options), serve(own_redis, **options)
    _, script = Asking(here.url, chat(stream=True)), script_of(here)
    on_loop(here, script.say, WORDS[0])
    follower = Asking(there.url, chat(stream=True))
    until(lambda: follower.text == WORDS[0])
    own_redis.send(signal.SIGKILL)
    again = script_of(there)
    on_loop(there, again.say, "something else ")
    follower.done()
    assert follower.payloads[-1]["error"]["code"] == "engine_error"
    assert follower.text == WORDS[0]
    on_loop(here, script.finish)


def test_a_call_of_messages_cut_short_is_still_answered(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    leader, script = Asking(running.url, body | {"stream": True}, "/v1/messages"), script_of(running)
    plain = Asking(running.url, body, "/v1/messages")
    until(lambda: boarded(running) == 2)
    on_loop(running, script.say, "hello ")
    on_loop(running, script.finish)
    leader.done()
    assert '"text":"hello "' in "".join(plain.done().lines)


def test_the_shared_path_is_seen_in_the_metrics(serve: Callable[..., Running]) -> None:
    running = serve()
    for _ in range(2):
        Asking(running.url, chat("seen")).done()
    with running.client() as client:
        found = client.get("/metrics").text
    assert 'refrain_flight_boardings_total{role="leader"}' in found
    assert CHAT


def test_a_flight_that_is_over_is_not_shared_any_longer(
    serve: Callable[..., Running], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is not held back with other events: who asks after a purge would be given what was purged."""
    monkeypatch.setattr(publisher, "PUBLISH_GAP_S", 60.0)
    monkeypatch.setattr(publisher, "CLOSE_S", 60.0)
    running = serve(own_redis, is_driven=True, flight_lease_s=60.0)
    leader, script = Asking(running.url, chat(stream=True)), script_of(running)
    with redis.Redis.from_url(own_redis.url) as client:
        until(lambda: list(client.scan_iter("*:flight:*:lease")))
        on_loop(running, script.say, WORDS[0])
        until(lambda: leader.text == WORDS[0])
        on_loop(running, script.finish)
        leader.done()
        until(lambda: not list(client.scan_iter("*:flight:*:lease")), 20)
