"""What processes beside the server's own bring: hot hits in all, and hits beside a server that is busy with misses."""

from __future__ import annotations

import json
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks import load, servers
from benchmarks.hits import PATH, QUESTION
from benchmarks.report import Report, medians, ratio, spread, step

PHYSICS = """\
A hot hit is processor time of one process and nothing else, so processes add up until the cores are used; the client
takes its share of them. A miss is the work of the server's own process (here: the scripted engine's events, each
written to its client), and a hit that comes to the same process waits for its turn of the loop. In a worker it waits
for a core at most. A miss pays for workers once: its connection is handed to the server, and its plan is made twice."""

WORKERS = (0, 1, 2)
HIT_CONNECTIONS = 32
# Beside misses: paced, so that hits do not take the cores from them.
PACED_CONNECTIONS, PAUSE_S = 8, 0.02
# The scripted engine at a rate that keeps the server's process busy with these many streams.
MISS_CONNECTIONS, TOKENS, TOKENS_PER_S = 48, 64, 2000
# One at a time, each another prompt, looked up and recorded.
SINGLE_MISSES = 200


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds, seconds = rounds or (2 if quick else 4), 1.0 if quick else 3.0
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "hits": f"{HIT_CONNECTIONS} connections; beside misses {PACED_CONNECTIONS}, {PAUSE_S:g} s after each answer",
        "misses": f"{MISS_CONNECTIONS} streams of {TOKENS} tokens at {TOKENS_PER_S} tokens/s each, never cached",
    }
    report = Report("workers", PHYSICS, settings)
    samples: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        urls = {count: _started(stack, count) for count in WORKERS}
        for number in range(rounds):
            step(f"round {number + 1} of {rounds}")
            turn = number % len(WORKERS)
            for count in (*WORKERS[turn:], *WORKERS[:turn]):
                for name, found in _measured(urls[count], seconds).items():
                    samples[name, count].append(found)
    return _tell(report, samples, save)


def _started(stack: ExitStack, workers: int) -> str:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
    step(f"starting a server with {workers} workers")
    environment = {"REFRAIN_ENGINE": "scripted", "REFRAIN_SCRIPTED_TOKENS_PER_S": str(TOKENS_PER_S)}
    server = stack.enter_context(
        servers.refrain(directory / "home", directory, REFRAIN_HTTP_WORKERS=str(workers), **environment)
    )
    server.wait_ok("/readyz")
    ready = f"refrain_http_workers {float(workers)}"
    server.wait_for(lambda: ready in httpx.get(f"{server.url}/metrics").text, "its workers", 30)
    for _ in range(20):  # each on a connection of its own, so that every process has the answer
        httpx.post(server.url + PATH, json=QUESTION, timeout=30).raise_for_status()
    return server.url


def _measured(url: str, seconds: float) -> dict[str, dict[str, float]]:
    hit, mark = json.dumps(QUESTION).encode(), ["x-cache: hit"]
    miss = json.dumps(QUESTION | {"temperature": 1, "stream": True, "max_tokens": TOKENS}).encode()

    def misses() -> dict[str, float]:
        return load.measure(url + PATH, miss, ["data: [DONE]", "x-cache: bypass"], MISS_CONNECTIONS, seconds)

    def paced() -> dict[str, float]:
        return load.measure(url + PATH, hit, mark, PACED_CONNECTIONS, seconds, pause_s=PAUSE_S)

    found = {
        "hits": load.measure(url + PATH, hit, mark, HIT_CONNECTIONS, seconds),
        "hits, paced": paced(),
        "misses": misses(),
        "one miss at a time": _single_misses(url),
    }
    with ThreadPoolExecutor(2) as pool:
        both = {"misses beside hits": pool.submit(misses), "hits beside misses": pool.submit(paced)}
        return found | {name: each.result() for name, each in both.items()}


def _single_misses(url: str) -> dict[str, float]:
    took = []
    with httpx.Client(base_url=url, timeout=30) as client:
        for _ in range(SINGLE_MISSES):
            body = QUESTION | {"max_tokens": 1, "messages": [{"role": "user", "content": secrets.token_hex(8)}]}
            began = time.perf_counter()
            answer = client.post(PATH, json=body)
            took.append((time.perf_counter() - began) * 1000)
            assert answer.headers["x-cache"] == "miss"
    p99 = sorted(took)[int(len(took) * 0.99)]
    return {"requests_per_s": 1000 / statistics.mean(took), "p50_ms": statistics.median(took), "p99_ms": p99}


def _tell(report: Report, samples: dict[tuple[str, int], list[dict[str, float]]], save: bool) -> dict[str, Any]:
    found = {key: medians(values) for key, values in samples.items()}
    for name in dict.fromkeys(name for name, _ in found):
        rows = []
        for count in WORKERS:
            one, alone = found[name, count], found[name, 0]
            rates = [value["requests_per_s"] for value in samples[name, count]]
            figures = [one["requests_per_s"], ratio(one["requests_per_s"], alone["requests_per_s"])]
            rows.append([count, *figures, one["p50_ms"], one["p99_ms"], f"{spread(rates):.0%}"])
        report.table(name, ["workers", "requests/s", "x none", "p50 ms", "p99 ms", "spread"], rows)
    results = [{"what": name, "workers": count} | one for (name, count), one in found.items()]
    return report.finish(save, results=results)
