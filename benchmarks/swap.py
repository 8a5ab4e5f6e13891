"""Weights swapped under load: does a call fail, does a text belong to other weights than it says?"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.weights import Manifest, Registry, run_trial
from benchmarks import servers
from benchmarks.report import Report, step, verdict

PHYSICS = """\
A second engine loads beside the first: a fork of a warm process, then reading weights and building the model, with the
cores shared between that and the streams that run. The switch itself is one assignment. So streams slow down while an
engine loads and nothing stops; the longest silence on any stream, first events included, is what a user would feel.
Greedy float32 text does not depend on the batch, so each answer can be held against what the weights said alone."""

NAME = "swapped"
PATH = "/v1/chat/completions"
CLIENTS = 8
MAX_TOKENS = 24
PROMPTS = [
    f"Tell me one thing about {topic}."
    for topic in ("the moon", "bread", "Paris", "trains", "winter", "cats", "music", "the sea", "paper", "gold")
]


@dataclass
class Seen:
    """What the clients saw."""

    answers: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    healthz_s: list[float] = field(default_factory=list)


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds = rounds or (1 if quick else 5)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        registry = Registry(logs / "home" / "weights")
        first, second = _two(registry)
        said = {manifest.digest: _said(registry, manifest) for manifest in (first, second)}
        differing = [prompt for prompt in PROMPTS if said[first.digest][prompt] != said[second.digest][prompt]]
        report = Report(
            "swap",
            PHYSICS,
            {"clients": CLIENTS, "swaps": 2 * rounds, "prompts": len(differing), "max_tokens": MAX_TOKENS},
        )
        environment = {"REFRAIN_MODEL": NAME, "REFRAIN_DTYPE": "float32", "REFRAIN_WATCH_S": "0.2"}
        registry.point(NAME, first.digest)
        with servers.refrain(logs / "home", logs, **environment) as server:
            server.wait_ok("/readyz")
            seen, swaps_s = asyncio.run(_under_load(server.url, registry, [first, second], said, differing, rounds))
            recorded = _recorded(server.url, registry, [first, second], said, differing)
            way = "beside" if 'way="beside"' in httpx.get(f"{server.url}/metrics").text else "pause"
    return _tell(report, seen, swaps_s, recorded, way, save)


def _two(registry: Registry) -> tuple[Manifest, Manifest]:
    """The default model, and the same with other numbers in its last layers: as large, and of another opinion."""
    import torch
    from safetensors.torch import load_file, save_file

    published = []
    for noise in (0.0, 0.05):
        with registry.stage(NAME) as staged:
            shutil.copytree(servers.weights(step).path, staged, dirs_exist_ok=True)
            (staged / "manifest.json").unlink()
            if noise:
                generator = torch.Generator().manual_seed(7)
                tensors = load_file(staged / "model.safetensors")
                for name, tensor in tensors.items():
                    if "mlp" in name:
                        random = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                        tensors[name] = (tensor.float() + noise * tensor.float().std() * random).to(tensor.dtype)
                save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
            published.append(registry.publish(staged, NAME, {"kind": "benchmark"}))
    return published[0], published[1]


def _said(registry: Registry, manifest: Manifest) -> dict[str, str]:
    """What these weights answer alone, in a process of their own; kept, since the same weights say the same."""
    kept = servers.CACHE / "bench-swap" / f"{manifest.digest}.json"
    if not kept.exists():
        step(f"asking {manifest.short} alone")
        kept.parent.mkdir(parents=True, exist_ok=True)
        questions = [{"messages": _messages(prompt), "max_tokens": MAX_TOKENS} for prompt in PROMPTS]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as asked:
            json.dump(questions, asked)
            asked.flush()
            os.environ["REFRAIN_DTYPE"] = "float32"
            found = run_trial(registry.path(NAME, manifest.digest), ask=Path(asked.name))
            del os.environ["REFRAIN_DTYPE"]
        texts = [answer["text"] for answer in found["answers"]]
        kept.write_text(json.dumps(dict(zip(PROMPTS, texts, strict=True))))
    return dict(json.loads(kept.read_text()))


async def _under_load(
    url: str,
    registry: Registry,
    both: list[Manifest],
    said: dict[str, dict[str, str]],
    prompts: list[str],
    rounds: int,
) -> tuple[Seen, list[float]]:
    seen, over = Seen(), asyncio.Event()
    by_mark = {f"{NAME}@{digest[:12]}": texts for digest, texts in said.items()}
    swaps_s = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        clients = [
            asyncio.create_task(_client(http, number, prompts, by_mark, seen, over)) for number in range(CLIENTS)
        ]
        clients.append(asyncio.create_task(_watch_health(http, seen, over)))
        await asyncio.sleep(3)
        for number in range(2 * rounds):
            wanted = both[1 - number % 2]
            began = time.monotonic()
            registry.point(NAME, wanted.digest, "benchmark")
            while (await http.get("/v1/models")).json()["data"][0]["weights"] != wanted.digest:
                if time.monotonic() - began > 240:
                    raise RuntimeError(f"no swap to {wanted.short} within 240 s: {(await http.get('/readyz')).text}")
                await asyncio.sleep(0.1)
            swaps_s.append(time.monotonic() - began)
            step(f"swap {number + 1} of {2 * rounds}: {swaps_s[-1]:.1f} s; {sum(seen.answers.values())} answers so far")
            await asyncio.sleep(3)
        over.set()
        await asyncio.gather(*clients)
    return seen, swaps_s


async def _client(
    http: httpx.AsyncClient,
    number: int,
    prompts: list[str],
    said: dict[str, dict[str, str]],
    seen: Seen,
    over: asyncio.Event,
) -> None:
    """Ask, read to the end, compare; without a pause until told to stop."""
    turn = number
    while not over.is_set():
        prompt = prompts[turn % len(prompts)]
        turn += 1
        try:
            weights, mark, text, gaps = await _stream(http, prompt)
        except (httpx.HTTPError, RuntimeError) as error:
            seen.failed.append(f"{type(error).__name__}: {error}")
            continue
        seen.answers[weights] = seen.answers.get(weights, 0) + 1
        seen.gaps_s += gaps
        if said[weights][prompt] != text or mark != f"rf_{weights.rpartition('@')[2]}":
            seen.contradictions.append(f"{weights}, {mark}: {prompt!r} gave {text!r}, not {said[weights][prompt]!r}")


async def _watch_health(http: httpx.AsyncClient, seen: Seen, over: asyncio.Event) -> None:
    """How long the server's own loop stands still: this route waits for nothing else."""
    while not over.is_set():
        began = time.monotonic()
        (await http.get("/healthz")).raise_for_status()
        seen.healthz_s.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


async def _stream(http: httpx.AsyncClient, prompt: str) -> tuple[str, str, str, list[float]]:
    body = {"model": NAME, "messages": _messages(prompt), "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
    text, marks, gaps, last, is_whole = "", set(), [], time.monotonic(), False
    async with http.stream("POST", PATH, json=body, headers={"cache-control": "no-cache"}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            now = time.monotonic()
            gaps.append(now - last)
            last = now
            if line == "data: [DONE]":
                is_whole = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            marks.add(chunk["system_fingerprint"])
            text += chunk["choices"][0]["delta"].get("content") or ""
    if not is_whole:
        raise RuntimeError("the stream ended without [DONE]")
    return response.headers["x-weights"], "+".join(sorted(marks)), text, gaps


def _recorded(
    url: str, registry: Registry, both: list[Manifest], said: dict[str, dict[str, str]], prompts: list[str]
) -> dict[str, int]:
    """What the cache holds for each of the two, asked with `only-if-cached`, each while it is current."""
    found = {"right": 0, "wrong": 0}
    for manifest in both:
        registry.point(NAME, manifest.digest, "benchmark")
        deadline = time.monotonic() + 240
        while httpx.get(f"{url}/v1/models").json()["data"][0]["weights"] != manifest.digest:
            if time.monotonic() > deadline:
                raise RuntimeError("no swap within 240 s")
            time.sleep(0.2)
        for prompt in prompts:
            body = {"model": NAME, "messages": _messages(prompt), "temperature": 0, "max_tokens": MAX_TOKENS}
            answer = httpx.post(url + PATH, json=body, headers={"cache-control": "only-if-cached"}, timeout=60)
            if answer.status_code == 200:
                text = answer.json()["choices"][0]["message"]["content"]
                found["right" if text == said[manifest.digest][prompt] else "wrong"] += 1
    return found


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _tell(
    report: Report, seen: Seen, swaps_s: list[float], recorded: dict[str, int], way: str, save: bool
) -> dict[str, Any]:
    gaps = sorted(seen.gaps_s)
    figures: dict[str, Any] = {
        "way": way,
        "answers": sum(seen.answers.values()),
        "by_weights": seen.answers,
        "failed": len(seen.failed),
        "contradictions": len(seen.contradictions),
        "recorded_right": recorded["right"],
        "recorded_wrong": recorded["wrong"],
        "longest_stall_s": round(gaps[-1], 3),
        "gap_p99_s": round(gaps[int(len(gaps) * 0.99)], 3),
        "gap_median_s": round(statistics.median(gaps), 3),
        "healthz_longest_s": round(max(seen.healthz_s), 3),
        "swap_s": [round(seconds, 2) for seconds in swaps_s],
    }
    report.table("swaps under load", ["", "figure"], [[name, str(value)] for name, value in figures.items()])
    for line in [*seen.failed[:5], *seen.contradictions[:5]]:
        step(line)
    is_met = not (seen.failed or seen.contradictions or recorded["wrong"]) and len(seen.answers) == 2
    step(f"0 failed, 0 contradictions: {verdict(is_met)}")
    return report.finish(save, **figures, is_met=is_met)
