"""Which engine environment is fastest for the whole server, quiet and beside one busy process.

`python -m benchmarks.engine_settings [--quick] [--rounds N] [--only WORDS ...] [--save]`. A trial of candidates, whose
outcome is in LOG.md and in app/engine/cpu.py: variables that an operator sets win over those set there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from app.domain import Weights
from benchmarks import generate, servers
from benchmarks.misses import hits, warm_up
from benchmarks.report import Report, medians, ratio, spread, step

PHYSICS = """\
OpenMP's threads meet at a barrier after every operator, thousands of times per token's pass. Who waits by spinning
is there at once and takes a core from everybody else; who waits by sleeping gives the core away and pays a wake-up. On
few cores the HTTP process, Redis and the client are that everybody, and beside a busy process a spinning thread can
wait a whole time slice for one that was put aside. So the bare engine's best is not the server's best. Each candidate
is only an environment for `refrain serve`; "busy" is the same with one Python loop that never rests."""

CONCURRENCIES = (1, 8, 32)
TOKENS = 48
PROMPTS = {1: 4, 8: 16, 32: 64}
QUICK_PROMPTS = {1: 2, 8: 8, 32: 32}


def candidates() -> dict[str, dict[str, str]]:
    """Name to environment. All but the first name their OpenMP and so do not follow our defaults."""
    cores = str(len(os.sched_getaffinity(0)))
    gnu = {"OMP_NUM_THREADS": cores, "LD_PRELOAD": ""}
    found: dict[str, dict[str, str]] = {
        "refrain's own": {},
        "1 thread": gnu | {"OMP_NUM_THREADS": "1"},
        "all threads": gnu,
    }
    for count in (100, 1000, 10_000, 100_000):
        found[f"all, spin {count}"] = gnu | {"GOMP_SPINCOUNT": str(count)}
    found["all, passive"] = gnu | {"OMP_WAIT_POLICY": "PASSIVE"}
    if (library := Path(sys.prefix) / "lib" / "libiomp5.so").is_file():
        for time_ms in (0, 1, 200):
            found[f"all, Intel, block {time_ms}"] = gnu | {"LD_PRELOAD": str(library), "KMP_BLOCKTIME": str(time_ms)}
    found["vllm's executor"] = {
        "LD_PRELOAD": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "REFRAIN_ENGINE_ARGS": json.dumps({"distributed_executor_backend": "mp"}),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_settings", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts")
    parser.add_argument("--rounds", type=int, default=1, help="how often each candidate has its turn")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="candidates whose name holds one of these")
    parser.add_argument("--save", action="store_true", help="append the JSON to benchmarks/results")
    given = parser.parse_args()
    servers.prepare_process()
    chosen = {
        name: environment
        for name, environment in candidates().items()
        if not given.only or any(words in name for words in given.only)
    }
    print(json.dumps(run(chosen, quick=given.quick, rounds=given.rounds, save=given.save)))


def run(chosen: dict[str, dict[str, str]], *, quick: bool, rounds: int, save: bool) -> dict[str, Any]:
    prompts = QUICK_PROMPTS if quick else PROMPTS
    model = servers.weights(step)
    settings = {"rounds": rounds, "prompts": prompts, "tokens": TOKENS, "candidates": chosen}
    report = Report("engine_settings", PHYSICS, settings)
    samples: dict[tuple[str, int, bool], list[dict[str, float]]] = defaultdict(list)
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name, environment in chosen.items():
            step(f"round {number + 1} of {rounds}: {name}")
            try:
                _try(name, environment, model, prompts, samples)
            except RuntimeError as error:  # one candidate that does not start must not cost the others' figures
                failed[name] = str(error)[-1500:]
                step(f"{name} failed: {failed[name]}")
    return _tell(report, [name for name in chosen if name not in failed], samples, failed, save)


def _try(
    name: str,
    environment: dict[str, str],
    model: Weights,
    prompts: dict[int, int],
    samples: dict[tuple[str, int, bool], list[dict[str, float]]],
) -> None:
    with ExitStack() as stack:
        home = stack.enter_context(servers.fresh_home())
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        server = stack.enter_context(servers.refrain(home, logs, **environment))
        server.wait_ok("/readyz")
        warm_up(server.url, model.name)
        for is_busy in (False, True):
            with _busy_process(is_busy):
                for concurrency in CONCURRENCIES:
                    found = generate.measure(
                        server.url, model.name, concurrency=concurrency, prompts=prompts[concurrency], tokens=TOKENS
                    )
                    samples[name, concurrency, is_busy].append(found)
        assert hits(server.url) == 0, "some calls were answered from the cache"


@contextmanager
def _busy_process(is_wanted: bool) -> Iterator[None]:
    if not is_wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def _tell(
    report: Report,
    names: list[str],
    samples: dict[tuple[str, int, bool], list[dict[str, float]]],
    failed: dict[str, str],
    save: bool,
) -> dict[str, Any]:
    found = {key: medians(values) for key, values in samples.items() if key[0] in names}
    for figure, title in (("tokens_per_s", "output tokens/s"), ("ttft_p50_ms", "first token, p50 ms")):
        columns = ["environment"]
        columns += [f"{'busy' if is_busy else 'quiet'} {c}" for is_busy in (False, True) for c in CONCURRENCIES]
        rows = [
            [name, *(found[name, c, is_busy][figure] for is_busy in (False, True) for c in CONCURRENCIES)]
            for name in names
        ]
        report.table(f"{title}, by concurrency", columns, rows)
    results = [
        {
            "environment": name,
            "concurrency": concurrency,
            "is_busy": is_busy,
            "x_first": ratio(one["tokens_per_s"], found[names[0], concurrency, is_busy]["tokens_per_s"]),
            "spread": round(spread([sample["tokens_per_s"] for sample in samples[name, concurrency, is_busy]]), 3),
        }
        | one
        for (name, concurrency, is_busy), one in found.items()
    ]
    return report.finish(save, results=results, failed=failed)


if __name__ == "__main__":
    main()
