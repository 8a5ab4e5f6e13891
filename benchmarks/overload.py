"""Three times as many calls as the server can answer: what it answers, what it refuses, and how it recovers."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.openloop import Client, Outcome, call, poisson, quantile
from benchmarks.report import Report, step, verdict

PHYSICS = """\
What is offered beyond capacity cannot be answered, whatever is done. It can be refused at once, which costs next to
nothing, or it can wait until nobody wants its answer any more, and make all others wait. Here the queue may hold what
the engine works off in a few seconds: the time to the first token of what is admitted is bounded by that, the engine
is never idle, and when the load ends the queue is empty that much later. Calls come at random moments (Poisson) that
are fixed beforehand, and times count from those."""

LOAD = 3.0
MAX_WAIT_S = 4.0
WORDS, TOKENS = 48, 64
PLACES = 32
# What the engine needs to fill up is no part of the rate.
RAMP_S = 5.0
RECOVERY_S = 10.0
# Calls after the load, that show whether it is over: so few and short that they are no load themselves.
PROBE_EVERY_S, PROBE_TOKENS = 0.5, 4
ENGINES: dict[str, dict[str, str]] = {
    "scripted": {
        "REFRAIN_ENGINE": "scripted",
        "REFRAIN_SCRIPTED_MAX_CALLS": str(PLACES),
        "REFRAIN_SCRIPTED_TOKENS_PER_S": "100",
        "REFRAIN_SCRIPTED_TOTAL_TOKENS_PER_S": "1000",
    },
    "vllm": {"REFRAIN_MAX_NUM_SEQS": str(PLACES)},
}


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    del rounds
    seconds = 30.0 if quick else 180.0
    servers.weights(step)
    settings = {"load": LOAD, "seconds": seconds, "max_wait_s": MAX_WAIT_S, "words": WORDS, "tokens": TOKENS}
    report = Report("overload", PHYSICS, settings)
    results = [{"engine": name} | one_engine(name, seconds) for name in ENGINES]
    return _tell(report, results, save)


def one_engine(name: str, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        home = stack.enter_context(servers.fresh_home())
        environment = ENGINES[name] | {"REFRAIN_QUEUE_MAX_WAIT_S": str(MAX_WAIT_S), "REFRAIN_ACCESS_LOG": "false"}
        server = stack.enter_context(servers.refrain(home, logs, **environment))
        server.wait_ok("/readyz", 600, 0.1)
        return asyncio.run(_measure(name, server.url, seconds))


async def _measure(name: str, url: str, seconds: float) -> dict[str, Any]:
    make = partial(call, WORDS, TOKENS)
    await Client(url).closed("warm up", PLACES, 3.0, make)
    alone = await _unloaded_s(url)
    client = Client(url)
    await client.closed("capacity", PLACES + PLACES // 4, 12.0, make)
    capacity = rate(client.outcomes, 3.0, 12.0)
    step(
        f"{name}: capacity {capacity:.0f} tokens/s, first token unloaded {alone * 1000:.0f} ms; now {LOAD:g} times that"
    )
    client = Client(url)
    probes = [seconds + PROBE_EVERY_S * number for number in range(int(2 * RECOVERY_S / PROBE_EVERY_S))]
    await asyncio.gather(
        client.open_loop("load", poisson(LOAD * capacity / TOKENS, seconds), make),
        client.open_loop("probe", iter(probes), partial(call, WORDS, PROBE_TOKENS)),
    )
    return _figures(client.outcomes, capacity, alone, seconds)


async def _unloaded_s(url: str) -> float:
    """The time to the first token of one call alone, the median of some."""
    client, found = Client(url), []
    for _ in range(9):
        one = await client.send(Outcome(time.perf_counter() - client.began, "alone"), call(WORDS, PROBE_TOKENS))
        found.append(one.first_s or 0.0)
    return quantile(found, 0.5)


def rate(outcomes: list[Outcome], from_s: float, until_s: float) -> float:
    """Tokens of whole answers a second, as they came: answers end in bunches, tokens do not."""
    return sum(each.tokens_between(from_s, until_s) for each in outcomes) / (until_s - from_s)


def _figures(outcomes: list[Outcome], capacity: float, alone_s: float, seconds: float) -> dict[str, Any]:
    load = [each for each in outcomes if each.who == "load"]
    admitted = [each for each in load if each.status == 200]
    refused = [each for each in load if each.status in (429, 503)]
    firsts = [each.first_s for each in admitted if each.first_s is not None]
    late = [each for each in outcomes if each.who == "probe" and (each.first_s is None or each.first_s > 2 * alone_s)]
    return {
        "capacity_tokens_per_s": round(capacity),
        "offered": len(load),
        "admitted": len(admitted),
        "refused": len(refused),
        "neither": len(load) - len(admitted) - len(refused),
        "cut": sum(not each.is_whole for each in admitted),
        "goodput": round(rate(load, RAMP_S, seconds) / capacity, 3),
        "first_token_alone_ms": round(alone_s * 1000, 1),
        "first_token_p50_ms": round(quantile(firsts, 0.5) * 1000, 1),
        "first_token_p99_ms": round(quantile(firsts, 0.99) * 1000, 1),
        "refusal_p50_ms": round(quantile([each.done_s for each in refused], 0.5) * 1000, 2),
        "refusal_p99_ms": round(quantile([each.done_s for each in refused], 0.99) * 1000, 2),
        "recovered_after_s": round(max((each.at_s - seconds + PROBE_EVERY_S for each in late), default=0.0), 1),
    }


def _tell(report: Report, results: list[dict[str, Any]], save: bool) -> dict[str, Any]:
    names = list(results[0])
    rows = [[name, *(one[name] for one in results)] for name in names if name != "engine"]
    report.table("what came of it", ["", *(one["engine"] for one in results)], rows)
    bars = []
    for one in results:
        p99_s = one["first_token_p99_ms"] / 1000
        bars += [
            [one["engine"], "goodput, of capacity", ">= 0.9", one["goodput"], verdict(one["goodput"] >= 0.9)],
            [one["engine"], "p99 first token, s", f"<= {2 * MAX_WAIT_S:g}", p99_s, verdict(p99_s <= 2 * MAX_WAIT_S)],
            [one["engine"], "refusal p50, ms", "< 50", one["refusal_p50_ms"], verdict(one["refusal_p50_ms"] < 50)],
            [
                one["engine"],
                "recovery, s",
                f"<= {RECOVERY_S:g}",
                one["recovered_after_s"],
                verdict(one["recovered_after_s"] <= RECOVERY_S),
            ],
            [
                one["engine"],
                "cut or failed",
                "0",
                one["cut"] + one["neither"],
                verdict(not one["cut"] + one["neither"]),
            ],
        ]
    report.table("bars", ["engine", "", "aim", "", ""], bars)
    return report.finish(save, results=results)
