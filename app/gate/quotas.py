"""The counters of keys with limits, in Redis: a call is reserved for, then settled by what it really took.

Each step is one Lua script (`lua/`) on Redis's clock, so that no race, also between servers, passes a limit. What a
process reserved it says again while the call runs; of a process that dies it lapses. Counters have no TTL: a Redis
that evicts what has one never evicts them. Here they are forgotten once they no longer matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from app.cache.link import Link, ended
from app.cache.scripts import Scripts
from app.domain import Budget, Caller, Limits
from app.errors import LimitsUnknown, QuotaSpent, RateLimited, RedisDown
from app.gate.limits import NO_USAGE, Prices, Usage, amount
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

# A running call that its server says nothing of for so long is given up; it is said three times as often.
LEASE_S = 15.0
# What the last settlements of calls are kept up to, while Redis is away.
MOST_UNSETTLED = 10_000
# A key that was not used for so long is looked at: perhaps its counters can be forgotten.
SWEEP_AFTER_S = 120.0

_SCRIPTS = Scripts(Path(__file__).parent / "lua")


class Standing(NamedTuple):
    """How a key stands after a call was let in. The order is `reserve.lua`'s."""

    requests_left: int
    requests_reset_ms: int
    tokens_left: int
    tokens_reset_ms: int
    budget_left: int


@dataclass(slots=True)
class Hold:
    """A call that was let in. `took` is what it is charged when it is over; `standing` is None with Redis away."""

    standing: Standing | None = None
    took: Usage = NO_USAGE


class Quotas:
    """Of one process. While it is open, what runs is renewed and what could not be settled is tried again."""

    def __init__(self, settings: Settings, link: Link) -> None:
        self._settings = settings
        self._link = link
        self._prices = Prices(settings.price_prompt_per_million, settings.price_completion_per_million)
        self._running: Counter[str] = Counter()
        self._held: dict[str, str] = {}
        self._unsettled: dict[str, tuple[str, list[Any]]] = {}
        self._used: dict[str, tuple[float, Limits]] = {}
        self._settling: dict[str, set[asyncio.Task[None]]] = {}

    # --- calls --------------------------------------------------------------------------------

    async def charge(self, caller: Caller, usage: Usage, *, requests: int = 1) -> Standing | None:
        """A call that is over as soon as it is let in. None: Redis is away, and it is let in all the same.

        Raises:
            RateLimited, QuotaSpent: a limit keeps it out. LimitsUnknown: Redis is away, and that closes the door.
        """
        return await self._reserve(caller, "", usage, requests)

    @contextlib.asynccontextmanager
    async def reserved(self, caller: Caller, most: Usage) -> AsyncIterator[Hold]:
        """A call that may take so many tokens, while it runs; leaving the context begins to settle by `Hold.took`.

        Raises:
            RateLimited, QuotaSpent: a limit keeps it out. LimitsUnknown: Redis is away, and that closes the door.
        """
        with self._counted(caller):
            ident, hold, name = secrets.token_hex(8), Hold(), _name(caller)
            self._held[ident] = name
            try:
                hold.standing = await self._reserve(caller, ident, most, 1)
                yield hold
            except asyncio.CancelledError:
                hold.standing = hold.standing or _UNHEARD  # cancelled while it was asked for: perhaps it was given
                raise
            finally:
                del self._held[ident]
                if hold.standing is not None:
                    self._settle(caller, ident, most, hold.took)

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        """This process's own count of running calls holds whatever becomes of Redis."""
        name, most = _name(caller), caller.limits.concurrency
        if most is not None and self._running[name] >= most:
            raise _kept_out(caller.limits, "concurrency", -1, NO_USAGE, None)
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]

    async def _reserve(self, caller: Caller, ident: str, usage: Usage, requests: int) -> Standing | None:
        limits = caller.limits
        cost = self._prices.cost(usage, limits.budget) if limits.budget else 0
        unit, period = _budgeted(limits)
        rates = [requests, _or_none(limits.rpm), usage.total, _or_none(limits.tpm), _or_none(limits.concurrency)]
        spending = [cost, limits.budget.amount if limits.budget else "", unit, period]
        if settling := self._settling.get(_name(caller)):  # who has its answer must not be held to have it still
            await asyncio.wait(settling)
        try:
            found = await self._run("reserve", _name(caller), [ident, int(LEASE_S * 1000), *rates, *spending])
        except RedisDown:
            self._let_in_unseen(limits, cost)
            return None
        self._used[_name(caller)] = (time.monotonic(), limits)
        kept_out, wait_ms, *rest = found
        if kept_out:
            raise _kept_out(limits, kept_out.decode(), wait_ms, usage, Standing(*rest))
        return Standing(*rest)

    def _settle(self, caller: Caller, ident: str, most: Usage, took: Usage) -> None:
        """In a task of its own: the call's may be cancelled. The key's next call here waits for it (`_reserve`)."""
        name = _name(caller)
        task = asyncio.create_task(self._settled(caller, ident, most, took), name="settle")
        self._settling.setdefault(name, set()).add(task)
        task.add_done_callback(lambda done: self._landed(name, done))

    def _landed(self, name: str, task: asyncio.Task[None]) -> None:
        self._settling[name].discard(task)
        if not self._settling[name]:
            del self._settling[name]

    async def _settled(self, caller: Caller, ident: str, most: Usage, took: Usage) -> None:
        limits = caller.limits
        cost = self._prices.cost(took, limits.budget) if limits.budget else 0
        arguments = [ident, most.total, took.total, _or_none(limits.tpm), cost, *_budgeted(limits)]
        try:
            await self._run("settle", _name(caller), arguments)
        except RedisDown:
            if len(self._unsettled) < MOST_UNSETTLED:
                self._unsettled[ident] = (_name(caller), arguments)

    def _let_in_unseen(self, limits: Limits, cost: int) -> None:
        is_closed = (limits.rpm or limits.tpm) and self._settings.limit_rates_without_redis == "closed"
        is_spent = limits.budget and cost and self._settings.limit_budgets_without_redis == "closed"
        if is_closed or is_spent:
            metrics.limited.labels("unknown").inc()
            raise LimitsUnknown("the limits of this key cannot be looked up at the moment", retry_after_s=2)
        metrics.uncounted.inc()

    # --- upkeep -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        upkeep = asyncio.create_task(self._keep_up(), name="limits")
        try:
            yield
        finally:
            await ended(upkeep)
            settling = [task for tasks in self._settling.values() for task in tasks]
            await asyncio.gather(*settling, return_exceptions=True)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with contextlib.suppress(RedisDown):
                await self._renew()
                await self._settle_late()
                await self._sweep()

    async def _renew(self) -> None:
        by_name: dict[str, list[str]] = {}
        for ident, name in self._held.items():
            by_name.setdefault(name, []).append(ident)
        for name, idents in by_name.items():
            await self._run("renew", name, [int(LEASE_S * 1000), *idents])

    async def _settle_late(self) -> None:
        for ident, (name, arguments) in list(self._unsettled.items()):
            await self._run("settle", name, arguments)
            del self._unsettled[ident]

    async def _sweep(self) -> None:
        now = time.monotonic()
        for name, (used_at, limits) in list(self._used.items()):
            if now - used_at >= SWEEP_AFTER_S and await self._run("sweep", name, list(_budgeted(limits))):
                del self._used[name]

    async def _run(self, script: str, name: str, arguments: list[Any]) -> Any:
        """Raises RedisDown, also where something foreign lies under one of our names."""
        keys = [f"{self._settings.redis_namespace}:limit:{{{name}}}:{part}" for part in _PARTS]
        try:
            return await self._link.ask(lambda redis: _SCRIPTS.run(redis, script, keys, arguments))
        except ResponseError as error:
            log.warning("a limit could not be counted: %s", error)
            raise RedisDown(str(error)) from error


# The four names of common.lua; their hash tag keeps them on one node of a cluster.
_PARTS = ("counters", "running", "reserved", "lapsed")
_UNHEARD = Standing(0, 0, 0, 0, 0)


def _name(caller: Caller) -> str:
    """Whose counters: a key's, or those of all who need none."""
    return caller.key_id or "*"


def _or_none(limit: int | None) -> int | str:
    return "" if limit is None else limit


def _budgeted(limits: Limits) -> tuple[str, str]:
    if limits.budget is None:
        return "", ""
    return "money" if limits.budget.is_money else "tokens", limits.budget.period.value


def headers(limits: Limits, standing: Standing) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*`: of what is limited, what is left, and how long until all of it is there again."""
    told = {}
    if limits.rpm is not None:
        told["x-ratelimit-limit-requests"] = str(limits.rpm)
        told["x-ratelimit-remaining-requests"] = str(standing.requests_left)
        told["x-ratelimit-reset-requests"] = duration(standing.requests_reset_ms)
    if limits.tpm is not None:
        told["x-ratelimit-limit-tokens"] = str(limits.tpm)
        told["x-ratelimit-remaining-tokens"] = str(standing.tokens_left)
        told["x-ratelimit-reset-tokens"] = duration(standing.tokens_reset_ms)
    return told


def duration(ms: int) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _kept_out(limits: Limits, limit: str, wait_ms: int, asked: Usage, standing: Standing | None) -> RateLimited:
    """In OpenAI's words, with the numbers. A wait below 0: nobody knows."""
    metrics.limited.labels(limit).inc()
    told = headers(limits, standing) if standing else {}
    after_s = None if wait_ms < 0 else max(1, -(-wait_ms // 1000))
    if limit == "budget" and limits.budget and standing:
        # OpenAI's clients would try again at once, which cannot help.
        told |= {"x-should-retry": "false"}
        return QuotaSpent(_quota(limits.budget, asked, standing), retry_after_s=after_s, headers=told)
    if limit == "concurrency":
        message = f"Rate limit reached: {limits.concurrency} calls of this key may run at one time."
        return RateLimited(message, type="requests", retry_after_s=1, headers=told)
    short, most, wanted = ("RPM", limits.rpm, 1) if limit == "requests" else ("TPM", limits.tpm, asked.total)
    message = (
        f"Rate limit reached on {limit} per min ({short}): Limit {most}, Requested {wanted}."
        f" Please try again in {duration(wait_ms)}."
    )
    return RateLimited(message, type=limit, retry_after_s=after_s, headers=told)


def _quota(budget: Budget, asked: Usage, standing: Standing) -> str:
    whole, left = amount(budget.amount, budget), amount(standing.budget_left, budget)
    return (
        f"You exceeded your current quota: {left} of {whole} are left ({budget.period.value}), and this call may take"
        f" {asked.prompt} tokens in and {asked.completion} out. A lower max_tokens reserves less."
    )
