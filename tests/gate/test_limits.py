"""What a caller with limits sees: OpenAI's errors and headers, and what each kind of call is charged."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.domain import Budget, Limits, Period
from app.errors import EngineFailed, StartRefused
from app.gate.keys import Gate, KeyFile
from app.gate.limits import NONE_OF_ITS_OWN, Prices, Usage, budget, defaults
from app.gate.quotas import duration
from app.settings import Settings, load
from tests.conftest import RedisServer, Running, chat, make_settings, run_server, until
from tests.flight.asking import Asking, on_loop, script_of
from tests.gate.limited import CHAT, ask, key, settled

Serve = Callable[..., Running]
# `ask(..., "hello")`: so many tokens in, as the scripted engine counts, and out.
IN, OUT = 4, 6


@pytest.fixture
def start(serve: Serve, settings: Settings) -> Serve:
    """Servers that share what `settings` names."""
    return lambda **options: serve(redis_namespace=settings.redis_namespace, **options)


def sdk(running: Running, headers: dict[str, str], **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{running.url}/v1", api_key=headers["authorization"].removeprefix("Bearer "), **options
    )


def refused_by_budget(running: Running) -> float:
    with running.client() as client:
        found = re.search(r'refrain_limited_total\{limit="budget"\} (\S+)', client.get("/metrics").text)
    return float(found[1]) if found else 0.0


# --- errors and headers ---------------------------------------------------------------------------


def test_the_official_client_sees_its_rate_limit_error_and_the_headers(start: Serve, settings: Settings) -> None:
    headers = key(settings, rpm="1", tpm="10000")
    client = sdk(start(), headers, max_retries=0)
    client.chat.completions.create(**chat("one"))
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**chat("two"))
    error, told = refused.value, refused.value.response.headers
    assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert "requests per min (RPM): Limit 1" in error.message
    assert 50 < int(told["retry-after"]) <= 60
    assert told["x-ratelimit-limit-requests"] == "1"
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert told["x-ratelimit-remaining-tokens"].isdigit()
    assert told["x-ratelimit-reset-requests"].endswith("s")


def test_a_spent_budget_is_an_insufficient_quota_that_nobody_tries_again(start: Serve, settings: Settings) -> None:
    headers, running = key(settings, budget="30 tokens/day"), start()
    client = sdk(running, headers, max_retries=2)
    before = refused_by_budget(running)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**chat(max_tokens=100))
    error = refused.value
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert "30 tokens of 30 tokens are left (day)" in error.message
    assert f"{IN} tokens in and 100 out" in error.message
    assert 0 < int(error.response.headers["retry-after"]) <= 86_400
    assert refused_by_budget(running) == before + 1, "asked once"
    client.chat.completions.create(**chat(max_tokens=6))


@pytest.mark.parametrize("is_streaming", [False, True])
def test_every_answer_of_a_limited_key_has_the_headers(start: Serve, settings: Settings, is_streaming: bool) -> None:
    headers, running = key(settings, rpm="3", tpm="1000"), start()  # one comes back in 20 s
    for at, status in enumerate(("miss", "hit", "hit")):
        answer = ask(running, headers, stream=is_streaming)
        assert answer.headers["x-cache"] == status
        assert answer.headers["x-ratelimit-remaining-requests"] == str(2 - at)
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 1000 - IN - OUT
    without = key(settings)
    until(lambda: ask(running, without).status_code == 200, 10)
    unlimited = ask(running, without, stream=is_streaming)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


def test_anthropics_client_sees_its_rate_limit_error(start: Serve, settings: Settings) -> None:
    headers, running = key(settings, rpm="1"), start()
    secret = headers["authorization"].removeprefix("Bearer ")
    client = anthropic.Anthropic(base_url=running.url, api_key=secret, max_retries=0)
    asked: dict[str, Any] = {"model": "scripted", "max_tokens": 6, "messages": [{"role": "user", "content": "hi"}]}
    client.messages.create(**asked)
    with pytest.raises(anthropic.RateLimitError):
        client.messages.create(**asked)


def test_a_wait_is_written_as_openai_writes_it() -> None:
    assert [duration(ms) for ms in (0, 12, 1000, 1500, 59_952, 60_000, 360_000, 90_500)] == [
        "0ms",
        "12ms",
        "1s",
        "1.5s",
        "59.952s",
        "1m0s",
        "6m0s",
        "1m30.5s",
    ]


# --- models ----------------------------------------------------------------------------------------


def test_a_model_that_a_key_may_not_use_does_not_exist_for_it(start: Serve, settings: Settings) -> None:
    headers, running = key(settings, models="another"), start()
    refused = ask(running, headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "serves " in refused.json()["error"]["message"]
    assert "`scripted`" not in refused.json()["error"]["message"].partition("serves")[2]
    with running.client(headers=headers) as client:
        assert client.get("/v1/models").json()["data"] == []
        assert client.get("/v1/models/scripted").status_code == 404
        assert client.post("/tokenize", json={"model": "scripted", "prompt": "a"}).status_code == 404
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 404, "nor as the default"
    allowed = key(settings, models="scripted, another")
    until(lambda: ask(running, allowed).status_code == 200, 10)
    with running.client(headers=allowed) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["scripted"]


# --- what a call is charged -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "requests", "tokens"), [("free", 1, IN + OUT), ("requests", 3, IN + OUT), ("full", 3, 3 * (IN + OUT))]
)
def test_a_hit_costs_what_the_setting_says(
    start: Serve, settings: Settings, shared_redis: RedisServer, cost: str, requests: int, tokens: int
) -> None:
    headers, running = key(settings, rpm="4", budget="1000 tokens/day"), start(limit_hits=cost)
    assert [ask(running, headers).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]
    assert settled(shared_redis, running) == tokens
    left = ask(running, headers, "another").headers["x-ratelimit-remaining-requests"]
    assert left == str(4 - requests - 1), "one comes back in 15 s"


def test_who_shares_a_generation_pays_as_for_a_hit(start: Serve, settings: Settings, shared_redis: RedisServer) -> None:
    headers, running = key(settings, budget="1000 tokens/day"), start(is_driven=True)
    body = chat(stream=True, max_tokens=50)
    calls = [Asking(running.url, body, **headers)]
    script = script_of(running)
    calls.append(Asking(running.url, body, **headers))
    on_loop(running, script.say, "one ")
    until(lambda: all(each.lines for each in calls))
    on_loop(running, script.say, "two ")
    on_loop(running, script.finish)
    assert sorted(str(each.done().status) for each in calls) == ["miss", "shared"]
    assert settled(shared_redis, running) == IN + 2


def test_a_client_that_leaves_pays_for_what_was_generated(
    start: Serve, settings: Settings, shared_redis: RedisServer
) -> None:
    headers, running = key(settings, budget="1000 tokens/day"), start(is_driven=True, keep_alive_s=0.3)
    body = chat(stream=True, max_tokens=50)
    with running.client(headers=headers) as client, client.stream("POST", CHAT, json=body) as response:
        script = script_of(running)
        for word in ("one ", "two ", "three "):
            on_loop(running, script.say, word)
        lines = response.iter_lines()
        while "three" not in next(lines):
            continue
    until(lambda: running.engine.running == 0)
    assert settled(shared_redis, running) == IN + 3


def test_what_breaks_or_is_refused_costs_no_tokens(start: Serve, settings: Settings, shared_redis: RedisServer) -> None:
    headers, running = key(settings, rpm="100", budget="1000 tokens/day"), start(is_driven=True)
    call = Asking(running.url, chat(stream=True, max_tokens=50), **headers)
    script = script_of(running)
    on_loop(running, script.say, "half an ")
    on_loop(running, script.fail, EngineFailed("the engine failed on this call"))
    assert call.done().payloads[-1]["error"]["code"] == "engine_error"
    refused = ask(running, headers, top_p="much")
    assert refused.status_code == 400
    assert refused.headers["x-ratelimit-remaining-requests"] in ("98", "99"), "the request counts"
    assert settled(shared_redis, running) == 0


def test_a_retry_with_its_idempotency_key_costs_what_a_hit_does(
    start: Serve, settings: Settings, shared_redis: RedisServer
) -> None:
    headers, running = key(settings, budget="1000 tokens/day"), start()
    again = [ask(running, headers | {"idempotency-key": "k1"}, temperature=1.0) for _ in range(2)]
    assert [each.headers["x-cache"] for each in again] == ["miss", "hit"]
    assert settled(shared_redis, running) == IN + OUT


def test_money_is_counted_by_the_prices_in_and_out(start: Serve, settings: Settings, shared_redis: RedisServer) -> None:
    headers = key(settings, budget=f"{(IN * 2 + OUT * 10) / 1e6:.6f} money/month")
    running = start(price_prompt_per_million=2.0, price_completion_per_million=10.0)
    assert [ask(running, headers, word).status_code for word in ("hello", "hallo")] == [200, 429]
    assert settled(shared_redis, running) == IN * 2 + OUT * 10
    assert Prices(0.15, 0.6).cost(Usage(1, 1), Budget(1, True, Period.DAY)) == 1, "a begun millionth counts"


def test_a_call_without_a_limit_reserves_all_that_the_model_can_take(start: Serve, settings: Settings) -> None:
    headers, running = key(settings, budget="5000 tokens/day"), start()
    with running.client(headers=headers) as client:
        refused = client.post(CHAT, json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert f"{8192 - IN} out" in refused.json()["error"]["message"]
        for path, field in (("/v1/responses", "input"), ("/v1/completions", "prompt")):
            asked = {"model": "scripted", field: "hello", "temperature": 0}
            answer = client.post(path, json=asked)
            assert answer.status_code == (429 if path == "/v1/responses" else 200), "completions have 16 by themselves"
        several = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 200, "max_tokens": 16})
        assert "6400 out" in several.json()["error"]["message"]
        assert client.post(CHAT, json=chat(max_tokens="6")).status_code == 400, "the engine would read it as a number"


# --- calls at one time, and Redis away ---------------------------------------------------------------


def test_calls_at_one_time_are_counted_over_all_servers_and_without_redis_in_each(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    settings = make_settings(tmp_path, own_redis)
    headers = key(settings, concurrency="2")
    servers = [run_server(settings, is_driven=True) for _ in range(2)]
    try:
        calls = [Asking(server.url, chat(server.url, stream=True), **headers) for server in servers]
        scripts = [script_of(server) for server in servers]
        refused = ask(servers[0], headers, "one more")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 calls of this key may run at one time" in refused.json()["error"]["message"]
        own_redis.send(signal.SIGKILL)
        calls += [Asking(server.url, chat("another", stream=True), **headers) for server in servers]
        scripts += [script_of(server) for server in servers]
        for server in servers:
            assert ask(server, headers, "one more").status_code == 429, "each server's own count holds"
        for server, script in zip(servers * 2, scripts, strict=True):
            on_loop(server, script.say, "done ")
            on_loop(server, script.finish)
        assert all(call.done().is_whole for call in calls)
    finally:
        for server in servers:
            server.stop()


def test_without_redis_hits_and_rates_go_on_and_a_budget_is_a_503(tmp_path: Path, own_redis: RedisServer) -> None:
    settings = make_settings(tmp_path, own_redis)
    rate, spends = key(settings, rpm="100"), key(settings, budget="1000 tokens/day")
    running = run_server(settings)
    try:
        for _ in range(2):
            assert ask(running, spends).status_code == 200
        own_redis.send(signal.SIGKILL)
        until(lambda: ask(running, rate, "other").status_code == 200)
        refused = ask(running, spends, "other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limits_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        own_redis.start()
        until(lambda: ask(running, spends, "other").status_code == 200)
    finally:
        running.stop()


def test_sequential_calls_of_a_key_for_one_at_a_time_never_meet_themselves(start: Serve, settings: Settings) -> None:
    headers, running = key(settings, concurrency="1"), start()
    with running.client(headers=headers) as client:
        statuses = {client.post(CHAT, json=chat(f"q{number}", max_tokens=1)).status_code for number in range(100)}
    assert statuses == {200}


# --- writing limits down ------------------------------------------------------------------------------


def test_the_commands_set_change_and_show_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFRAIN_HOME", str(tmp_path))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["keys", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    run("create", "--tenant", "shop", "--rpm", "60", "--budget", "25.50 money/month", "--models", "a, b")
    (row,) = json.loads(run("list", "--json"))
    assert row["limits"] == {"rpm": 60, "budget": "25.50 money/month", "models": ["a", "b"]}
    changed = run("limit", row["id"], "--rpm", "default", "--tpm", "none", "--trim", "oldest")
    assert all(part in changed for part in ("tpm=none", "trim=oldest", "models=a,b"))
    assert "rpm" not in changed
    assert "budget=25.50 money/month" in run("list")


@pytest.mark.parametrize(
    "given",
    [
        {"rpm": "0"},
        {"rpm": "-1"},
        {"rpm": "many"},
        {"tpm": "1.5"},
        {"trim": "newest"},
        {"budget": "100"},
        {"budget": "0 tokens/day"},
        {"budget": "0.00 money/day"},
        {"budget": "1.5 tokens/day"},
        {"budget": "100 tokens/week"},
    ],
)
def test_what_is_no_limit_is_refused_in_one_line(given: dict[str, str]) -> None:
    with pytest.raises(StartRefused) as refused:
        NONE_OF_ITS_OWN.changed(given)
    assert "\n" not in str(refused.value)


def test_a_limit_is_the_keys_own_or_the_settings_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_LIMIT_RPM", "60")
    monkeypatch.setenv("REFRAIN_LIMIT_BUDGET", "1000000 tokens/month")
    standard = defaults(load())
    assert standard == Limits(rpm=60, budget=Budget(1_000_000, False, Period.MONTH))
    file = KeyFile(tmp_path / "keys.json")
    own = [{}, {"rpm": "5"}, {"rpm": "none", "budget": "0.5 money/hour"}]
    secrets = [file.create("shop", limits=NONE_OF_ITS_OWN.changed(each))[0] for each in own]
    found = [Gate(file, standard).admit(secret).limits for secret in secrets]
    assert [each.rpm for each in found] == [60, 5, None]
    assert [each.budget for each in found] == [standard.budget, standard.budget, budget("0.5 money/hour")]
    assert Gate(KeyFile(tmp_path / "none.json"), standard).admit(None).limits == standard, (
        "who needs no key has them too"
    )


@pytest.mark.parametrize("name", ["limit_budget", "limit_rpm"])
def test_settings_that_are_no_limits_refuse_to_start(name: str) -> None:
    with pytest.raises(StartRefused):
        load(**{name: "a lot"})
    with pytest.raises(StartRefused, match="PRICE"):
        load(limit_budget="5 money/day")


def test_a_keys_file_with_a_budget_that_is_none_refuses_to_start(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.create("shop", limits=NONE_OF_ITS_OWN.changed({"budget": "5 tokens/day"}))
    path = tmp_path / "keys.json"
    path.write_text(path.read_text().replace("tokens/day", "apples/day"))
    with pytest.raises(StartRefused, match="no budget"):
        Gate(file)
