"""`Idempotency-Key`: a retry gets the answer of its first try, or joins it, whatever the cache may do."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import openai
import pytest

from app.errors import EngineFailed
from app.gate.keys import KeyFile
from tests.conftest import RedisServer, Running, chat, until
from tests.flight.asking import CHAT, Asking, on_loop, script_of


def post(running: Running, body: dict, key: str, **headers: str):
    with running.client() as client:
        return client.post(CHAT, json=body, headers={"idempotency-key": key} | headers)


SAMPLED = chat(temperature=1)


@pytest.mark.parametrize("policy", ["deterministic", "off"])
def test_a_retry_gets_the_same_answer_also_on_another_server(serve: Callable[..., Running], policy: str) -> None:
    options = {"redis_namespace": f"idem{secrets.token_hex(4)}", "cache": policy}
    here, there = serve(**options), serve(**options)
    first = post(here, SAMPLED, "k1")
    for running, stream in ((here, False), (there, False), (there, True)):
        retry = post(running, SAMPLED | {"stream": stream}, "k1")
        assert retry.headers["x-cache"] == "hit"
        if not stream:
            assert retry.json()["choices"] == first.json()["choices"]
    assert first.headers["x-cache"] == "miss"
    assert len(here.engine.calls) == 1
    assert there.engine.calls == []
    assert post(here, SAMPLED, "k2").headers["x-cache"] == "miss", "another key is another call"


def test_a_retry_joins_the_first_try_that_is_under_way(serve: Callable[..., Running]) -> None:
    options = {"redis_namespace": f"idem{secrets.token_hex(4)}", "is_driven": True}
    here, there = serve(**options), serve(**options)
    first = Asking(here.url, SAMPLED | {"stream": True}, idempotency_key="k")
    script = script_of(here)
    on_loop(here, script.say, "hello ")
    retries = [Asking(running.url, SAMPLED | {"stream": True}, idempotency_key="k") for running in (here, there)]
    until(lambda: all(each.text for each in retries))
    on_loop(here, script.finish)
    assert [each.done().text for each in (first, *retries)] == ["hello "] * 3
    assert [each.status for each in retries] == ["shared"] * 2
    assert there.engine.calls == []


def test_another_body_under_the_same_key_is_a_422_in_openais_shape(serve: Callable[..., Running]) -> None:
    options = {"redis_namespace": f"idem{secrets.token_hex(4)}"}
    here, there = serve(**options), serve(**options)
    for body in (chat("one"), SAMPLED):
        key = secrets.token_hex(4)
        assert post(here, body, key).status_code == 200
        for running in (here, there):
            refused = post(running, body | {"top_p": 0.5}, key)
            assert refused.status_code == 422
            error = refused.json()["error"]
            assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_key_reused")
    client = openai.OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(**chat("other"), extra_headers={"Idempotency-Key": key})


def test_what_is_no_key_is_refused(server: Running) -> None:
    for key in ("", "x" * 256, "\x01"):
        assert post(server, chat(), key).status_code == 400


def test_keys_belong_to_their_caller(serve: Callable[..., Running], settings) -> None:
    file = KeyFile(settings.home / "keys.json")
    callers = [{"authorization": f"Bearer {file.create(tenant)[0]}"} for tenant in ("one", "one", "other")]
    running = serve()
    for number, caller in enumerate(callers):
        assert post(running, chat(f"q{number}", temperature=1), "same key", **caller).headers["x-cache"] == "miss"


def test_a_try_that_failed_does_not_bind_its_retry(serve: Callable[..., Running]) -> None:
    running = serve(is_driven=True)
    first, script = Asking(running.url, SAMPLED, idempotency_key="k"), script_of(running)
    on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
    assert first.done().response.status_code == 500
    retry, script = Asking(running.url, SAMPLED, idempotency_key="k"), script_of(running)
    on_loop(running, script.say, "hello ")
    on_loop(running, script.finish)
    assert retry.done().text == "hello "


def test_a_cacheable_call_with_a_key_is_everybodys_hit(server: Running) -> None:
    assert post(server, chat(), "k1").headers["x-cache"] == "miss"
    assert post(server, chat(), "k2").headers["x-cache"] == "hit"


def test_without_redis_a_retry_to_the_same_server_is_still_known(serve: Callable[..., Running], tmp_path) -> None:
    running = serve(RedisServer(tmp_path))
    assert post(running, SAMPLED, "k").status_code == 200
    assert post(running, chat("other"), "k").status_code == 422
