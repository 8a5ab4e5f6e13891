"""A stream that lost its client goes on, and its client comes back to it: on any server, and misses nothing."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from app.flight.names import position
from app.gate.keys import KeyFile
from app.main import find_weights
from app.settings import Settings
from tests.conftest import NO_TLS, RedisServer, Running, chat, start_process, until
from tests.flight.asking import CHAT, Asking, on_loop, script_of

RESUME_S = 60.0
PATHS: dict[str, dict[str, Any]] = {
    CHAT: {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "scripted", "prompt": "hi"},
    "/v1/responses": {"model": "scripted", "input": "hi"},
    "/v1/messages": {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16},
}


def events(response: httpx.Response, most: int | None = None) -> Iterator[tuple[str | None, bytes]]:
    """The events of a stream as they come, each with its id; comments left out. Leaves after `most` of them."""
    ident, kept, count = None, [], 0
    for line in response.iter_lines():
        if line.startswith("id: "):
            ident = line[4:]
        elif line and not line.startswith(":"):
            kept.append(line)
        elif not line and kept:
            yield ident, "\n".join(kept).encode()
            kept, count = [], count + 1
            if count == most:
                return


def cut(url: str, path: str, body: dict[str, Any], most: int, **headers: str) -> list[tuple[str | None, bytes]]:
    with (
        httpx.Client(base_url=url, timeout=30, verify=NO_TLS) as client,
        client.stream("POST", path, json=body | {"stream": True}, headers=headers) as response,
    ):
        assert response.status_code == 200
        return list(events(response, most))


def rest(url: str, seen: str, **headers: str) -> httpx.Response:
    """The rest of a stream by its id."""
    stream_id = position(seen).stream_id
    with httpx.Client(base_url=url, timeout=30, verify=NO_TLS) as client:
        return client.get(f"/v1/streams/{stream_id}", headers={"last-event-id": seen} | headers)


@pytest.fixture
def two(serve: Callable[..., Running]) -> tuple[Running, Running]:
    options = {
        "redis_namespace": f"two{secrets.token_hex(4)}",
        "stream_resume_s": RESUME_S,
        "scripted_tokens_per_s": 100.0,
    }
    return serve(**options), serve(**options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0, 1], ids=["cacheable", "sampled"])
def test_a_cut_stream_goes_on_where_it_was_on_either_server(
    two: tuple[Running, Running], path: str, temperature: float
) -> None:
    """The two parts, put together, are one whole stream, its ids unbroken."""
    here, there = two
    for number, resumed_on in enumerate((here, there)):
        body = PATHS[path] | {"temperature": temperature, "top_p": 0.9 - number / 10}
        first = cut(here.url, path, body, 5)
        second = list(events(rest(resumed_on.url, first[-1][0])))
        numbers = [position(ident).number for ident, _ in first + second]
        assert numbers == sorted(set(numbers))
        assert len(first) == 5 < len(numbers)
        again = list(events(rest(there.url, f"{position(first[0][0]).stream_id}")))
        assert [data for _, data in again] == [data for _, data in first + second]
    assert len(here.engine.calls) == 2, "nothing was generated twice"
    assert there.engine.calls == []


def test_two_hundred_streams_cut_at_random_are_whole_after_resuming_elsewhere(two: tuple[Running, Running]) -> None:
    chance = random.Random(5)

    def one(number: int) -> bool:
        here, there = two if number % 2 else two[::-1]
        body = chat(f"stream {number}", temperature=number % 3, max_tokens=20)
        first = cut(here.url, CHAT, body, chance.randint(1, 20))
        answers = rest(there.url, first[-1][0]), rest(here.url, position(first[0][0]).stream_id)
        second, uncut = (list(events(answer)) for answer in answers)
        is_whole = first + second == uncut and uncut[-1][1] == b"data: [DONE]"
        if not is_whole:
            print(number, first, *(f"{answer.status_code}: {answer.text}" for answer in answers), sep="\n")
        return is_whole

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(one, range(200))) == 200


def test_many_who_come_back_at_once_and_who_ask_anew_all_follow(serve: Callable[..., Running]) -> None:
    """On a server that has nothing of it but the live stream in Redis."""
    options = {"redis_namespace": f"two{secrets.token_hex(4)}", "stream_resume_s": RESUME_S}
    here, there = (serve(**options, scripted_tokens_per_s=20.0) for _ in range(2))
    first = cut(here.url, CHAT, chat(max_tokens=30), 5)

    def back(number: int) -> list[bytes]:
        if number % 2:
            return [data for _, data in first + list(events(rest(there.url, first[-1][0])))]
        return [data for _, data in cut(there.url, CHAT, chat(max_tokens=30), 1000)]

    def said(data: list[bytes]) -> list[bytes]:
        return [each.split(b'"choices":')[-1] for each in data]

    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(back, range(8)))
    assert all(said(stream) == said(streams[0]) for stream in streams)
    assert streams[0][-1] == b"data: [DONE]"
    assert there.engine.calls == []


def test_the_same_post_with_last_event_id_goes_on_too(two: tuple[Running, Running]) -> None:
    here, there = two
    whole = cut(here.url, CHAT, chat(), 1000)
    seen, flown = whole[3][0], len(here.engine.calls)
    for running in two:
        assert cut(running.url, CHAT, chat(), 1000, **{"last-event-id": seen}) == whole[4:]
    assert len(here.engine.calls) == flown
    assert there.engine.calls == []


def test_a_client_whose_server_was_killed_goes_on_at_another(
    serve: Callable[..., Running], shared_redis: RedisServer, tmp_path: Path
) -> None:
    """Nobody else was aboard: the server that it comes back to takes the flight over."""
    options = {
        "redis_namespace": f"killed{secrets.token_hex(4)}",
        "flight_lease_s": 0.6,
        "stream_resume_s": RESUME_S,
    }
    there = serve(weights=find_weights(Settings(engine="scripted"), lambda _: None), **options)
    environment = {f"REFRAIN_{name.upper()}": str(value) for name, value in options.items()}
    # It would speak for half a minute: whatever holds up this test, it is killed before its end.
    environment |= {"REFRAIN_REDIS_URL": shared_redis.url, "REFRAIN_SCRIPTED_TOKENS_PER_S": "10"}
    dying = start_process(tmp_path / "other", tmp_path / "log", "--engine", "scripted", **environment)
    body = chat("to be gone on with", max_tokens=300, stream=True)
    seen: list[tuple[str | None, bytes]] = []
    try:
        with (
            httpx.Client(base_url=dying.url, timeout=30) as client,
            client.stream("POST", CHAT, json=body) as response,
            contextlib.suppress(httpx.HTTPError),
        ):
            for event in events(response):
                seen.append(event)
                if len(seen) == 5:
                    dying.process.kill()
    finally:
        dying.process.kill()
        dying.process.wait()
    assert len(seen) >= 5
    back = cut(there.url, CHAT, body, 1000, **{"last-event-id": seen[-1][0]})
    # What is named anew is left out: the whole is asked of the other server alone.
    whole = cut(there.url, CHAT, body | {"cache": {"no_store": True, "no_cache": True}}, 1000)
    assert [data.split(b'"delta":')[-1] for _, data in [*seen, *back]] == [
        data.split(b'"delta":')[-1] for _, data in whole
    ]


def test_a_post_goes_on_from_the_recording_when_the_stream_is_gone(serve: Callable[..., Running]) -> None:
    running = serve(stream_resume_s=0.2)
    whole = cut(running.url, CHAT, chat(), 1000)
    until(lambda: rest(running.url, whole[3][0]).status_code == 404)
    back = cut(running.url, CHAT, chat(), 1000, **{"last-event-id": whole[3][0]})
    assert b"".join(data for _, data in back) == b"".join(data for _, data in whole[4:])
    assert len(running.engine.calls) == 1


def test_a_post_goes_on_by_generating_again_what_can_be(serve: Callable[..., Running]) -> None:
    """The recording is gone as well: the same is generated again, and checked before a word of it is sent."""
    running = serve(stream_resume_s=0.2)
    whole = cut(running.url, CHAT, chat(), 1000)
    until(lambda: rest(running.url, whole[3][0]).status_code == 404)
    on_loop(running, lambda: None)
    with running.client() as client:
        fresh = client.post(CHAT, json=chat(stream=True), headers={"cache-control": "no-cache"})
        assert fresh.headers["x-cache"] == "miss"
    back = cut(running.url, CHAT, chat(), 1000, **{"last-event-id": whole[3][0]})
    said = [data.split(b'"delta":')[-1] for _, data in back]
    assert said == [data.split(b'"delta":')[-1] for _, data in whole[4:]]


def test_what_cannot_be_gone_on_with_is_a_410_and_never_a_mixture(serve: Callable[..., Running]) -> None:
    running = serve(stream_resume_s=RESUME_S)
    seen = cut(running.url, CHAT, chat(), 1000)[3][0]
    wrong = seen[:-1] + ("0" if seen[-1] != "0" else "1")
    assert rest(running.url, wrong).status_code == 410
    sampled = chat(temperature=1, stream=True)
    gone = secrets.token_hex(12) + "abcdefn-3-00000000"
    with running.client() as client:
        refused = client.post(CHAT, json=sampled, headers={"last-event-id": gone})
        assert refused.status_code == 410
        assert refused.json()["error"]["code"] == "stream_lost"
        assert client.get(f"/v1/streams/{gone}").status_code == 404
        assert client.get("/v1/streams/nonsense").status_code == 404
        assert client.post(CHAT, json=sampled, headers={"last-event-id": "42"}).status_code == 200, "not an id of ours"


def test_tenants_cannot_read_each_others_streams(serve: Callable[..., Running], settings) -> None:
    file = KeyFile(settings.home / "keys.json")
    mine, others = ({"authorization": f"Bearer {file.create(tenant)[0]}"} for tenant in ("one", "other"))
    options = {"redis_namespace": f"two{secrets.token_hex(4)}", "stream_resume_s": RESUME_S}
    here, there = serve(**options), serve(**options)
    seen = cut(here.url, CHAT, chat(), 4, **mine)[-1][0]
    for running in (here, there):
        assert rest(running.url, seen, **others).status_code == 404
        assert rest(running.url, seen).status_code == 401
        assert rest(running.url, seen, **mine).status_code == 200
    back = cut(here.url, CHAT, chat(), 1000, **others)
    assert position(back[0][0]).uid != position(seen).uid


def test_nobody_comes_back_in_time_and_the_engine_is_freed(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, stream_resume_s=0.5)
    asked, script = Asking(running.url, chat(stream=True)), script_of(running)
    on_loop(running, script.say, "one ")
    until(lambda: asked.text)
    asked.leave()
    on_loop(running, script.say, "two ")
    until(lambda: running.engine.running == 0)
    assert script.was_aborted


def test_the_stream_goes_on_while_its_client_is_away(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, stream_resume_s=RESUME_S)
    asked, script = Asking(running.url, chat(stream=True, temperature=1)), script_of(running)
    on_loop(running, script.say, "one ")
    until(lambda: asked.text)
    asked.leave()
    on_loop(running, script.say, "two ")
    asked.done()
    on_loop(running, script.say, "three ")
    on_loop(running, script.finish)
    back = rest(running.url, asked.ids[1])
    assert not script.was_aborted
    assert '"two"' in back.text
    assert '"three"' in back.text
    assert '"one"' not in back.text


def test_without_the_setting_streams_carry_no_ids(server: Running) -> None:
    assert {ident for ident, _ in cut(server.url, CHAT, chat(), 1000)} == {None}


def test_the_official_clients_do_not_mind_event_ids(serve: Callable[..., Running]) -> None:
    running = serve(stream_resume_s=RESUME_S)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    said = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat(stream=True))
    )
    kinds = [event.type for event in client.responses.create(model="scripted", input="hi", temperature=0, stream=True)]
    claude = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    with claude.messages.stream(
        model="scripted",
        max_tokens=16,
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"temperature": 0},
    ) as stream:
        written = stream.get_final_text()
    assert said
    assert written
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
