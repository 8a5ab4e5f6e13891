"""Bar 1: from the start of the process to the first cached hit, and to readiness, against `vllm serve` as it comes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from app.domain import Weights
from benchmarks import servers
from benchmarks.misses import warm_up
from benchmarks.report import Report, medians, ratio, step, verdict

PHYSICS = """\
A start is imports (vLLM and torch: seconds of one core), a new process for the engine core, reading 0.27 GB of
weights from the page cache, and a first run of the model; `vllm serve` as it comes also compiles, or loads what it
compiled before. A hit needs none of that but Redis with its snapshot and the HTTP port. Both servers have run once
before the first round, so that files and compiler caches are warm for both."""

PATH = "/v1/chat/completions"


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds = rounds or (1 if quick else 3)
    model = servers.weights(step)
    report = Report("start", PHYSICS, {"rounds": rounds, "model": model.short})
    call = {
        "model": model.name,
        "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    ours, theirs = [], []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        home = stack.enter_context(servers.fresh_home())
        step("recording one answer, and a first start of each")
        _record(home, logs, call)
        if not quick:
            _start_vllm(model, logs)
        for number in range(rounds):
            ours.append(_start_refrain(home, logs, call))
            step(f"round {number + 1} of {rounds}, refrain: {_in_words(ours[-1])}")
            theirs.append(_start_vllm(model, logs))
            step(f"round {number + 1} of {rounds}, vllm default: {_in_words(theirs[-1])}")
    return _tell(report, ours, theirs, save)


def _record(home: Path, logs: Path, call: dict[str, Any]) -> None:
    with servers.refrain(home, logs) as server:
        server.wait_ok("/readyz")
        httpx.post(server.url + PATH, json=call, timeout=300).raise_for_status()
        server.wait_for(lambda: _is_hit(server.url, call), "a recorded answer", 600)


def _start_refrain(home: Path, logs: Path, call: dict[str, Any]) -> dict[str, float]:
    with servers.refrain(home, logs) as server:
        return {
            "healthz_s": server.wait_ok("/healthz", every_s=0.01),
            "hit_s": server.wait_for(lambda: _is_hit(server.url, call), "a hit", every_s=0.01),
            "ready_s": server.wait_ok("/readyz", every_s=0.05),
        }


def _start_vllm(model: Weights, logs: Path) -> dict[str, float]:
    with servers.vllm_default(model, logs) as server:
        found = {"ready_s": server.wait_ok("/health", 600, every_s=0.05)}
        warm_up(server.url, model.name)
        return found


def _is_hit(url: str, call: dict[str, Any]) -> bool:
    """`only-if-cached`: an answer from the recording or a refusal, never a wait for the engine."""
    answer = httpx.post(url + PATH, json=call, headers={"cache-control": "only-if-cached"}, timeout=10)
    return answer.status_code == 200 and answer.headers["x-cache"] == "hit"


def _in_words(found: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_s')} {value:.2f} s" for name, value in found.items())


def _tell(report: Report, ours: list[dict[str, float]], theirs: list[dict[str, float]], save: bool) -> dict[str, Any]:
    refrain, vllm = medians(ours), medians(theirs)
    columns = ["server", "/healthz s", "first hit s", "ready s"]
    rows = [
        ["refrain", refrain["healthz_s"], refrain["hit_s"], refrain["ready_s"]],
        ["vllm default", None, None, vllm["ready_s"]],
    ]
    report.table("seconds from the start of the process, medians of the rounds", columns, rows)
    bars = {"hit_s": refrain["hit_s"], "x_ready": ratio(refrain["ready_s"], vllm["ready_s"])}
    met = [
        ["first hit", "<= 3 s", bars["hit_s"], verdict(bars["hit_s"] <= 3)],
        ["ready, x vllm default", "<= 0.8", bars["x_ready"], verdict(bars["x_ready"] <= 0.8)],
    ]
    report.table("bar 1", ["", "aim", "found", ""], met)
    results = [{"server": "refrain"} | refrain, {"server": "vllm default"} | vllm]
    return report.finish(save, results=results, rounds={"refrain": ours, "vllm default": theirs}, bars=bars)
