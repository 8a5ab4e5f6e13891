"""Bar 4: generation through Refrain against `vllm serve` on the same model, with `vllm bench serve` as the client."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx

from app.domain import Weights
from app.engine import cpu
from benchmarks import servers
from benchmarks.report import Report, medians, ratio, spread, step, verdict

PHYSICS = """\
A token of one sequence costs one pass over the weights (SmolLM2-135M in bf16: 0.27 GB), so at concurrency 1 memory and
the hand-overs between threads and processes set the pace, and a batch shares each pass: tokens/s grow with concurrency
until arithmetic is the limit. Everything that is not the engine - HTTP, JSON, the cache's look-up and recording, the
client itself - takes its time from the same cores. Refrain and "vllm same" run the same engine with the same settings,
so what parts them is the road there and back; "vllm default" is `vllm serve MODEL` as it comes. Every prompt is new
and sent at temperature 0, so each call of Refrain's is looked up, missed, generated and recorded."""

REFRAIN, SAME, DEFAULT = "refrain", "vllm same", "vllm default"
CONCURRENCIES = (1, 8, 32)
INPUT_TOKENS, OUTPUT_TOKENS = 64, 64
PROMPTS = {1: 10, 8: 64, 32: 96}
QUICK_PROMPTS = {1: 2, 8: 8, 32: 32}
BENCH_TIMEOUT_S = 600
HITS_ALLOWED = 0.01


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds = rounds or (1 if quick else 3)
    prompts = QUICK_PROMPTS if quick else PROMPTS
    model = servers.weights(step)
    arguments, environment = servers.our_engine(model)
    settings = {
        "rounds": rounds,
        "prompts": {str(key): value for key, value in prompts.items()},
        "tokens_in_out": [INPUT_TOKENS, OUTPUT_TOKENS],
        "temperature": 0,
        "model": model.short,
        "same": {
            "environment": environment,
            "arguments": [argument.replace(f"{servers.ROOT}/", "") for argument in arguments[1:]],
        },
    }
    report = Report("misses", PHYSICS, settings)
    samples: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    # A shared machine's speed moves from minute to minute, so what is compared is measured next to each other: all
    # servers are up, and those that are not asked are stopped. A GPU has room for one of them.
    groups = [[REFRAIN, SAME, DEFAULT]] if cpu.is_cpu() else [[REFRAIN], [SAME], [DEFAULT]]
    seeds = [secrets.randbelow(2**30) for _ in range(rounds)]
    for names in groups:
        _one_group(names, model, prompts, seeds, samples)
    return _tell(report, samples, save)


def _one_group(
    names: list[str],
    model: Weights,
    prompts: dict[int, int],
    seeds: list[int],
    samples: dict[tuple[str, int], list[dict[str, float]]],
) -> None:
    """A round for each seed; in it each concurrency in another order of the servers, with the same prompts for all."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        up: dict[str, servers.Server] = {}
        ready_s: dict[str, float] = {}
        for name in names:
            step(f"starting {name}")
            up[name] = start(name, model, logs, stack)
            ready_s[name] = time.monotonic() - up[name].began
            warm_up(up[name].url, model.name)
            up[name].pause()
        for number, seed in enumerate(seeds):
            for at, concurrency in enumerate(CONCURRENCIES):
                first = (number + at) % len(names)
                for name in names[first:] + names[:first]:
                    with up[name].going_on():
                        found = bench(up[name], model, concurrency, prompts[concurrency], seed + concurrency, logs)
                    samples[name, concurrency].append(found | {"ready_s": ready_s[name]})
                    told = f"{found['tokens_per_s']:.0f} tokens/s, first token {found['ttft_p50_ms']:.0f} ms"
                    step(f"round {number + 1} of {len(seeds)}: concurrency {concurrency}: {name}: {told}")
        if REFRAIN in up:
            up[REFRAIN].go_on()
            asked = len(seeds) * sum(prompts.values())
            # vLLM's client draws prompts at random, and now and then one twice.
            assert hits(up[REFRAIN].url) <= HITS_ALLOWED * asked, "too many calls were answered from the cache"


def start(name: str, model: Weights, logs: Path, stack: ExitStack) -> servers.Server:
    """The server called `name`, ready; it is stopped with the stack."""
    server = stack.enter_context(_server(name, model, logs, stack))
    server.wait_ok("/readyz" if name == REFRAIN else "/health", 600, 0.1)
    return server


def _server(name: str, model: Weights, logs: Path, stack: ExitStack) -> AbstractContextManager[servers.Server]:
    if name == REFRAIN:
        return servers.refrain(stack.enter_context(servers.fresh_home()), logs)
    if name == SAME:
        arguments, environment = servers.our_engine(model)
        return servers.vllm_serve(name, arguments, logs, **environment)
    return servers.vllm_default(model, logs)


def warm_up(url: str, model: str) -> None:
    """First calls pay for what is made on first use; these are ours, so that no measured prompt is recorded before."""

    def ask(number: int) -> None:
        question = f"{time.time_ns()} {number}: count from one to twenty, and then back again, in words."
        call = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
        httpx.post(f"{url}/v1/chat/completions", json=call, timeout=300).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(16)))


def bench(
    server: servers.Server, model: Weights, concurrency: int, prompts: int, seed: int, logs: Path
) -> dict[str, float]:
    """vLLM's own client, on chat completions; every prompt must have been answered in full."""
    options = {
        "backend": "openai-chat",
        "base-url": server.url,
        "endpoint": "/v1/chat/completions",
        "model": model.name,
        "tokenizer": model.path,
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "num-prompts": prompts,
        "max-concurrency": concurrency,
        "seed": seed,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot",
        "result-dir": logs,
        "result-filename": "bench.json",
    }
    command = [
        *servers.vllm_command("bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm"),
        *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
    ]
    done = subprocess.run(
        command,
        cwd=servers.ROOT,
        env=servers.clean_environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=BENCH_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"vllm bench serve on {server.name}: {done.stderr[-2000:]}\n{server.tail()}")
    told = json.loads((logs / "bench.json").read_text())
    assert told["completed"] == prompts, f"{server.name}: {told['completed']} of {prompts} prompts: {server.tail()}"
    assert told["total_output_tokens"] == prompts * OUTPUT_TOKENS, f"{server.name}: answers of the wrong length"
    return {
        "tokens_per_s": told["output_throughput"],
        "ttft_p50_ms": told["median_ttft_ms"],
        "ttft_p99_ms": told["p99_ttft_ms"],
        "tpot_p50_ms": told["median_tpot_ms"],
    }


def hits(url: str) -> float:
    counted = re.compile(r'^refrain_calls_total\{[^}]*cache="hit"[^}]*\} (\S+)', re.MULTILINE)
    return sum(float(count) for count in counted.findall(httpx.get(f"{url}/metrics").text))


def _tell(report: Report, samples: dict[tuple[str, int], list[dict[str, float]]], save: bool) -> dict[str, Any]:
    found = {key: medians(values) for key, values in samples.items()}
    columns = ["server", "tokens/s", "x refrain's", "first token p50 ms", "p99 ms", "per token ms", "spread"]
    bars, met = [], []
    for concurrency in CONCURRENCIES:
        ours, rows = found[REFRAIN, concurrency], []
        for name in (REFRAIN, SAME, DEFAULT):
            one = found[name, concurrency]
            wide = spread([sample["tokens_per_s"] for sample in samples[name, concurrency]])
            relative = ratio(one["tokens_per_s"], ours["tokens_per_s"])
            rows.append(
                [
                    name,
                    one["tokens_per_s"],
                    relative,
                    one["ttft_p50_ms"],
                    one["ttft_p99_ms"],
                    one["tpot_p50_ms"],
                    f"{wide:.0%}",
                ]
            )
        report.table(f"concurrency {concurrency}, medians of the rounds", columns, rows)
        for peer in (SAME, DEFAULT):
            theirs = found[peer, concurrency]
            speed = ratio(ours["tokens_per_s"], theirs["tokens_per_s"])
            first = ratio(ours["ttft_p50_ms"], theirs["ttft_p50_ms"])
            if peer == SAME:
                aims = ">= 0.97, <= 1.05 + 2 ms"
                is_met = speed >= 0.97 and ours["ttft_p50_ms"] <= 1.05 * theirs["ttft_p50_ms"] + 2
            else:
                aims = ">= 1.1, <= 1/1.1"
                is_met = speed >= 1.1 and 1 / first >= 1.1
            bars.append({"peer": peer, "concurrency": concurrency, "x_tokens_per_s": speed, "x_ttft": first})
            met.append([f"x {peer}, concurrency {concurrency}", aims, speed, first, verdict(is_met)])
    report.table("bar 4: refrain's figure / the peer's", ["", "aim", "tokens/s", "first token", ""], met)
    results = [{"server": name, "concurrency": concurrency} | one for (name, concurrency), one in found.items()]
    return report.finish(save, results=results, bars=bars)
