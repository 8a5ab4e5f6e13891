"""`refrain serve` with workers, and connections that are known to begin in one of them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.gate.keys import KeyFile
from app.weights import Registry
from tests.conftest import Process, chat, start_process, until
from tests.weights.conftest import publish

CHAT = "/v1/chat/completions"
BOT = "bot"
HOT = chat("hot", model=BOT, max_tokens=6)
# A header that may mean something: its call is the server's, whatever the cache has.
WHOLE_WAY = {"x-whole-way": "1"}


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
        limits = httpx.Limits(max_connections=1)
        return httpx.Client(base_url=self.url, timeout=30, headers=self.keys, limits=limits, **options)

    def ask(self, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        """On a connection of its own."""
        with self.client() as client:
            return client.post(CHAT, json=body or HOT, headers=headers)

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.running.process.pid).children()
        return [child for child in children if "app.workers" in " ".join(child.cmdline())]

    def metric(self, start: str) -> float:
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    def wait_for_workers(self, count: int = 1) -> None:
        until(lambda: self.metric("refrain_http_workers ") == count)

    @contextmanager
    def server_paused(self) -> Iterator[None]:
        """While the server's own process stands still, whatever answers is a worker."""
        os.kill(self.running.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.running.process.pid, signal.SIGCONT)

    @contextmanager
    def client_of_a_worker(self) -> Iterator[httpx.Client]:
        with self.client() as client:
            with self.server_paused():
                assert client.post(CHAT, json=HOT).headers["x-cache"] == "hit"
            yield client

    def is_with_a_worker(self, client: httpx.Client) -> bool:
        """Whether its only connection is; a hot hit tells."""
        with self.server_paused():
            try:
                return client.post(CHAT, json=HOT, timeout=0.5).headers["x-cache"] == "hit"
            except httpx.TimeoutException:
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
        "REFRAIN_SCRIPTED_TOKENS_PER_S": "400",
        "REFRAIN_REDIS_TIMEOUT_S": "1",
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
    there = start_house(tmp_path_factory.mktemp("w"), REFRAIN_STREAM_RESUME_S="20", REFRAIN_BODY_TIMEOUT_S="1")
    yield there
    end_house(there)
    assert "Traceback" not in there.running.log.read_text()


def access_lines(house: House) -> list[str]:
    return re.findall(r".*POST .*", house.running.log.read_text())
