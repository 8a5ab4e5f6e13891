"""Two replicas on Ray Serve against one, and what a request pays for Ray at each of its doors."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.gate.keys import KeyFile
from benchmarks import load, servers
from benchmarks.openloop import Client, call
from benchmarks.overload import rate
from benchmarks.ray_local import deploy, ray_running
from benchmarks.report import Report, step, verdict

PHYSICS = """\
The scripted engine computes so many tokens a second, prompts counted, for all its calls together: that bounds one
replica, and not the machine, whose two cores all of this shares. Its calls alone could be three times as fast. So a
second replica should double what is answered, less what the way there costs. Each call is a new one, on a connection
of its own, at the port that the replicas share. A hit costs a server of ours a tenth of a millisecond of processor
time: what it costs by Ray's proxy is Ray's."""

PLACES, TOKENS_PER_S, CALL_TOKENS_PER_S, TOKENS = 8, 300.0, 120.0, 16
# So many clients that the slower half of an uneven deal still keeps a replica's places full.
CLIENTS = 6 * PLACES
RAMP_S = 2.0


@dataclass
class Ours:
    """Ray on this machine, with everything that an application on it needs."""

    args: dict[str, Any]
    proxy: str
    key: str

    @property
    def direct(self) -> str:
        return f"http://127.0.0.1:{self.args['port']}"

    def deploy(self, replicas: int) -> None:
        deploy(self.args, is_waited_for=True, num_replicas=replicas)


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    seconds, turns = (6.0, rounds or 1) if quick else (20.0, rounds or 3)
    settings = {"places": PLACES, "tokens_per_s": TOKENS_PER_S, "clients": CLIENTS, "seconds": seconds, "rounds": turns}
    report = Report("ray_serve", PHYSICS, settings)
    with started() as (ours, plain):
        overhead = [_door(name, url, ours.key, quick) for name, url in _doors(ours, plain)]
        throughput = [_round(ours, seconds) for _ in range(turns)]
    return _tell(report, overhead, throughput, save)


@contextmanager
def started() -> Iterator[tuple[Ours, str]]:
    """One replica on Ray, and a plain server beside it with the same settings."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        _, redis_port = stack.enter_context(servers.valkey(folder))
        key, _ = KeyFile(folder / "keys.json").create("bench")
        shared = {
            "home": str(folder),
            "redis_url": f"redis://127.0.0.1:{redis_port}/0",
            "engine": "scripted",
            "scripted_max_calls": PLACES,
            "scripted_tokens_per_s": CALL_TOKENS_PER_S,
            "scripted_total_tokens_per_s": TOKENS_PER_S,
            "access_log": False,
        }
        named = {f"REFRAIN_{name.upper()}": str(value) for name, value in shared.items() if name != "home"}
        plain = stack.enter_context(servers.refrain(folder, folder, **named))
        plain.wait_ok("/readyz")
        proxy = stack.enter_context(ray_running(folder))
        ours = Ours(shared | {"port": servers.free_port()}, proxy, key)
        ours.deploy(1)
        yield ours, plain.url


def _doors(ours: Ours, plain: str) -> list[tuple[str, str]]:
    return [("uvicorn, no Ray", plain), ("on Ray, own port", ours.direct), ("on Ray, its proxy", ours.proxy)]


def _door(name: str, url: str, key: str, quick: bool) -> dict[str, Any]:
    """Hits by one and by eight connections, the same recording for all doors."""
    body = json.dumps({"messages": [{"role": "user", "content": "a hit"}], "max_tokens": TOKENS, "temperature": 0})
    hit = partial(load.measure, f"{url}/v1/chat/completions", body.encode(), ["chatcmpl"], key=key)
    seconds = 2.0 if quick else 8.0
    hit(1, 0.5)
    one, eight = hit(1, seconds), hit(8, seconds)
    step(f"{name}: p50 {one['p50_ms']:.2f} ms, {eight['requests_per_s']:.0f} hits/s")
    return {
        "door": name,
        "p50_ms": round(one["p50_ms"], 3),
        "p99_ms": round(one["p99_ms"], 3),
        "hits_per_s": round(eight["requests_per_s"]),
    }


def _round(ours: Ours, seconds: float) -> dict[str, float]:
    found = {}
    for replicas in (1, 2):
        ours.deploy(replicas)
        client = Client(ours.direct)
        asyncio.run(client.closed("load", CLIENTS, seconds, partial(call, 8, TOKENS), ours.key))
        wrong = [each for each in client.outcomes if each.status != 200 or not each.is_whole]
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {len(client.outcomes)} calls were not answered whole: {wrong[0]}")
        found[f"replicas_{replicas}"] = round(rate(client.outcomes, RAMP_S, seconds), 1)
        step(f"{replicas} replica(s): {found[f'replicas_{replicas}']:.0f} tokens/s")
    return found | {"ratio": round(found["replicas_2"] / found["replicas_1"], 3)}


def _tell(report: Report, doors: list[dict[str, Any]], rounds: list[dict[str, float]], save: bool) -> dict[str, Any]:
    report.table("one hit, and eight connections of hits", list(doors[0]), [list(each.values()) for each in doors])
    report.table("tokens/s", list(rounds[0]), [list(each.values()) for each in rounds])
    ratio = statistics.median(each["ratio"] for each in rounds)
    report.table("bars", ["", "aim", "", ""], [["2 replicas against 1", ">= 1.9", ratio, verdict(ratio >= 1.9)]])
    return report.finish(save, doors=doors, rounds=rounds, ratio=ratio)
