"""What only real processes can show: batching, a client that leaves, and every way for a part to die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.conftest import REPOSITORY, TEST_HOME, Process, start_process, until
from tests.engine.conftest import ANEW, CHAT, IN_FLIGHT, ONLY_CACHED, PATIENCE_S, RUNNING, chat, metric, payloads

pytestmark = pytest.mark.engine

WORDS = ["cat", "house", "river", "king", "cake", "train", "star", "war", "song", "ship", "winter", "horse"]
# Long enough to be seen at it, however fast the machine.
STORY_TOKENS = 48


def story(number: int, **fields: Any) -> dict[str, Any]:
    """A call that goes on until its last token, unlike any other in this file."""
    messages = [{"role": "user", "content": f"Tell me about the number {number}, and a {WORDS[number % len(WORDS)]}."}]
    return chat(messages=messages, ignore_eos=True) | fields


def test_concurrent_streams_share_a_batch(http: httpx.Client) -> None:
    def tell(number: int) -> list[Any]:
        return payloads(http.post(CHAT, json=story(number, stream=True, max_tokens=STORY_TOKENS), headers=ANEW).text)

    with ThreadPoolExecutor(16) as pool:
        telling = [pool.submit(tell, number) for number in range(16)]
        until(lambda: metric(http, RUNNING) > 1 and metric(http, IN_FLIGHT) > 1, PATIENCE_S)
        streams = [future.result() for future in telling]
    for *chunks, end in streams:
        assert end == "[DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({_said(stream) for stream in streams}) > 8, "sixteen stories, not one sixteen times"
    until(lambda: metric(http, RUNNING) == 0, PATIENCE_S)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "body"])
def test_a_client_that_leaves_frees_the_engine_and_records_nothing(
    engine_server: Process, http: httpx.Client, streams: bool
) -> None:
    until(lambda: metric(http, RUNNING) == 0, PATIENCE_S)
    generated = metric(http, "vllm:generation_tokens_total")
    left = metric(http, "refrain_clients_left_total")
    body = story(100 + streams, stream=streams, max_tokens=4000)

    connection = _post(engine_server, body)
    if streams:
        assert connection.getresponse().read(40).startswith(b"data: {")
    until(lambda: metric(http, RUNNING) == 1, PATIENCE_S)
    # `close` alone would leave the socket open as long as the response holds it.
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()

    until(lambda: metric(http, "refrain_clients_left_total") == left + 1, PATIENCE_S)
    until(lambda: metric(http, IN_FLIGHT) == 0, PATIENCE_S)
    answer = http.post(CHAT, json=chat(), headers=ANEW).json()
    until(lambda: metric(http, RUNNING) == 0, PATIENCE_S)
    assert metric(http, "vllm:generation_tokens_total") - generated < 3000 + answer["usage"]["completion_tokens"]
    assert http.post(CHAT, json=body | {"stream": False}, headers=ONLY_CACHED).status_code == 504


@dataclass
class Victim:
    """A server of its own for what hurts; started again by whoever finds it down, since a start takes long."""

    home: Path
    log_folder: Path
    process: Process | None = None
    starts: Iterator[int] = field(default_factory=count)

    def up(self, *, is_ready: bool = True) -> Process:
        if self.process is None or self.process.process.poll() is not None:
            log = self.log_folder / f"log{next(self.starts)}"
            # The drain must outlast a stream on a machine that is busy with something else.
            self.process = start_process(self.home, log, REFRAIN_DRAIN_S=str(PATIENCE_S))
        if is_ready:
            self.process.wait_ready()
        return self.process

    @property
    def descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def victim(engine_server: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """`engine_server` is asked for because it prepares the model."""
    folder = tmp_path_factory.mktemp("victim")
    home = folder / "home"
    home.mkdir()
    (home / "weights").symlink_to(TEST_HOME / "weights")
    if (TEST_HOME / "compiled").exists():
        (home / "compiled").symlink_to(TEST_HOME / "compiled")
    victim = Victim(home, folder)
    yield victim
    if victim.process is not None and victim.process.process.poll() is None:
        victim.process.process.kill()
        victim.process.process.wait()


def test_after_a_crash_a_compiled_model_is_loaded_and_says_the_same(victim: Victim) -> None:
    server = victim.up()
    with _client(server) as http:
        said = _text(http.post(CHAT, json=chat(), headers=ANEW))
        cores = _cores(victim)
        for core in cores:
            core.kill()
        until(lambda: _cores(victim) - cores and http.get("/readyz").status_code == 200, PATIENCE_S, 0.2)
        assert _text(http.post(CHAT, json=chat(), headers=ANEW)) == said
    assert "compiling the model" not in server.log.read_text(), "it was loaded, at the start and after the crash"


def test_a_killed_server_leaves_no_process_and_its_successor_has_its_recordings(victim: Victim) -> None:
    with _client(victim.up()) as http:
        said = _text(http.post(CHAT, json=chat(), headers=ANEW))
    assert len(victim.descendants) >= 3, "an engine core, its fork server, and a Redis"
    _kill(victim)
    with _client(victim.up(is_ready=False)) as http:
        assert _text(http.post(CHAT, json=chat(), headers=ONLY_CACHED)) == said
    _kill(victim)  # while its engine loads


def test_a_fork_server_that_starts_after_its_server_died_ends_at_once() -> None:
    """Killed 0.1 s after it began, a server left a fork server that loaded vLLM for twenty seconds first."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    program = "import app.engine.preload; print('still here')"
    environment = os.environ | {"_REFRAIN_FORKSERVER": str(dead.pid)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b""


def test_sigterm_lets_a_running_stream_finish_and_leaves_no_process(victim: Victim) -> None:
    server = victim.up()
    family = victim.descendants
    body = story(2, stream=True, max_tokens=20)
    with _client(server) as http, http.stream("POST", CHAT, json=body, headers=ANEW) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        *chunks, end = payloads("\n".join([first, *lines]))
    assert end == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(PATIENCE_S) == 0
    until(lambda: not _alive(family), 10)
    assert "Traceback" not in server.log.read_text()


def _kill(victim: Victim) -> None:
    """Kill the server alone; what it started must follow by itself."""
    family = victim.descendants
    assert victim.process is not None
    victim.process.process.kill()
    victim.process.process.wait()
    until(lambda: not _alive(family), 10)


def _client(server: Process) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S)


def _post(server: Process, body: dict[str, Any]) -> HTTPConnection:
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def _said(stream: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in stream[:-1])


def _is_core(process: psutil.Process) -> bool:
    try:
        return any("EngineCore" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _cores(victim: Victim) -> set[psutil.Process]:
    return {child for child in victim.descendants if _is_core(child)}


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. One that nobody has reaped yet is dead: in a container process 1 may never do it."""

    def is_alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if is_alive(process)]
