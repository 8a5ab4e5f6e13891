"""N replicas under a fixed rate of calls, whether they run already or are started here on one Redis.

The calls of each replica are a Poisson process of its own, as behind a balancer that picks at random; which prompt a
call asks follows Zipf's law, as in `zipf`. All is fixed by the seed before the first call is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.openloop import Call, Client, Outcome, poisson
from benchmarks.report import Report, step
from benchmarks.zipf import EXPONENT, PROMPTS

PHYSICS = """\
Calls come when they come, and wait for no answer: a replica that stands still is charged for all who came meanwhile
(no coordinated omission). Times count from the planned moment. A call without a whole answer counts as one whose
answer never came: dropping it would make a failing server look fast. "client late" is how late this client was with
sending: where it is not far below the times beside it, the client was the bottleneck and the run says nothing."""

TOKENS = 32
# A call that takes longer than this has failed.
TIMEOUT_S = 60.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SCRIPTED = {"REFRAIN_ENGINE": "scripted", "REFRAIN_SCRIPTED_TOKENS_PER_S": "200", "REFRAIN_ACCESS_LOG": "false"}


class Bearing(Client):
    """A client that takes failures as outcomes: a call that broke, or took too long, is one that is not whole."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(url)
        self._timeout_s = timeout_s

    async def send(self, outcome: Outcome, body: Call, key: str = "none") -> Outcome:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await super().send(outcome, body, key)
        except (OSError, ValueError, IndexError):  # not there, too late, or no HTTP
            outcome.is_whole = False
            return outcome


def run(
    *,
    quick: bool,
    rounds: int | None,
    save: bool,
    url: Sequence[str] = (),
    start: int = 2,
    rate: float = 200.0,
    seconds: float = 20.0,
    seed: int = 1,
) -> dict[str, Any]:
    del rounds
    seconds = min(seconds, 5.0) if quick else seconds
    settings = {"rate_per_s": rate, "seconds": seconds, "seed": seed, "prompts": PROMPTS, "exponent": EXPONENT}
    report = Report("replicas", PHYSICS, settings | {"tokens": TOKENS, "replicas": len(url) or start})
    with ExitStack() as stack:
        urls = list(url) or started(stack, start)
        step(f"{rate:g} calls/s for {seconds:g} s to {len(urls)} replicas")
        outcomes = asyncio.run(drive(urls, rate, seconds, seed=seed))
    return _tell(report, outcomes, rate, seconds, save)


def started(stack: ExitStack, count: int, **environment: str) -> list[str]:
    """Replicas with scripted engines on one Valkey, each with a home of its own; until the stack is closed."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
    _, port = stack.enter_context(servers.valkey(logs))
    return [each.url for each in on_redis(stack, logs, count, f"redis://127.0.0.1:{port}", **environment)]


def on_redis(stack: ExitStack, logs: Path, count: int, redis_url: str, **environment: str) -> list[servers.Server]:
    step(f"starting {count} replicas")
    environment = SCRIPTED | {"REFRAIN_REDIS_URL": redis_url} | environment
    found = [stack.enter_context(servers.refrain(logs / f"home-{n}", logs, **environment)) for n in range(count)]
    for each in found:
        each.wait_ok("/readyz")
    return found


def asked(seed: int, replica: int) -> Callable[[], Call]:
    """What one replica is asked: number k with a probability that falls as 1/k^EXPONENT."""
    chosen = random.Random(f"{seed} {replica}")
    weights = list(itertools.accumulate(1 / rank**EXPONENT for rank in range(1, PROMPTS + 1)))
    return lambda: question(chosen.choices(range(PROMPTS), cum_weights=weights)[0], seed)


def question(number: int, seed: int) -> Call:
    content = f"Run {seed}, ticket {number}: my order {number * 7919 % 100_000} has not arrived. What can I do?"
    body: Call = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


async def drive(
    urls: Sequence[str], rate: float, seconds: float, *, seed: int, timeout_s: float = TIMEOUT_S
) -> list[Outcome]:
    """Send to all at once, and return when each call is answered or has failed."""
    random.seed(seed)
    plans = [list(poisson(rate / len(urls), seconds)) for _ in urls]
    clients = [Bearing(url, timeout_s) for url in urls]
    async with asyncio.TaskGroup() as group:
        for number, (client, moments) in enumerate(zip(clients, plans, strict=True)):
            group.create_task(client.open_loop(urls[number], iter(moments), asked(seed, number)))
    return [outcome for client in clients for outcome in client.outcomes]


def figures(outcomes: Sequence[Outcome], rate: float, seconds: float) -> dict[str, float | None]:
    """What came of these calls; milliseconds. None stands for a time that never came."""
    whole = [each for each in outcomes if _is_answered(each)]
    found: dict[str, float | None] = {
        "offered_per_s": rate,
        "sent_per_s": len(outcomes) / seconds,
        "answered_per_s": len(whole) / max([seconds, *(each.at_s + each.done_s for each in whole)]),
        "errors": len(outcomes) - len(whole),
        "hit_share": _share(whole, "hit"),
        "shared_share": _share(whole, "shared"),
    }
    firsts = [(_is_answered(each) and each.first_s) or math.inf for each in outcomes]
    wholes = [each.done_s if _is_answered(each) else math.inf for each in outcomes]
    for what, values in (("first", firsts), ("whole", wholes)):
        found |= {f"{what}_{name}_ms": _ms(values, share) for name, share in QUANTILES.items()}
    return found | {"client_late_p99_ms": _ms([each.late_s for each in outcomes], 0.99)}


def _is_answered(outcome: Outcome) -> bool:
    return outcome.status == 200 and outcome.is_whole


def _share(outcomes: Sequence[Outcome], status: str) -> float:
    return sum(each.cache == status for each in outcomes) / len(outcomes) if outcomes else 0.0


def _ms(values: list[float], share: float) -> float | None:
    """The smallest value that so large a share does not exceed (nearest rank)."""
    if not values:
        return None
    value = sorted(values)[math.ceil(share * len(values)) - 1]
    return round(value * 1000, 2) if math.isfinite(value) else None


def _tell(report: Report, outcomes: list[Outcome], rate: float, seconds: float, save: bool) -> dict[str, Any]:
    urls = list(dict.fromkeys(each.who for each in outcomes))
    found = {
        url: figures([each for each in outcomes if each.who == url], rate / len(urls), seconds) for url in urls
    } | {"all": figures(outcomes, rate, seconds)}
    columns = ["replica", "offered/s", "sent/s", "answered/s", "errors", "hits", "shared"]
    columns += [f"{what} {name} ms" for what in ("first", "whole") for name in QUANTILES] + ["client late p99 ms"]
    rows = [
        [url.removeprefix("http://"), *("never" if value is None else value for value in one.values())]
        for url, one in found.items()
    ]
    report.table("from the planned moment of each call", columns, rows)
    return report.finish(save, results=[{"replica": url} | one for url, one in found.items()])
