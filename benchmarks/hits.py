"""A cached hit against a bare Starlette echo and against LiteLLM's proxy with Redis. Same request, same run."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import load, servers
from benchmarks.report import Report, medians, ratio, spread, step, verdict

PHYSICS = """\
A hit is one HTTP exchange: read and parse a request, hash it, one Redis GET over a local socket, write the answer. No
token is computed. All servers here are one Python process, the client shares their cores, and both sides of a
connection take turns: at 1 connection the limit is the sum of both sides' work and the wake-ups between them, at 32 it
is the server's processor time per request. The bare echo (Starlette under uvicorn, no cache, no log, the same bytes
out) is the ceiling. "cpu us" is processor time per request of the server with its Redis: it moves least with noise."""

PATH = "/v1/chat/completions"
CONNECTIONS = (1, 32)
ECHO, LITELLM, REFRAIN, STREAM = "echo", "litellm", "refrain", "refrain stream"
QUESTION = {
    "model": "scripted",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Say what a cache is for, in a few sentences."},
    ],
    "temperature": 0,
    "max_tokens": 80,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server, what it is asked, and what each of its answers must hold."""

    url: str
    body: bytes
    marks: list[str]
    cpu_s: Callable[[], float]


def run(*, quick: bool, rounds: int | None, save: bool) -> dict[str, Any]:
    rounds, seconds = rounds or (2 if quick else 5), 1.0 if quick else 4.0
    servers.install_litellm(step)
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "litellm": servers.LITELLM_VERSION,
        "workers": 1,
        "question": QUESTION,
    }
    report = Report("hits", PHYSICS, settings)
    samples: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        targets, answer, upstream_calls = _start(stack)
        calls_before = upstream_calls()
        for number in range(rounds):
            step(f"round {number + 1} of {rounds}")
            for connections in CONNECTIONS:
                for name, target in _turned(list(targets.items()), number):
                    samples[name, connections].append(_sample(target, connections, seconds))
        assert upstream_calls() == calls_before, "litellm asked its upstream: not all of its answers were hits"
    return _tell(report, samples, len(answer), save)


def _turned(items: list[Any], by: int) -> Iterator[Any]:
    """Each round begins with another server, so that drift meets all alike."""
    by %= len(items)
    yield from items[by:]
    yield from items[:by]


def _sample(target: Target, connections: int, seconds: float) -> dict[str, float]:
    before = target.cpu_s()
    found = load.measure(target.url, target.body, target.marks, connections, seconds)
    used = target.cpu_s() - before
    # The warm-up is in `used` too; it ran at the same pace.
    served = found["requests_per_s"] * (seconds + load.WARM_UP_S)
    return found | {"cpu_us": used / served * 1e6}


def _start(stack: ExitStack) -> tuple[dict[str, Target], bytes, Callable[[], int]]:
    """All servers at once, each primed: idle ones cost next to nothing, and rounds can alternate."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
    step("starting refrain, echo, valkey and litellm")
    refrain = stack.enter_context(servers.refrain(directory / "home", directory, REFRAIN_ENGINE="scripted"))
    refrain.wait_ok("/readyz")
    whole, streamed = _body(), _body(stream=True)
    content = _primed(refrain.url, whole)
    text = json.loads(content)["choices"][0]["message"]["content"]
    # The echo, and LiteLLM's upstream, give the very bytes that Refrain gives.
    (directory / "answer.json").write_bytes(content)
    echo = stack.enter_context(servers.echo("echo", directory / "answer.json", directory))
    upstream = stack.enter_context(servers.echo("upstream", directory / "answer.json", directory))
    redis, redis_port = stack.enter_context(servers.valkey(directory))
    echo.wait_ok("/calls")
    upstream.wait_ok("/calls")
    litellm = stack.enter_context(servers.litellm(upstream, redis_port, directory))
    litellm.wait_ok("/health/liveliness")
    _check_litellm(litellm.url, upstream.url, whole, text)
    assert _streamed_text(refrain.url, streamed) == text, "the replayed stream is not the recorded answer"
    end = json.dumps(text)[-30:-1]
    targets = {
        ECHO: Target(echo.url + PATH, whole, [end], echo.cpu_s),
        LITELLM: Target(litellm.url + PATH, whole, [end], lambda: litellm.cpu_s() + redis.cpu_s()),
        REFRAIN: Target(refrain.url + PATH, whole, [end, "x-cache: hit"], refrain.cpu_s),
        STREAM: Target(refrain.url + PATH, streamed, ["data: [DONE]", "x-cache: hit"], refrain.cpu_s),
    }
    return targets, content, lambda: _calls(upstream.url)


def _body(**fields: Any) -> bytes:
    return json.dumps(QUESTION | fields).encode()


def _primed(url: str, body: bytes) -> bytes:
    """Ask until the answer is a hit; its bytes."""
    for _ in range(50):
        answer = httpx.post(url + PATH, content=body, headers={"content-type": "application/json"}, timeout=30)
        answer.raise_for_status()
        if answer.headers["x-cache"] == "hit":
            return answer.content
    raise RuntimeError("refrain did not record its answer")


def _check_litellm(url: str, upstream: str, body: bytes, text: str) -> None:
    """Ask until its upstream is no longer called: from then on each answer is a hit."""
    calls = -1
    for _ in range(20):
        answer = httpx.post(url + PATH, content=body, headers={"authorization": "Bearer none"}, timeout=30)
        answer.raise_for_status()
        assert answer.json()["choices"][0]["message"]["content"] == text
        before, calls = calls, _calls(upstream)
        if calls == before:
            return
    raise RuntimeError("litellm does not answer from its cache")


def _calls(url: str) -> int:
    return int(httpx.get(f"{url}/calls").text)


def _streamed_text(url: str, body: bytes) -> str:
    answer = httpx.post(url + PATH, content=body, headers={"content-type": "application/json"}, timeout=30)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def _tell(
    report: Report, samples: dict[tuple[str, int], list[dict[str, float]]], answer_bytes: int, save: bool
) -> dict[str, Any]:
    found = {key: medians(values) for key, values in samples.items()}
    rates = {key: [value["requests_per_s"] for value in values] for key, values in samples.items()}

    def of(name: str, connections: int, peer: str) -> float:
        return ratio(found[name, connections]["requests_per_s"], found[peer, connections]["requests_per_s"])

    for connections in CONNECTIONS:
        columns = ["server", "requests/s", "p50 ms", "p99 ms", "cpu us", "x echo", "x litellm", "client core", "spread"]
        rows = []
        for name in (ECHO, LITELLM, REFRAIN, STREAM):
            one = found[name, connections]
            figures = [one["requests_per_s"], one["p50_ms"], one["p99_ms"], one["cpu_us"]]
            against = [of(name, connections, ECHO), of(name, connections, LITELLM)]
            share = [f"{one['client_core_share']:.0%}", f"{spread(rates[name, connections]):.0%}"]
            rows.append([name, *figures, *against, *share])
        report.table(f"{answer_bytes}-byte answer, {connections} connection(s), medians of the rounds", columns, rows)
    bars = {
        "x_echo": {str(connections): of(REFRAIN, connections, ECHO) for connections in CONNECTIONS},
        "x_litellm": {str(connections): of(REFRAIN, connections, LITELLM) for connections in CONNECTIONS},
        "p50_ms_at_1": found[REFRAIN, 1]["p50_ms"],
    }
    met = [
        [f"x {peer}, {connections} connection(s)", f">= {aim}", value, verdict(value >= aim)]
        for peer, aim in ((ECHO, 0.8), (LITELLM, 30))
        for connections, value in bars[f"x_{peer}"].items()
    ]
    met.append(["p50 ms, 1 connection", "< 1.5", bars["p50_ms_at_1"], verdict(bars["p50_ms_at_1"] < 1.5)])
    report.table("aims", ["refrain", "aim", "found", ""], met)
    results = [{"server": name, "connections": connections} | one for (name, connections), one in found.items()]
    return report.finish(save, answer_bytes=answer_bytes, results=results, bars=bars)
