"""Two tenants, one of which floods with ten times the other's load: how long the other waits for its first token."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from app.gate.keys import KeyFile
from benchmarks import overload, servers
from benchmarks.openloop import Client, Outcome, call, poisson, quantile
from benchmarks.report import Report, step, verdict

PHYSICS = """\
A batch takes in whatever is there in one step, so a new call waits for the step that runs, and then for all prompts
that go before its own or with it. The quiet tenant's best is its own prefill; under a flood it also waits for what is
left of the step that runs and for the other's tokens in its own step. Without fairness it stands behind the whole
queue of the other: "same tenant" shows that, the same two loads under one key."""

QUIET, FLOOD = "quiet", "flood"
FLOOD_LOAD = 10
# The quiet tenant's load, as a part of what the server can do: both together are 2.75 times that.
QUIET_SHARE = 0.25
WORDS, TOKENS = 160, 32
VARIANTS: dict[str, dict[str, str]] = {
    "scripted": overload.ENGINES["scripted"],
    "vllm": {},
    "vllm, steps of 512": {"REFRAIN_MAX_NUM_BATCHED_TOKENS": "512"},
}
WAYS = ("alone", "two tenants", "same tenant")


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    del rounds
    seconds = 30.0 if quick else 90.0
    servers.weights(step)
    settings = {"seconds": seconds, "flood_load": FLOOD_LOAD, "quiet_share": QUIET_SHARE}
    report = Report("fairness", PHYSICS, settings | {"words": WORDS, "tokens": TOKENS})
    names = ["scripted", "vllm"] if quick else list(VARIANTS)
    results = [row for name in names for row in one_engine(name, seconds)]
    return _tell(report, results, save)


def one_engine(name: str, seconds: float) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        home = stack.enter_context(servers.fresh_home())
        keys = {tenant: KeyFile(home / "keys.json").create(tenant)[0] for tenant in (QUIET, FLOOD)}
        environment = VARIANTS[name] | {"REFRAIN_QUEUE_MAX_WAIT_S": "5", "REFRAIN_ACCESS_LOG": "false"}
        server = stack.enter_context(servers.refrain(home, logs, **environment))
        server.wait_ok("/readyz", 600, 0.1)
        return asyncio.run(_measure(name, server.url, keys, seconds))


async def _measure(name: str, url: str, keys: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    make = partial(call, WORDS, TOKENS)
    client = Client(url)
    await client.closed(FLOOD, 32, 12.0, make, keys[FLOOD])
    capacity = overload.rate(client.outcomes, 4.0, 12.0)
    per_s = QUIET_SHARE * capacity / TOKENS
    step(f"{name}: capacity {capacity:.0f} tokens/s; the quiet tenant asks {per_s:.2f} a second")
    rows = []
    for way in WAYS:
        client = Client(url)
        quiet = client.open_loop(QUIET, poisson(per_s, seconds), make, keys[FLOOD if way == "same tenant" else QUIET])
        flood = poisson(FLOOD_LOAD * per_s, 0 if way == "alone" else seconds)
        await asyncio.gather(quiet, client.open_loop(FLOOD, flood, make, keys[FLOOD]))
        rows.append({"engine": name, "way": way} | _figures(client.outcomes, capacity, seconds))
        step(f"{name}, {way}: first token p50 {rows[-1]['first_token_p50_ms']:.0f} ms")
    return rows


def _figures(outcomes: list[Outcome], capacity: float, seconds: float) -> dict[str, Any]:
    quiet = [each for each in outcomes if each.who == QUIET]
    firsts = [each.first_s for each in quiet if each.first_s is not None]
    return {
        "quiet_calls": len(quiet),
        "quiet_refused": sum(each.status != 200 for each in quiet),
        "first_token_p50_ms": round(quantile(firsts, 0.5) * 1000, 1),
        "first_token_p95_ms": round(quantile(firsts, 0.95) * 1000, 1),
        "flood_refused": sum(each.who == FLOOD and each.status != 200 for each in outcomes),
        "tokens_per_s": round(overload.rate(outcomes, overload.RAMP_S, seconds)),
        "capacity_tokens_per_s": round(capacity),
    }


def _tell(report: Report, results: list[dict[str, Any]], save: bool) -> dict[str, Any]:
    columns = list(results[0])
    report.table("the quiet tenant", columns, [[row[name] for name in columns] for row in results])
    alone = {row["engine"]: row["first_token_p50_ms"] for row in results if row["way"] == "alone"}
    bars = []
    for row in results:
        if row["way"] == "two tenants":
            times = round(row["first_token_p50_ms"] / alone[row["engine"]], 2)
            bars.append([row["engine"], "<= 2", times, verdict(times <= 2)])
    report.table("p50 to the first token, times the tenant's own unloaded", ["engine", "aim", "", ""], bars)
    return report.finish(save, results=results, ratios={bar[0]: bar[2] for bar in bars})
