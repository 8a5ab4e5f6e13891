"""The core dies, or stands still; whoever it worked for gets the whole answer, and who killed it is kept out.

In float32, where an answer that is gone on with is the same, token by token, as one that was never broken off.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import REPOSITORY, TEST_HOME, Process, start_process, until
from tests.engine.conftest import CHAT, MODEL, PATIENCE_S, RUNNING, metric, payloads, wait_idle
from tests.engine.test_swap import cores

pytestmark = pytest.mark.engine

UNSAVED = {"cache-control": "no-cache, no-store"}
KING = [{"role": "user", "content": "Tell me a long story about a 😀 king and his house, with names."}]
BASE = {"model": MODEL, "temperature": 0, "ignore_eos": True}
STREAM = {"stream": True}
USAGE = STREAM | {"stream_options": {"include_usage": True}}
# Every way to be answered, and every state that a core may have of a call besides its tokens.
CALLS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, BASE | USAGE | {"messages": KING, "max_tokens": 60}),
    (CHAT, BASE | {"messages": KING, "max_tokens": 50}),
    ("/v1/completions", BASE | USAGE | {"prompt": "Once upon a time", "max_tokens": 60, "min_tokens": 50}),
    ("/v1/completions", BASE | {"prompt": "Once upon a time there", "max_tokens": 40}),
    ("/v1/responses", BASE | STREAM | {"input": "Tell me about rivers.", "max_output_tokens": 60}),
    ("/v1/messages", BASE | STREAM | {"messages": KING, "max_tokens": 55}),
    (CHAT, BASE | USAGE | {"messages": KING, "max_tokens": 45, "presence_penalty": 0.5}),
    (CHAT, BASE | USAGE | {"messages": KING, "max_tokens": 40, "logprobs": True}),
    (CHAT, BASE | {"messages": KING, "max_tokens": 30, "n": 2, "temperature": 0.7, "seed": 5}),
]
POISON = "the" + " the" * 30


@pytest.fixture(scope="module")
def frail(engine_server: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server whose core dies of one prompt. `engine_server` is asked for because it prepares the model."""
    folder = tmp_path_factory.mktemp("frail")
    (folder / "home").mkdir()
    (folder / "home" / "weights").symlink_to(TEST_HOME / "weights")
    running = start_process(
        folder / "home",
        folder / "log",
        REFRAIN_DTYPE="float32",
        REFRAIN_COMPILE="false",
        REFRAIN_ENGINE_HANG_S="4",
        REFRAIN_LOADING_WAIT_S=str(PATIENCE_S),
        REFRAIN_ENGINE_ARGS=json.dumps({"logits_processors": ["tests.engine.poison:Poison"]}),
        PYTHONPATH=str(REPOSITORY),
    )
    running.wait_ready()
    yield running
    assert running.stop() == 0


def core_of(server: Process) -> psutil.Process:
    (core,) = cores(server)
    return core


def told(path: str, response: httpx.Response) -> Any:
    """All that is not made up anew for each answer: text, log-probabilities, usage, how it ended."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        body = response.json()
        return [[choice.get("message") or choice["text"], choice["finish_reason"]] for choice in body["choices"]], body[
            "usage"
        ]
    events = [each for each in payloads(response.text) if each != "[DONE]"]
    assert not [each for each in events if each.get("error")], response.text[-500:]
    if path == "/v1/messages":
        text = "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")
        return text, events[-2]["delta"], events[-2]["usage"]
    if path == "/v1/responses":
        ended = events[-1]["response"]
        return ended["output"][0]["content"][0]["text"], ended["status"], ended["usage"]["output_tokens"]
    choices = [choice for each in events for choice in each["choices"]]
    text = "".join((choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices)
    logprobs = [entry for choice in choices for entry in (choice.get("logprobs") or {}).get("content") or ()]
    return text, [entry["token"] for entry in logprobs], choices[-1]["finish_reason"], events[-1]["usage"]


def ask_all(server: Process, pool: ThreadPoolExecutor) -> list[Any]:
    def ask(call: tuple[str, dict[str, Any]]) -> Any:
        path, body = call
        return told(path, httpx.post(server.url + path, json=body, headers=UNSAVED, timeout=PATIENCE_S))

    return [pool.submit(ask, call) for call in CALLS]


@pytest.fixture(scope="module")
def unbroken(frail: Process) -> list[Any]:
    with ThreadPoolExecutor(len(CALLS)) as pool:
        return [asked.result() for asked in ask_all(frail, pool)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_what_ran_goes_on_and_says_the_same(frail: Process, unbroken: list[Any], how: signal.Signals) -> None:
    hot = {"model": MODEL, "messages": KING, "temperature": 0, "max_tokens": 4}
    with frail.client() as http, ThreadPoolExecutor(len(CALLS)) as pool:
        http.post(CHAT, json=hot)
        restarts, core = metric(http, "refrain_engine_restarts"), core_of(frail)
        generated = metric(http, "vllm:generation_tokens_total")
        asked = ask_all(frail, pool)
        until(lambda: metric(http, "vllm:generation_tokens_total") > generated + 60, PATIENCE_S)
        os.kill(core.pid, how)
        until(lambda: http.get("/readyz").json()["status"] == "loading", PATIENCE_S, 0.05)
        hit = http.post(CHAT, json=hot)
        assert hit.headers["x-cache"] == "hit", "hits are answered all the while"
        assert not all(each.done() for each in asked), "it was hurt while it worked"
        for call, each, whole in zip(CALLS, asked, unbroken, strict=True):
            assert each.result() == whole, call
        assert metric(http, "refrain_engine_restarts") == restarts + 1
        wait_idle(http, 30)
    until(lambda: core.pid not in {each.pid for each in cores(frail)})
    assert core_of(frail)


def test_a_call_that_kills_the_engine_is_kept_out_and_the_rest_goes_on(frail: Process, unbroken: list[Any]) -> None:
    poison = BASE | {"prompt": POISON, "max_tokens": 4}
    with frail.client() as http, ThreadPoolExecutor(len(CALLS) + 1) as pool:
        asked = ask_all(frail, pool)
        until(lambda: metric(http, RUNNING) > 2, PATIENCE_S)
        deadly = pool.submit(httpx.post, f"{frail.url}/v1/completions", json=poison, timeout=PATIENCE_S)
        for call, each, whole in zip(CALLS, asked, unbroken, strict=True):
            assert each.result() == whole, call
        for refused in (deadly.result(), http.post("/v1/completions", json=poison)):
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "quarantined"
            assert int(refused.headers["retry-after"]) > 0
        assert metric(http, "refrain_engine_quarantined") == 1
        until(lambda: http.get("/readyz").json().get("quarantined") == 1)
