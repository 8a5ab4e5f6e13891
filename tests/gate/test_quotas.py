"""The counters in Redis: no race passes a limit, dead processes' calls lapse, nothing is evicted or piles up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.cache.link import Deadline, Link
from app.domain import Budget, Caller, Limits, Period
from app.errors import LimitsUnknown, QuotaSpent, RateLimited
from app.gate import quotas
from app.gate.limits import Usage
from app.gate.quotas import Quotas, Standing
from app.settings import Settings
from tests.conftest import RedisServer, Running, make_settings, until
from tests.gate.limited import all_at_once, ask, client_of, counted, key, settled

Serve = Callable[..., Running]


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Quotas]:
    link = Link(settings, settings.redis_url.get_secret_value())  # type: ignore[union-attr]
    made = Quotas(settings, link)
    async with made.opened():
        yield made
    await link.close()


def caller(**limits: Any) -> Caller:
    return Caller("shop", "key_1", limits=Limits(**limits))


def tokens(amount: int, period: Period = Period.DAY) -> Budget:
    return Budget(amount, False, period)


# --- races ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_hundred_calls_at_once_never_pass_a_budget_for_fifty(
    serve: Serve, settings: Settings, shared_redis: RedisServer, replicas: int
) -> None:
    each = 5 + 6  # `ask` says what they are
    headers = key(settings, budget=f"{50 * each} tokens/forever")
    # On a busy machine two hundred at once keep a server from reading what Redis answered for more than a second.
    shared = {"redis_namespace": settings.redis_namespace, "redis_timeout_s": 20.0}
    servers = [serve(**shared) for _ in range(replicas)]
    asked = [(servers[number % replicas], f"question {number}") for number in range(200)]
    assert Counter(all_at_once(asked, headers)) == {200: 50, 429: 150}
    assert settled(shared_redis, servers[0]) == 50 * each
    assert counted(shared_redis, servers[0], "reserved") == 0
    assert sum(len(server.engine.calls) for server in servers) == 50


def test_two_hundred_calls_at_once_never_pass_a_rate(
    serve: Serve, settings: Settings, shared_redis: RedisServer
) -> None:
    headers = key(settings, rpm="50")
    servers = [serve(redis_namespace=settings.redis_namespace, redis_timeout_s=20.0) for _ in range(2)]
    began = time.monotonic()
    statuses = Counter(all_at_once([(servers[number % 2], f"question {number}") for number in range(200)], headers))
    came_back = (time.monotonic() - began) * 50 / 60
    assert 50 <= statuses[200] <= 50 + came_back + 1
    assert statuses[200] + statuses[429] == 200


async def test_a_bucket_holds_a_minutes_worth_and_fills_at_its_rate(settings: Settings) -> None:
    slow = caller(rpm=6)  # one comes back in 10 s: none in the time that this takes
    fast = Caller("shop", "key_2", limits=Limits(rpm=60))
    async with opened(settings) as counting:
        stands = [await counting.charge(slow, Usage()) for _ in range(6)]
        assert [each.requests_left for each in stands if each is not None] == [5, 4, 3, 2, 1, 0]
        assert 50_000 < stands[-1].requests_reset_ms <= 60_000  # type: ignore[union-attr]
        with pytest.raises(RateLimited, match="RPM"):
            await counting.charge(slow, Usage())
        calls = (counting.charge(fast, Usage()) for _ in range(120))  # more than it holds and than come back meanwhile
        found = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in found if isinstance(each, RateLimited)]
        assert 0 < len(refused) <= 60
        assert len(refused) + sum(isinstance(each, Standing) for each in found) == 120
        assert {each.headers["retry-after"] for each in refused} == {"1"}
        await asyncio.sleep(1.1)
        assert await enters(counting, fast)


async def test_what_was_not_taken_is_given_back_and_what_was_taken_beyond_is_owed(settings: Settings) -> None:
    asks = caller(tpm=1000, budget=tokens(1000))
    began = time.monotonic()
    async with opened(settings) as counting:
        async with counting.reserved(asks, Usage(100, 900)) as hold:
            with pytest.raises(RateLimited):
                await counting.charge(asks, Usage(500, 0))
            hold.took = Usage(100, 50)
        standing = await counting.charge(asks, Usage())
        came_back = (time.monotonic() - began) * 1000 / 60
        assert standing is not None
        assert 850 <= standing.tokens_left <= 850 + came_back + 1
        assert standing.budget_left == 850
        async with counting.reserved(asks, Usage(100, 100)) as hold:
            hold.took = Usage(100, 1200)  # more than was said: it is charged all the same
        with pytest.raises(RateLimited, match="TPM"):
            await counting.charge(asks, Usage(1, 0))
        with pytest.raises(QuotaSpent):
            await counting.charge(caller(budget=tokens(1000)), Usage(1, 0))


async def test_a_call_for_more_than_a_minutes_tokens_waits_for_a_full_bucket_and_is_never_locked_out(
    settings: Settings,
) -> None:
    asks = caller(tpm=1000)
    async with opened(settings) as counting:
        async with counting.reserved(asks, Usage(10, 5000)) as hold:
            hold.took = Usage(10, 490)  # which are back after 30 s
        with pytest.raises(RateLimited):
            async with counting.reserved(asks, Usage(10, 5000)):
                raise AssertionError("the bucket is not full")


# --- a process that dies, a clock that jumps, a Redis that is away ---------------------------------


async def enters(counting: Quotas, asks: Caller, most: Usage = Usage(0, 10)) -> bool:  # noqa: B008
    """Whether a call of this caller is let in now."""
    try:
        async with counting.reserved(asks, most):
            return True
    except RateLimited:
        return False


async def test_a_call_whose_process_died_lapses_and_one_that_runs_does_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "LEASE_S", 4.5)  # said again after 1.5 s: this machine may stand still for three
    runs, died = (
        Caller("shop", ident, limits=Limits(concurrency=1, budget=tokens(100))) for ident in ("key_1", "key_2")
    )
    async with opened(settings) as alive, opened(settings) as other:
        async with opened(settings) as dead:
            monkeypatch.setattr(dead, "_renew", asyncio.Event().wait)  # says nothing any more, as if it had died
            async with alive.reserved(runs, Usage(0, 100)), dead.reserved(died, Usage(0, 100)) as hold:
                assert not await enters(other, runs)
                assert not await enters(other, died)
                async with asyncio.timeout(30):
                    while not await enters(other, died):
                        await asyncio.sleep(0.1)
                assert not await enters(other, runs)
                hold.took = Usage(0, 70)
        # It was only paused, and settles after all, once.
        assert not await enters(other, died, Usage(0, 31))
        assert await enters(other, died, Usage(0, 30))


async def test_no_clock_but_rediss_counts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = caller(rpm=1, budget=tokens(100, Period.MONTH))
    async with opened(settings) as counting:
        await counting.charge(asks, Usage(60, 0))
        really = time.time
        for step_s in (86_400 * 40, -86_400 * 40):
            monkeypatch.setattr(time, "time", lambda step_s=step_s: really() + step_s)
            with pytest.raises(RateLimited, match="RPM"):
                await counting.charge(asks, Usage())
            with pytest.raises(QuotaSpent):
                await counting.charge(asks, Usage(60, 0), requests=0)


@pytest.mark.parametrize(("kind", "form"), [("hour", "%Y%m%d%H"), ("day", "%Y%m%d"), ("month", "%Y%m")])
def test_periods_are_the_calendars(shared_redis: RedisServer, kind: str, form: str) -> None:
    script = (Path(quotas.__file__).parent / "lua" / "common.lua").read_text() + "return {period(ARGV[1], ARGV[2])}"
    moments = [
        datetime(2026, 11, 25, 4, 59, 59, tzinfo=UTC) + timedelta(days=day, hours=day) for day in range(0, 3000, 17)
    ]
    moments += [
        datetime(year, 2, 28, 23, tzinfo=UTC) + timedelta(hours=h) for year in (2027, 2028, 2100) for h in (0, 1, 25)
    ]
    names: dict[str, set[str]] = {}
    for moment in moments:
        name, ends = client_of(shared_redis).eval(script, 0, int(moment.timestamp() * 1000), kind)
        names.setdefault(name, set()).add(moment.strftime(form))
        end = datetime.fromtimestamp(int(ends) / 1000, UTC)
        assert moment.strftime(form) == (end - timedelta(seconds=1)).strftime(form) != end.strftime(form)
    assert all(len(same) == 1 for same in names.values())
    assert len(names) == len({moment.strftime(form) for moment in moments})


async def test_a_settlement_that_redis_did_not_hear_is_made_later_and_once(
    tmp_path: Path, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "LEASE_S", 0.6)
    settings = make_settings(tmp_path, own_redis)
    asks = caller(budget=tokens(100))
    async with opened(settings) as counting:
        with monkeypatch.context() as impatient:
            async with counting.reserved(asks, Usage(0, 100)) as hold:
                hold.took = Usage(0, 70)
                own_redis.send(signal.SIGSTOP)
                impatient.setattr(counting._link, "deadline", lambda: Deadline(0.2))
            await asyncio.to_thread(until, lambda: counting._unsettled)  # Redis finds it on its socket all the same
        own_redis.send(signal.SIGCONT)
        await asyncio.to_thread(until, lambda: not counting._unsettled)
        assert not await enters(counting, asks, Usage(0, 31))
        assert await enters(counting, asks, Usage(0, 30))


async def test_with_redis_away_rates_are_open_and_budgets_closed_unless_set_otherwise(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    own_redis.send(signal.SIGKILL)
    default = make_settings(tmp_path, own_redis)
    other = make_settings(tmp_path, own_redis, limit_rates_without_redis="closed", limit_budgets_without_redis="open")
    rate, budget, at_once = caller(rpm=1), caller(budget=tokens(100)), caller(concurrency=1)
    async with opened(default) as counting:
        assert [await enters(counting, rate) for _ in range(3)] == [True] * 3
        with pytest.raises(LimitsUnknown) as refused:
            await enters(counting, budget)
        assert (refused.value.status, int(refused.value.headers["retry-after"])) == (503, 2)
        await counting.charge(budget, Usage())  # a hit costs it nothing, so nothing is in danger
        async with counting.reserved(at_once, Usage()):
            assert not await enters(counting, at_once)
        assert await enters(counting, at_once)
    async with opened(other) as counting:
        assert await enters(counting, budget)
        with pytest.raises(LimitsUnknown):
            await enters(counting, rate)


# --- what is kept ----------------------------------------------------------------------------------


async def test_counters_have_no_ttl_and_are_forgotten_once_they_do_not_matter(
    settings: Settings, shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "LEASE_S", 3.0)  # a third of it lies between two sweeps
    monkeypatch.setattr(quotas, "SWEEP_AFTER_S", 0.1)
    redis = client_of(shared_redis)

    def names() -> list[str]:
        return list(redis.scan_iter(f"{settings.redis_namespace}:limit:*"))

    async with opened(settings) as counting:
        async with counting.reserved(caller(rpm=60_000, tpm=60_000, budget=tokens(10)), Usage(0, 10)):
            assert len(names()) == 3
            assert {redis.ttl(name) for name in names()} == {-1}, "a TTL would let a full Redis evict it"
        await asyncio.to_thread(until, lambda: not names())
        spends = Caller("shop", "key_2", limits=Limits(budget=tokens(10, Period.FOREVER)))
        await counting.charge(spends, Usage(1, 0))
        swept, run = [], counting._run

        async def seen(script: str, name: str, arguments: list[Any]) -> Any:
            found = await run(script, name, arguments)
            swept.append((script, name))
            return found

        monkeypatch.setattr(counting, "_run", seen)
        await asyncio.to_thread(until, lambda: ("sweep", "key_2") in swept)
        assert len(names()) == 1, "what was spent is not forgotten"


def test_a_key_changed_while_the_server_runs_counts_within_a_second(serve: Serve, settings: Settings) -> None:
    from app.gate.keys import KeyFile

    headers = key(settings, rpm="1")
    running = serve()
    assert [ask(running, headers, word).status_code for word in ("one", "two")] == [200, 429]
    file = KeyFile(settings.keys_path)
    file.limit(file.read()[0].id, {"rpm": "none"})
    until(lambda: ask(running, headers, "three").status_code == 200, 10)
    assert "x-ratelimit-limit-requests" not in ask(running, headers, "four").headers
