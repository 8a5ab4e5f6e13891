"""What remembering and sharing are worth: the same questions, some asked far more often than others, with and without.

Prompt number k of 5,000 is asked with a probability that falls as 1/k^1.1 (Zipf), as questions to a help desk do. Both
servers get the very same sequence from the same number of clients, each of which asks again when it is answered.
"""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from app.domain import Weights
from benchmarks import servers
from benchmarks.misses import DEFAULT, REFRAIN, SAME, start, warm_up
from benchmarks.report import Report, medians, ratio, spread, step, verdict

PHYSICS = """\
`vllm serve` computes every answer: its requests/s are the engine's tokens/s over the tokens of an answer. Refrain
computes each distinct answer once, so what it can win is the number of requests per distinct prompt, which grows with
the length of the run; calls that ask for what is just being computed share it. The engine and its settings are the
same in "refrain" and "vllm same"."""

PROMPTS, EXPONENT, MAX_TOKENS, CLIENTS = 5000, 1.1, 16, 16
REQUESTS, QUICK_REQUESTS = 2000, 300
TIMEOUT_S = 600


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds, requests = rounds or 1, QUICK_REQUESTS if quick else REQUESTS
    model = servers.weights(step)
    settings = {
        "rounds": rounds,
        "requests": requests,
        "prompts": PROMPTS,
        "exponent": EXPONENT,
        "max_tokens": MAX_TOKENS,
        "clients": CLIENTS,
        "model": model.short,
    }
    report = Report("zipf", PHYSICS, settings)
    names = [REFRAIN, SAME] if quick else [REFRAIN, SAME, DEFAULT]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        asked = sequence(requests, seed=number)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(_one_server(name, model, asked, f"round {number + 1} of {rounds}, {name}"))
    return _tell(report, samples, save)


def sequence(requests: int, *, seed: int) -> list[int]:
    """The numbers of the prompts, in the order in which they are asked."""
    weights = [1 / rank**EXPONENT for rank in range(1, PROMPTS + 1)]
    return random.Random(seed).choices(range(PROMPTS), weights, k=requests)


def _one_server(name: str, model: Weights, asked: list[int], title: str) -> dict[str, float]:
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        step(f"{title}: starting")
        server = start(name, model, logs, stack)
        warm_up(server.url, model.name)
        before = saved(server.url) if name == REFRAIN else {}
        found = asyncio.run(_ask_all(server.url, model.name, asked))
        if name == REFRAIN:
            found |= {key: value - before[key] for key, value in saved(server.url).items()}
        step(f"{title}: {found['requests_per_s']:.1f} requests/s")
        return found


async def _ask_all(url: str, model: str, asked: list[int]) -> dict[str, float]:
    waiting, took = iter(asked), []
    texts: dict[int, set[str]] = {}

    async def client(http: httpx.AsyncClient) -> None:
        for number in waiting:
            began = time.perf_counter()
            answer = await http.post(f"{url}/v1/chat/completions", json=_call(model, number))
            answer.raise_for_status()
            texts.setdefault(number, set()).add(answer.json()["choices"][0]["message"]["content"])
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
    seconds = time.perf_counter() - began
    took.sort()
    return {
        "requests_per_s": len(asked) / seconds,
        "seconds": seconds,
        "p50_ms": took[len(took) // 2] * 1000,
        "p99_ms": took[int(len(took) * 0.99)] * 1000,
        "distinct": len(texts),
        # bf16 arithmetic depends on the batch, so an engine may answer one prompt in several ways.
        "prompts_with_several_answers": sum(len(each) > 1 for each in texts.values()),
    }


def _call(model: str, number: int) -> dict[str, Any]:
    question = f"Ticket {number}: my order number {number * 7919 % 100_000} has not arrived. What can I do?"
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}


def saved(url: str) -> dict[str, float]:
    """What Refrain says that it spared: tokens, and calls that were hits or shared a generation."""
    text = httpx.get(f"{url}/metrics").text

    def total(pattern: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))

    return {
        "prompt_tokens_saved": total(r'refrain_tokens_saved_total\{kind="prompt"[^}]*\}'),
        "completion_tokens_saved": total(r'refrain_tokens_saved_total\{kind="completion"[^}]*\}'),
        "hits": total(r'refrain_calls_total\{cache="hit"[^}]*\}'),
        "shared": total(r'refrain_calls_total\{cache="shared"[^}]*\}'),
    }


def _tell(report: Report, samples: dict[str, list[dict[str, float]]], save: bool) -> dict[str, Any]:
    found = {name: medians(each) for name, each in samples.items()}
    ours = found[REFRAIN]
    columns = ["server", "requests/s", "refrain is x", "p50 ms", "p99 ms", "distinct", "several answers", "spread"]
    rows = []
    for name, one in found.items():
        wide = spread([sample["requests_per_s"] for sample in samples[name]])
        figures = [one["requests_per_s"], ratio(ours["requests_per_s"], one["requests_per_s"]), one["p50_ms"]]
        figures += [one["p99_ms"], one["distinct"], one["prompts_with_several_answers"]]
        rows.append([name, *figures, f"{wide:.0%}"])
    report.table("the same sequence of questions to each", columns, rows)
    spared = [[key, ours[key]] for key in ("hits", "shared", "prompt_tokens_saved", "completion_tokens_saved")]
    report.table("what refrain spared", ["", "count"], spared)
    bars = {name: ratio(ours["requests_per_s"], found[name]["requests_per_s"]) for name in found if name != REFRAIN}
    report.table(
        "requests/s, refrain's / the peer's", ["", "found", ""], [[k, v, verdict(v > 1)] for k, v in bars.items()]
    )
    return report.finish(save, results=[{"server": name} | one for name, one in found.items()], bars=bars)
