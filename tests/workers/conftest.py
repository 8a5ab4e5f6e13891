"""`refrain serve` with workers, and connections that are known to begin in one of them."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpcore
import httpx
import psutil
import pytest

from app.gate.keys import KeyFile
from app.weights import Registry
from tests.conftest import NO_TLS, Process, chat, start_process, until
from tests.sockets import post, received
from tests.weights.conftest import publish

CHAT = "/v1/chat/completions"
BOT = "bot"
HOT = chat("hot", model=BOT, max_tokens=6)
# A header that may mean something: its call is the server's, whatever the cache has.
WHOLE_WAY = {"x-whole-way": "1"}
# A server that is asked what was counted waits for its workers for 0.5 s; one that answers sooner knows.
FRESH_S = 0.4


class _InOnePiece(httpcore.NetworkStream):
    """Sends a request when its answer is to be read. A worker waits for a body that comes apart from its head for
    0.2 s, which this process may take between the two."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream, self._unsent = stream, b""
        self.close, self.get_extra_info = stream.close, stream.get_extra_info

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent += buffer

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        unsent, self._unsent = self._unsent, b""
        self._stream.write(unsent, timeout)
        return self._stream.read(max_bytes, timeout)


class _Network(httpcore.NetworkBackend):
    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        return _InOnePiece(httpcore.SyncBackend().connect_tcp(*arguments, **options))


def one_connection() -> httpx.HTTPTransport:
    transport = httpx.HTTPTransport(verify=NO_TLS)
    transport._pool = httpcore.ConnectionPool(max_connections=1, network_backend=_Network())
    return transport


@dataclass
class House:
    """A server on published weights with keys, and its workers."""

    running: Process
    home: Path
    secret: str
    first: str

    @property
    def url(self) -> str:
        return self.running.url

    @property
    def keys(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    @property
    def registry(self) -> Registry:
        return Registry(self.home / "weights")

    def client(self, **options: Any) -> httpx.Client:
        """One connection."""
        return httpx.Client(
            base_url=self.url, timeout=30, headers=self.keys, transport=one_connection(), trust_env=False, **options
        )

    def ask(self, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        """On a connection of its own."""
        with self.client() as client:
            return client.post(CHAT, json=body or HOT, headers=headers)

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.running.process.pid).children()
        return [child for child in children if is_worker(child)]

    def metric(self, start: str) -> float:
        """What all processes have counted by now."""

        def told() -> str | None:
            with self.client() as client:
                began = time.monotonic()
                text = client.get("/metrics").text
                return text if time.monotonic() - began < FRESH_S else None

        return sum(float(line.split()[-1]) for line in until(told).splitlines() if line.startswith(start))

    def wait_for_workers(self, count: int = 1) -> None:
        until(lambda: self.metric("refrain_http_workers ") == count)

    def wait_for_another(self, worker: psutil.Process) -> None:
        """After the end of the only worker, which the server does not count as one any more when it starts another."""
        until(lambda: [each for each in self.workers() if each.pid != worker.pid])
        self.wait_for_workers()

    @contextmanager
    def server_paused(self) -> Iterator[None]:
        """While the server's own process stands still, whatever answers is a worker."""
        os.kill(self.running.process.pid, signal.SIGSTOP)
        try:
            until(lambda: psutil.Process(self.running.process.pid).status() == psutil.STATUS_STOPPED)
            yield
        finally:
            os.kill(self.running.process.pid, signal.SIGCONT)

    @contextmanager
    def client_of_a_worker(self) -> Iterator[httpx.Client]:
        with self.client() as client:
            with self.server_paused():
                assert client.post(CHAT, json=HOT).headers["x-cache"] == "hit"
            yield client

    def is_with_a_worker(self, connection: socket.socket) -> bool:
        """Who answers a hot hit tells."""
        with self.server_paused():
            connection.sendall(post(CHAT, json.dumps(HOT).encode(), **self.keys))
            is_answered = bool(select.select([connection], [], [], 0.5)[0])
        ((status, headers, _),) = received(connection)
        assert (status, headers["x-cache"]) == (200, "hit")
        return is_answered


def is_worker(process: psutil.Process) -> bool:
    try:
        return "app.workers" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


def start_house(directory: Path, **environment: str) -> House:
    home = directory / "home"
    registry = Registry(home / "weights")
    first = publish(registry, BOT, 1)
    registry.point(BOT, first)
    secret, _ = KeyFile(home / "keys.json").create("shop", admin=True)
    defaults = {
        "REFRAIN_ENGINE": "scripted",
        "REFRAIN_MODEL": BOT,
        "REFRAIN_HTTP_WORKERS": "1",
        "REFRAIN_WATCH_S": "0",
        "REFRAIN_SCRIPTED_TOKENS_PER_S": "100",
    }
    log = directory / f"log{time.monotonic_ns()}"
    house = House(start_process(home, log, **(defaults | environment)), home, secret, first)
    house.wait_for_workers(int(environment.get("REFRAIN_HTTP_WORKERS", "1")))
    until(lambda: house.ask().headers["x-cache"] == "hit")
    return house


def end_house(house: House) -> None:
    if house.running.process.poll() is None:
        house.running.process.kill()
        house.running.process.wait()


Start = Callable[..., House]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """For tests that hurt it."""
    started: list[House] = []

    def build(**environment: str) -> House:
        started.append(start_house(tmp_path, **environment))
        return started[-1]

    yield build
    for house in started:
        end_house(house)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all tests of a module that leave it as it was."""
    there = start_house(tmp_path_factory.mktemp("w"), REFRAIN_STREAM_RESUME_S="20", REFRAIN_BODY_TIMEOUT_S="3")
    yield there
    end_house(there)
    assert "Traceback" not in there.running.log.read_text()


def access_lines(house: House) -> list[str]:
    return re.findall(r".*POST .*", house.running.log.read_text())
