"""What each kind of call costs the Redis that replicas share: commands, round trips, bytes, its processor time.

`capacity` multiplies these. They are the server's own counters (`INFO`), before and after calls of one kind.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from benchmarks import servers
from benchmarks.openloop import Call
from benchmarks.replicas import Bearing, Outcome, on_redis, question
from benchmarks.report import Report

PHYSICS = """\
Redis executes commands on one thread, so its processor time per call says how many calls it bears; bytes say when its
network is full. A hit that a replica holds itself asks nobody. A miss boards a flight, publishes what it says twenty
times a second at most, and records its answer, of which every replica is told (client-side caching, broadcasting)."""

CALLS = 60
SHORT, LONG = 1, 60
TOKENS_PER_S = 40.0
WRITES, TRACKERS = 2000, 20
IDLE_S = 5.0
FOLLOWED_AFTER_S = 0.4


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    del rounds
    calls = CALLS // 3 if quick else CALLS
    report = Report("redis_cost", PHYSICS, {"calls": calls, "tokens": [SHORT, LONG], "tokens_per_s": TOKENS_PER_S})
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        _, port = stack.enter_context(servers.valkey(logs))
        found = asyncio.run(measure_on(stack, logs, f"redis://127.0.0.1:{port}", calls=calls))
    columns = ["one", *next(iter(found.values()))]
    report.table("of each kind", columns, [[kind, *each.values()] for kind, each in found.items()])
    return report.finish(save, results=found)


async def measure_on(
    stack: ExitStack, logs: Path, redis_url: str, *, calls: int, followed: int = LONG, **environment: str
) -> dict[str, dict[str, float]]:
    """Two replicas, started on this Redis until the stack is closed, and the cost of one of each kind."""
    rate = {"REFRAIN_SCRIPTED_TOKENS_PER_S": str(TOKENS_PER_S)}
    replicas = await asyncio.to_thread(on_redis, stack, logs, 2, redis_url, **(rate | environment))
    return await measure([each.url for each in replicas], redis_url, calls, followed)


async def measure(urls: list[str], redis_url: str, calls: int, followed: int = LONG) -> dict[str, dict[str, float]]:
    """The cost of one of each kind; `followed`: how many tokens those have that are followed."""
    async with Redis.from_url(redis_url) as redis:
        meter, (one, other) = Meter(redis), urls
        await meter.calibrate()
        found = {"idle replica, a second": await meter.of(asyncio.sleep(IDLE_S), IDLE_S * len(urls))}
        short, long = [question(n, 1) | {"max_tokens": SHORT} for n in range(calls)], _long(calls)
        found["short miss"] = await meter.of(_ask(one, short, "miss"), calls)
        found["long miss"] = await meter.of(_ask(one, long, "miss"), calls)
        found["recording"] = dict.fromkeys(found["long miss"], 0.0) | {"memory_bytes": await _kept_bytes(redis)}
        found["far hit"] = await meter.of(_ask_in_turn(other, long, "hit"), calls)
        await _ask(one, long, "hit")  # its own write made it forget them
        found["near hit"] = await meter.of(_ask(one, long, "hit"), calls)
        shared = _long(calls, seed=2, tokens=followed)
        found["miss with a follower elsewhere"] = await meter.of(_followed(one, other, shared), calls)
        return found | await _told(meter, redis_url)


def _long(calls: int, seed: int = 1, tokens: int = LONG) -> list[Call]:
    return [question(number, seed) | {"max_tokens": tokens, "ignore_eos": True} for number in range(calls, 2 * calls)]


async def _kept_bytes(redis: Any) -> float:
    """Of the largest recording, a long answer's, with Redis's own overhead."""
    return float(max([await redis.memory_usage(name) async for name in redis.scan_iter(match="*:answer:*")]))


async def _followed(one: str, other: str, calls: list[Call]) -> None:
    """All of them led by one, and followed by the other from near their beginning on."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_ask(one, calls, "miss"))
        await asyncio.sleep(FOLLOWED_AFTER_S)
        group.create_task(_ask(other, calls, "shared"))


async def _ask_in_turn(url: str, calls: list[Call], status: str) -> None:
    """One after the other: what is asked at one moment would go to Redis in one command."""
    for call in calls:
        await _ask(url, [call], status)


async def _ask(url: str, calls: list[Call], status: str) -> None:
    """All of them at once; each must be answered with this `x-cache`."""
    client = Bearing(url)
    done = await asyncio.gather(*(client.send(Outcome(0.0, url), call) for call in calls))
    assert all(each.is_whole and each.cache == status for each in done), {(each.status, each.cache) for each in done}


async def _told(meter: Meter, url: str) -> dict[str, dict[str, float]]:
    """A write of a recording, alone and with many that are told of it."""
    name = "other:answer:*:scripted@0123456789ab:" + "0" * 64  # as long as ours, and none of ours

    async def write() -> None:
        for _ in range(WRITES):
            await meter.redis.set(name, b"x", px=60_000)

    alone = await meter.of(write(), WRITES)
    async with _trackers(url, "other:answer:"):
        watched = await meter.of(write(), WRITES)
    told = {key: (watched[key] - alone[key]) / TRACKERS for key in alone}
    return {"write": alone, "replica told of a write": told}


@asynccontextmanager
async def _trackers(url: str, prefix: str) -> AsyncIterator[None]:
    """Connections that are told of every write, as each replica's is, and read what they are told."""
    clients = [Redis.from_url(url, protocol=3, single_connection_client=True) for _ in range(TRACKERS)]
    reading: list[asyncio.Task[Any]] = []
    for each in clients:
        await each.initialize()
        connection = each.connection
        await connection.send_command("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", prefix)
        await connection.read_response()
        reading.append(asyncio.create_task(_drain(connection)))
    try:
        yield
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for each in clients:
            await each.aclose()


async def _drain(connection: Any) -> None:
    while await connection._reader.read(65536):
        pass


class Meter:
    """Redis's own counters over some work, each divided by how many calls it was."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis
        self._own: dict[str, float] = {}

    async def calibrate(self) -> None:
        """What the reading itself adds to the counters."""
        readings = [await self._read() for _ in range(11)]
        self._own = {name: (value - readings[0][name]) / 10 for name, value in readings[-1].items()}

    async def of(self, work: Any, count: float) -> dict[str, float]:
        before = await self._read()
        await work
        await asyncio.sleep(0.3)  # what is written behind the answer's back
        after = await self._read()
        return {name: round(max(0.0, after[name] - before[name] - self._own[name]) / count, 2) for name in before}

    async def _read(self) -> dict[str, float]:
        info = await self.redis.info("all")
        calls = {name: info.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("mget", "eval", "evalsha", "xread")}
        return {
            "commands": info["total_commands_processed"],
            "round_trips": info["total_reads_processed"],
            "bytes_in": info["total_net_input_bytes"],
            "bytes_out": info["total_net_output_bytes"],
            "cpu_us": 1e6 * (info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]),
            "memory_bytes": info["used_memory_dataset"],
            "mgets": calls["mget"],
            "evals": calls["eval"] + calls["evalsha"],
            "xreads": calls["xread"],
        }
