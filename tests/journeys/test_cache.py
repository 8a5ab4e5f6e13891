"""The journey of a call through the cache, over real sockets, with a scripted engine behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import openai
import pytest

from app.errors import EngineFailed
from app.gate.keys import KeyFile
from tests.conftest import WEIGHTS, Running, chat, until

CHAT = "/v1/chat/completions"


def post(running: Running, body: dict, path: str = CHAT, **headers: str) -> httpx.Response:
    with running.client() as client:
        return client.post(path, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def sse(text: str) -> list[str]:
    """The `data:` of each event; comments left out."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def said(text: str) -> str:
    chunks = [json.loads(data) for data in sse(text) if data != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def test_the_second_identical_call_is_a_hit_and_is_not_generated(server: Running) -> None:
    began = time.monotonic()
    first, second = post(server, chat()), post(server, chat())
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("miss", "hit")
    assert first.json()["choices"] == second.json()["choices"]
    assert first.json()["usage"] == second.json()["usage"]
    assert len(server.engine.calls) == 1
    assert first.headers["x-cache-key"] == second.headers["x-cache-key"]
    assert "age" not in first.headers
    assert 0 <= int(second.headers["age"]) <= time.monotonic() - began


def test_a_hit_has_an_id_and_a_time_of_its_own(server: Running) -> None:
    first, second = post(server, chat()).json(), post(server, chat()).json()
    assert first["id"] != second["id"]
    assert second["created"] >= first["created"]


@pytest.mark.parametrize("first_streams", [True, False])
def test_either_form_serves_the_other(server: Running, first_streams: bool) -> None:
    options = {"stream_options": {"include_usage": True}}
    one = post(server, chat(stream=first_streams, **(options if first_streams else {})))
    other = post(server, chat(stream=not first_streams, **(options if not first_streams else {})))
    assert (one.headers["x-cache"], other.headers["x-cache"]) == ("miss", "hit")
    stream, body = (one, other) if first_streams else (other, one)
    assert said(stream.text) == body.json()["choices"][0]["message"]["content"]
    assert sse(stream.text)[-1] == "[DONE]"
    assert json.loads(sse(stream.text)[-2])["usage"] == {
        name: body.json()["usage"][name] for name in ("prompt_tokens", "total_tokens", "completion_tokens")
    }
    assert len(sse(stream.text)) > 5, "a replay has many chunks, not one lump"
    assert len({json.loads(data)["id"] for data in sse(stream.text)[:-1]}) == 1


def test_only_who_asks_for_the_usage_event_gets_it(server: Running) -> None:
    asks = chat(stream=True, stream_options={"include_usage": True})
    for body, expected in [(chat(stream=True), 0), (asks, 1), (chat(stream=True), 0)]:
        events = [json.loads(data) for data in sse(post(server, body).text)[:-1]]
        assert sum(1 for event in events if event.get("usage")) == expected
    assert len(server.engine.calls) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "scripted", "prompt": "hello", "temperature": 0}),
        ("/v1/responses", {"model": "scripted", "input": "hello", "temperature": 0}),
        (
            "/v1/messages",
            {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0},
        ),
    ],
)
@pytest.mark.parametrize("first_streams", [True, False])
def test_every_generating_endpoint_is_cached_in_both_forms(
    server: Running, path: str, body: dict, first_streams: bool
) -> None:
    one = post(server, body | {"stream": first_streams}, path)
    other = post(server, body | {"stream": not first_streams}, path)
    again = post(server, body | {"stream": first_streams}, path)
    assert [reply.headers["x-cache"] for reply in (one, other, again)] == ["miss", "hit", "hit"]
    assert len(server.engine.calls) == 1


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"temperature": 0}, "hit"),
        ({"temperature": 0.7, "seed": 4}, "hit"),
        ({"temperature": 0.7}, "bypass"),
        ({"temperature": None}, "bypass"),
    ],
)
def test_by_default_only_deterministic_calls_are_cached(server: Running, fields: dict, status: str) -> None:
    post(server, chat(**fields))
    assert post(server, chat(**fields)).headers["x-cache"] == status


def test_policy_all_caches_sampled_calls_and_off_caches_nothing(serve: Callable[..., Running]) -> None:
    everything, nothing = serve(cache="all"), serve(cache="off")
    for running, status in [(everything, "hit"), (nothing, "bypass")]:
        post(running, chat(temperature=1))
        assert post(running, chat(temperature=1)).headers["x-cache"] == status


def test_cache_control_means_what_http_says(server: Running) -> None:
    only = {"cache_control": "only-if-cached"}
    refused = post(server, chat(), **only)
    assert refused.status_code == 504
    assert refused.json()["error"]["code"] == "not_cached"

    assert post(server, chat(), cache_control="no-store").headers["x-cache"] == "bypass"
    assert post(server, chat(), **only).status_code == 504, "no-store recorded nothing"

    assert post(server, chat()).headers["x-cache"] == "miss"
    assert post(server, chat(), **only).headers["x-cache"] == "hit"
    assert post(server, chat(), cache_control="no-cache").headers["x-cache"] == "miss"
    assert post(server, chat(), cache_control="max-age=60").headers["x-cache"] == "hit"
    assert len(server.engine.calls) == 3


def test_max_age_refuses_an_older_recording_and_refreshes_it(server: Running) -> None:
    post(server, chat())
    until(lambda: int(post(server, chat()).headers["age"]) >= 2)
    refreshed = time.monotonic()
    assert post(server, chat(), cache_control="max-age=1").headers["x-cache"] == "miss"
    # Redis tells this process by a connection of its own what changed; nobody waits for that.
    until(lambda: int(post(server, chat()).headers["age"]) <= time.monotonic() - refreshed)


def test_the_cache_object_of_the_body_says_the_same_for_sdk_users(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(**cache: object) -> str:
        raw = client.chat.completions.with_raw_response.create(**chat(), extra_body={"cache": cache})
        return raw.headers["x-cache"]

    assert ask() == "miss"
    assert ask(max_age=60) == "hit"
    assert ask(no_cache=True) == "miss"
    with pytest.raises(openai.BadRequestError, match=r"cache\.nocache"):
        ask(nocache=True)
    assert all("cache" not in call.body for call in server.engine.calls), "the engine never sees it"


def test_what_cannot_change_the_answer_is_not_in_the_key(server: Running) -> None:
    post(server, chat())
    for fields in [{"user": "u1"}, {"metadata": {"a": "b"}}, {"top_p": None}, {"n": 1}]:
        assert post(server, chat(**fields)).headers["x-cache"] == "hit", fields


def test_another_model_file_or_setting_is_another_answer(serve: Callable[..., Running], tmp_path) -> None:
    namespace = {"redis_namespace": f"shared{tmp_path.name}"}
    old = serve(**namespace)
    assert post(old, chat()).headers["x-cache"] == "miss"
    for changed in (replace(WEIGHTS, digest="c" * 64), replace(WEIGHTS, settings_digest="d" * 64)):
        assert post(serve(weights=changed, **namespace), chat()).headers["x-cache"] == "miss"
    assert post(serve(**namespace), chat()).headers["x-cache"] == "hit", "rolled back: the old answers are there"


def test_tenants_never_share_answers(serve: Callable[..., Running], settings) -> None:
    file = KeyFile(settings.home / "keys.json")
    (one, _), (other, _) = file.create("one"), file.create("other")
    running = serve()
    assert post(running, chat(), authorization=f"Bearer {one}").headers["x-cache"] == "miss"
    assert post(running, chat(), authorization=f"Bearer {other}").headers["x-cache"] == "miss"
    assert post(running, chat(), authorization=f"Bearer {one}").headers["x-cache"] == "hit"


def test_an_interrupted_stream_is_not_recorded_and_frees_the_engine(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, keep_alive_s=0.2)
    with running.client() as client, client.stream("POST", CHAT, json=chat(stream=True)) as response:
        script = until(lambda: running.engine.asked.get_nowait() if not running.engine.asked.empty() else None)
        _on_loop(running, script.say, "half an ")
        next(response.iter_text())
    until(lambda: running.engine.running == 0)
    assert script.was_aborted
    assert post(running, chat(), cache_control="only-if-cached").status_code == 504


def test_a_client_that_leaves_a_call_without_stream_frees_the_engine_too(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    with running.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat(), timeout=0.5)
    until(lambda: running.engine.running == 0)


def test_a_generation_that_breaks_ends_in_one_error_event_and_is_not_recorded(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, keep_alive_s=0.2)
    with running.client() as client, client.stream("POST", CHAT, json=chat(stream=True)) as response:
        script = until(lambda: running.engine.asked.get_nowait() if not running.engine.asked.empty() else None)
        _on_loop(running, script.say, "half an ")
        _on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
        events = sse(response.read().decode())
    assert json.loads(events[-1])["error"]["code"] == "engine_error"
    assert "[DONE]" not in events
    assert post(running, chat(), cache_control="only-if-cached").status_code == 504


def test_a_generation_that_breaks_before_its_first_word_is_a_plain_error(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    with running.client() as client:
        request = client.build_request("POST", CHAT, json=chat(stream=True))
        import threading

        replies: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: replies.append(client.send(request)))
        thread.start()
        script = until(lambda: running.engine.asked.get_nowait() if not running.engine.asked.empty() else None)
        _on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
        thread.join()
    assert replies[0].status_code == 500
    assert replies[0].json()["error"]["code"] == "engine_error"


def test_a_silent_stream_is_kept_alive_with_comments(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True, keep_alive_s=0.2)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    with running.client() as http, http.stream("POST", CHAT, json=chat(stream=True)) as response:
        script = until(lambda: running.engine.asked.get_nowait() if not running.engine.asked.empty() else None)
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        assert response.headers["x-cache"] == "miss"
        _on_loop(running, script.say, "there ")
        _on_loop(running, script.finish)
        assert said("\n".join(lines)) == "there "
    replay = client.chat.completions.create(**chat(stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in replay) == "there "


def test_hits_models_health_and_docs_answer_while_the_engine_loads(serve: Callable[..., Running], tmp_path) -> None:
    namespace = {"redis_namespace": f"shared{tmp_path.name}"}
    post(serve(**namespace), chat())
    loading = serve(is_ready=False, loading_wait_s=0.2, **namespace)
    assert post(loading, chat()).headers["x-cache"] == "hit"
    with loading.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "scripted"
        assert client.get("/healthz").status_code == 200
        assert client.get("/docs").status_code == 200
        assert client.get("/openapi.json").status_code == 200
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
    miss = post(loading, chat("something else"))
    assert miss.status_code == 503
    assert miss.json()["error"]["code"] == "engine_loading"
    assert int(miss.headers["retry-after"]) > 0


def test_purge_by_tenant_by_model_and_all(serve: Callable[..., Running], settings) -> None:
    file = KeyFile(settings.home / "keys.json")
    (user, _), (admin, _) = file.create("shop"), file.create("ops", admin=True)
    running = serve()
    mine, admins = {"authorization": f"Bearer {user}"}, {"authorization": f"Bearer {admin}"}

    def fill() -> None:
        for number in range(3):
            post(running, chat(f"q{number}"), **mine)

    for body, purged in [
        ({"tenant": "other"}, 0),
        ({"tenant": "shop"}, 3),
        ({"model": "scripted"}, 3),
        ({"all": True}, 3),
    ]:
        fill()
        assert post(running, body, "/admin/cache/purge", **admins).json() == {"purged": purged}, body
    fill()
    with running.client(headers=admins) as client:
        stats = client.get("/admin/cache").json()
    assert stats["by_model"] == [{"tenant": "shop", "model": "scripted", "entries": 3}]
    assert post(running, {"all": True}, "/admin/cache/purge", **mine).status_code == 403
    assert post(running, {"all": True}, "/admin/cache/purge").status_code == 401
    assert post(running, {}, "/admin/cache/purge", **admins).status_code == 400


def test_a_recording_above_the_cap_is_not_kept(serve: Callable[..., Running]) -> None:
    running = serve(cache_max_entry_bytes=200)
    assert post(running, chat()).headers["x-cache"] == "miss"
    until(lambda: post(running, chat()).headers["x-cache"] == "miss")  # at the same moment it is "shared"


def test_responses_replay_the_new_callers_own_metadata(server: Running) -> None:
    body = {"model": "scripted", "input": "hello", "temperature": 0}
    post(server, body | {"metadata": {"order": "1"}}, "/v1/responses")
    replay = post(server, body | {"metadata": {"order": "2"}}, "/v1/responses")
    assert replay.headers["x-cache"] == "hit"
    assert replay.json()["metadata"] == {"order": "2"}


def _on_loop(running: Running, function: Callable[..., None], *arguments: object) -> None:
    """Scripts are not thread-safe; their queue lives in the server's loop."""
    running.engine.loop.call_soon_threadsafe(function, *arguments)
