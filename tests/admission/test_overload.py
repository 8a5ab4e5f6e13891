"""More is asked than the engine can do: who waits, who goes first, who is refused, and whose time is up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.domain import Priority
from app.engine.scripted import Script
from app.gate.keys import KeyFile
from tests.conftest import Running, chat, until
from tests.flight.asking import CHAT, Asking, boarded, of_loop, on_loop, script_of, text_of


@pytest.fixture
def small(serve: Callable[..., Running]) -> Running:
    """An engine with one place, to which one call more is handed; so the third call waits."""
    return serve(is_driven=True, scripted_max_calls=1, queue_max_calls=2)


def waiting(running: Running, priority: Priority | None = None) -> int:
    return of_loop(running, lambda: running.app.state.service.admission._queue.calls(priority))


def finish(running: Running, script: Script, text: str = "word ") -> None:
    on_loop(running, script.say, text)
    on_loop(running, script.finish)


def asked(script: Script) -> str:
    return script.call.body["messages"][0]["content"]


def says_at_once(running: Running, text: str) -> None:
    """Each call's first word is there when it is asked for, and need not come from the test in time."""
    queue = running.engine.asked
    put = queue.put_nowait

    def asked_for(script: Script) -> None:
        script.say(text)
        put(script)

    queue.put_nowait = asked_for


def fill(running: Running, number: int = 2, **headers: str) -> tuple[list[Asking], list[Script]]:
    """Calls that take the engine's places."""
    calls = [Asking(running.url, chat(f"fill {each}"), **headers) for each in range(number)]
    return calls, [script_of(running) for _ in calls]


def metric(running: Running, name: str, **labels: str) -> float:
    with running.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    found = [each for family in families for each in family.samples if each.name == name]
    return sum(each.value for each in found if labels.items() <= each.labels.items())


def test_beyond_the_queue_a_call_is_refused_at_once_and_hits_and_followers_are_not(small: Running) -> None:
    before = Asking(small.url, chat("known"))
    finish(small, script_of(small), "remembered ")
    before.done()
    running, scripts = fill(small)
    queued = [Asking(small.url, chat(f"wait {number}")) for number in range(2)]
    until(lambda: waiting(small) == 2)
    refused_before = metric(small, "refrain_refused_total", reason="queue_full")
    with small.client() as client:
        refused = client.post(CHAT, json=chat("one too many"))
        assert client.post(CHAT, json=chat("known")).headers["x-cache"] == "hit"
    assert refused.status_code == 503
    assert refused.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "overloaded_error",
        "param": None,
        "code": "queue_full",
    }
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert metric(small, "refrain_refused_total", reason="queue_full") == refused_before + 1
    assert metric(small, "refrain_queue_calls", **{"class": "interactive"}) == 2
    assert metric(small, "refrain_engine_calls") == 2
    followed_before = metric(small, "refrain_flight_boardings_total", role="follower")
    follower = Asking(small.url, chat("wait 1"))
    until(lambda: metric(small, "refrain_flight_boardings_total", role="follower") > followed_before)
    for _ in queued:
        finish(small, scripts.pop(0))
        scripts.append(script_of(small))
    for script in scripts:
        finish(small, script)
    everybody = [*running, *queued, follower]
    assert {each.done().response.status_code for each in everybody} == {200}
    assert follower.status == "shared"
    assert metric(small, "refrain_queue_calls") == 0
    assert "queue;dur=0.00" not in queued[0].response.headers["server-timing"], "what it waited is told"


def test_who_leaves_the_queue_makes_room(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scripts = fill(small)
    queue, came = small.app.state.service.admission._queue, []
    add = queue.add
    monkeypatch.setattr(queue, "add", lambda entry, now: (came.append(entry), add(entry, now)))
    leaving = Asking(small.url, chat("leaves", stream=True), x_request_timeout="2s")
    assert leaving.done().response.status_code == 504
    assert len(came) == 1, "it waited"
    until(lambda: waiting(small) == 0)
    for script in scripts:
        finish(small, script)
    until(lambda: small.engine.running == 0)
    assert all(call.body["messages"][0]["content"] != "leaves" for call in small.engine.calls)


def keyed(serve: Callable[..., Running], settings: Any, **priorities: Priority) -> tuple[Running, dict[str, str]]:
    file = KeyFile(settings.home / "keys.json")
    made = {tenant: f"Bearer {file.create(tenant, priority=each)[0]}" for tenant, each in priorities.items()}
    running = serve(is_driven=True, scripted_max_calls=1)
    says_at_once(running, "first ")  # else the server learns that prompts take as long as this test, and waits for them
    return running, made


def order(running: Running, scripts: list[Script], number: int) -> list[str]:
    """What the engine is asked next, each time that a call ends."""
    found = []
    for _ in range(number):
        finish(running, scripts.pop(0))
        scripts.append(script_of(running))
        found.append(asked(scripts[-1]))
    for script in scripts:
        finish(running, script)
    return found


def test_interactive_calls_go_before_those_of_a_batch_key_and_those_that_lower_themselves(
    serve: Callable[..., Running], settings: Any
) -> None:
    running, made = keyed(serve, settings, shop=Priority.INTERACTIVE, night=Priority.BATCH)
    _, scripts = fill(running, authorization=made["shop"])
    asking = []
    for number, (tenant, text, fields) in enumerate(
        [
            ("night", "night", {}),
            ("night", "night raised", {"priority": -9}),
            ("shop", "lowered", {"priority": 1}),
            ("shop", "now", {}),
        ],
        1,
    ):
        asking.append(Asking(running.url, chat(text, **fields), authorization=made[tenant]))
        until(lambda expected=number: waiting(running) == expected)
    found = order(running, scripts, 4)
    assert found[0] == "now"
    assert set(found[1:]) == {"night", "night raised", "lowered"}
    assert all(each.done().response.status_code == 200 for each in asking)


def test_an_interactive_call_that_shares_a_waiting_batch_call_takes_it_along(small: Running) -> None:
    _, scripts = fill(small)
    batch = Asking(small.url, chat("slow", priority=1))
    until(lambda: waiting(small) == 1)
    other = Asking(small.url, chat("slower", priority=2))
    until(lambda: waiting(small) == 2)
    hurried = Asking(small.url, chat("slower"))
    until(lambda: waiting(small, Priority.INTERACTIVE) == 1)
    assert order(small, scripts, 2) == ["slower", "slow"]
    assert hurried.done().status == "shared"
    assert other.done().response.status_code == batch.done().response.status_code == 200


def test_a_tenant_that_floods_does_not_keep_another_waiting(serve: Callable[..., Running], settings: Any) -> None:
    running, made = keyed(serve, settings, flood=Priority.INTERACTIVE, quiet=Priority.INTERACTIVE)
    _, scripts = fill(running, authorization=made["flood"])
    flood = [Asking(running.url, chat(f"flood {each}"), authorization=made["flood"]) for each in range(10)]
    until(lambda: waiting(running) == 10)
    quiet = [Asking(running.url, chat(f"quiet {each}"), authorization=made["quiet"]) for each in range(3)]
    until(lambda: waiting(running) == 13)
    found = order(running, scripts, 13)
    assert found[0].startswith("quiet")
    assert all(each.startswith("quiet") for each in found[:6:2]), f"in turns: {found}"
    assert all(each.done().response.status_code == 200 for each in (*flood, *quiet))


# --- deadlines -------------------------------------------------------------------------------------


def test_a_plain_call_whose_time_is_up_is_a_504_and_frees_the_engine(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    late = Asking(running.url, chat(), x_request_timeout="2")
    script = script_of(running)
    assert late.done().response.status_code == 504
    error = json.loads("".join(late.lines))["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    until(lambda: running.engine.running == 0)
    assert script.was_aborted


def test_a_stream_whose_time_is_up_ends_in_one_error_event(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    says_at_once(running, "word ")
    late = Asking(running.url, chat(stream=True), x_request_timeout="2000ms")
    late.done()
    assert late.response.status_code == 200
    assert late.payloads[-1]["error"]["code"] == "deadline_exceeded"
    assert sum("error" in each for each in late.payloads) == 1
    assert "[DONE]" not in late.payloads
    assert text_of(late.payloads[:-1]) == "word "
    until(lambda: running.engine.running == 0)


def test_a_deadline_is_its_clients_own_and_the_generation_goes_on_for_the_others(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    says_at_once(running, "one ")
    hasty = Asking(running.url, chat(stream=True), x_request_timeout="3")
    script = script_of(running)
    patient = Asking(running.url, chat(stream=True))
    until(lambda: boarded(running) == 2)
    assert hasty.done().payloads[-1]["error"]["code"] == "deadline_exceeded"
    on_loop(running, script.say, "two ")
    on_loop(running, script.finish)
    assert patient.done().text == "one two "
    assert patient.is_whole
    assert not script.was_aborted


def test_a_call_that_cannot_be_answered_in_time_is_not_begun(serve: Callable[..., Running]) -> None:
    running = serve(scripted_tokens_per_s=100.0)
    with running.client() as client:
        client.post(CHAT, json=chat("teaches", max_tokens=100)).raise_for_status()
        refused = client.post(CHAT, json=chat("hurry", max_tokens=110), headers={"x-request-timeout": "0.3"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "deadline_unreachable"
        assert "retry-after" in refused.headers
        assert len(running.engine.calls) == 1
        answered = client.post(CHAT, json=chat("hurry", max_tokens=110), headers={"x-request-timeout": "60"})
        assert answered.status_code == 200
        again = client.post(CHAT, json=chat("hurry", max_tokens=110), headers={"x-request-timeout": "0.3"})
        assert again.headers["x-cache"] == "hit"


def test_the_setting_is_for_calls_that_name_no_time_and_clients_own_timeouts_are_none(
    serve: Callable[..., Running],
) -> None:
    running = serve(is_driven=True, request_timeout_s=2.0)
    late = Asking(running.url, chat("default"))
    assert late.done().response.status_code == 504
    patient = Asking(running.url, chat("longer"), x_request_timeout="60")
    # The time of the first one may have been up before the engine was asked.
    finish(running, until(lambda: script if asked(script := script_of(running)) == "longer" else None))
    assert patient.done().response.status_code == 200
    unlimited = serve(is_driven=True)
    client = Asking(unlimited.url, chat(), x_stainless_read_timeout="0.01", x_stainless_timeout="0.01")
    script = script_of(unlimited)
    finish(unlimited, script)
    assert client.done().response.status_code == 200


@pytest.mark.parametrize("given", ["soon", "-1", "0", "1e3", "5 m", ""])
def test_a_time_that_is_none_is_refused(server: Running, given: str) -> None:
    with server.client() as client:
        refused = client.post(CHAT, json=chat(f"time {given}"), headers={"x-request-timeout": given})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-request-timeout"


# --- the scripted engine's own limits --------------------------------------------------------------


def test_the_scripted_engine_works_on_so_many_calls_and_tokens_at_a_time(serve: Callable[..., Running]) -> None:
    running = serve(scripted_max_calls=2, scripted_tokens_per_s=1000.0, scripted_total_tokens_per_s=100.0)
    batch, all_there = running.engine._batch, asyncio.Event()
    compute, begun = batch.compute, []

    async def when_all_are_there(tokens: int) -> None:
        begun.append(tokens)
        await all_there.wait()
        await compute(tokens)

    batch.compute = when_all_are_there
    asking = [Asking(running.url, chat(f"call {each}", max_tokens=20)) for each in range(5)]
    until(lambda: len(running.engine.calls) + waiting(running) == 5)
    until(lambda: len(begun) >= 2)
    assert len(begun) == 2, "2 begin at once"
    on_loop(running, all_there.set)
    timings = [each.done().response.headers["server-timing"] for each in asking]
    waits = sorted(float(told.partition("queue;dur=")[2].partition(",")[0]) for told in timings)
    assert waits[-1] >= 200, "the last one begins after 4 times 20 tokens at 100 a second"
