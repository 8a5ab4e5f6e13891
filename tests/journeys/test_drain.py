"""Leaving: two replicas on one Redis, started anew one after the other, while clients ask what balancers ask."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.gate.keys import KeyFile
from tests.conftest import Process, RedisServer, chat, start_process, until
from tests.flight.asking import CHAT

Replica = Callable[..., Process]


@pytest.fixture
def replica(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Replica]:
    """Start a server on the Redis that all of them share."""
    started: list[Process] = []

    def start(**environment: str) -> Process:
        home = tmp_path / f"home{len(started)}"
        home.mkdir()
        process = start_process(
            home,
            tmp_path / f"log{len(started)}",
            REFRAIN_ENGINE="scripted",
            REFRAIN_REDIS_URL=shared_redis.url,
            REFRAIN_REDIS_NAMESPACE=tmp_path.name,
            **environment,
        )
        started.append(process)
        process.wait_ready()
        return process

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


class Balancer:
    """Takes turns among the replicas that say they are ready, looks every tenth of a second, tries nothing twice."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.is_ready = dict.fromkeys(urls, True)
        self._sending: dict[int, str] = {}
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._ends = threading.Event()

    @contextmanager
    def looking(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.1):
            for url in list(self.urls):
                self.is_ready[url] = _is_ready(url)

    @contextmanager
    def sending(self, client: int) -> Iterator[str]:
        """Which replica to ask; it has the request when the context ends."""
        with self._lock:
            ready = [url for url in list(self.urls) if self.is_ready.get(url)]
            self._sending[client] = url = ready[next(self._turns) % len(ready)]
        try:
            yield url
        finally:
            with self._lock:
                del self._sending[client]

    def has_left(self, url: str) -> bool:
        """Nobody is sent there any more, and what was sent has arrived."""
        with self._lock:
            return not self.is_ready[url] and url not in self._sending.values()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


class Load:
    """Clients that ask one call after the other: new questions and old ones, for streams and for bodies."""

    def __init__(self, balancer: Balancer) -> None:
        self.answered: dict[str, int] = {}
        self.failed: list[str] = []
        self._balancer = balancer
        self._ends = threading.Event()

    def has_reached(self, urls: list[str]) -> bool:
        return all(self.answered.get(url, 0) > 5 for url in urls)

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        with ThreadPoolExecutor(clients) as pool:
            for client in range(clients):
                pool.submit(self._ask_on, client)
            try:
                yield
            finally:
                self._ends.set()

    def _ask_on(self, client: int) -> None:
        for number in itertools.count():
            if self._ends.is_set():
                return
            question = f"question {number % 3}" if number % 2 else f"question {number} of client {client}"
            try:
                url = self._ask(client, chat(question, max_tokens=40, stream=client % 2 == 0))
            except Exception as error:
                self.failed.append(repr(error))
            else:
                self.answered[url] = self.answered.get(url, 0) + 1

    def _ask(self, client: int, body: dict[str, Any]) -> str:
        with ExitStack() as stack:
            with self._balancer.sending(client) as url:
                response = stack.enter_context(httpx.stream("POST", url + CHAT, json=body, timeout=30))
                if not body["stream"]:
                    response.read()  # until then nothing shows that it has arrived
            text = response.read().decode()
        assert response.status_code == 200, (url, text)
        if body["stream"]:
            assert text.endswith("data: [DONE]\n\n"), (url, text[-300:])
        else:
            assert json.loads(text)["choices"][0]["finish_reason"] == "length"
        return url


def test_a_rolling_restart_of_two_replicas_fails_no_request(replica: Replica) -> None:
    settings = {"REFRAIN_SCRIPTED_TOKENS_PER_S": "100"}
    replicas = [replica(**settings, REFRAIN_DRAIN_DELAY_S="600") for _ in range(2)]
    balancer = Balancer([each.url for each in replicas])
    load = Load(balancer)
    with balancer.looking(), load.running(6):
        for old in list(replicas):
            until(lambda: load.has_reached(balancer.urls))
            old.process.send_signal(signal.SIGTERM)
            until(lambda old=old: balancer.has_left(old.url))
            assert old.stop() == 0, "asked again, it waits for nobody but those whose answers are under way"
            balancer.urls.remove(old.url)
            replicas.append(replica(**settings, REFRAIN_DRAIN_DELAY_S="1"))
            balancer.urls.append(replicas[-1].url)
        until(lambda: load.has_reached(balancer.urls))
    assert load.failed == []
    assert len(load.answered) == 4
    began = time.monotonic()
    assert replicas[-1].stop() == 0
    assert time.monotonic() - began >= 1, "and not asked again, it takes calls for as long as it was told to"


def test_readiness_goes_first_and_work_is_taken_until_the_delay_is_over(replica: Replica) -> None:
    """An admin asks, and asks again: that cuts the delay short. What runs then is finished, and the exit is clean."""
    running = replica(REFRAIN_DRAIN_DELAY_S="600", REFRAIN_SCRIPTED_TOKENS_PER_S="40")
    home = Path(str(running.log).replace("log", "home"))
    admin, _ = KeyFile(home / "keys.json").create("ops", admin=True)
    user, _ = KeyFile(home / "keys.json").create("somebody")
    asked = {"authorization": f"Bearer {admin}"}
    with running.client(headers={"authorization": f"Bearer {user}"}) as client:
        until(lambda: client.post("/admin/drain").status_code == 403)
        assert client.get("/readyz").status_code == 200

        told = client.post("/admin/drain", headers=asked).json()
        assert (told["status"], told["delay_s"]) == ("draining", 600)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"], ready.json()["error"]["code"]) == (503, *["draining"] * 2)
        assert client.post(CHAT, json=chat("late, and taken", max_tokens=5)).status_code == 200

        with client.stream("POST", CHAT, json=chat("long", max_tokens=60, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            httpx.post(f"{running.url}/admin/drain", headers=asked)
            *_, end = [line for line in lines if line]
    assert end == "data: [DONE]"
    assert running.process.wait(timeout=30) == 0
    assert "Traceback" not in running.log.read_text()


def test_a_stream_that_outlasts_the_budget_goes_on_at_another_replica(replica: Replica) -> None:
    leaving, other = (
        replica(REFRAIN_STREAM_RESUME_S="60", **settings)
        for settings in (
            {"REFRAIN_SCRIPTED_TOKENS_PER_S": "5", "REFRAIN_DRAIN_S": "1"},  # far from its end, whoever is slow
            {"REFRAIN_SCRIPTED_TOKENS_PER_S": "100"},
        )
    )
    body = chat("a long story", stream=True, max_tokens=80)
    with leaving.client() as client, client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        head = list(itertools.islice(lines, 9))
        leaving.process.send_signal(signal.SIGTERM)
        head += list(lines)
    assert leaving.process.wait(timeout=30) == 0
    assert "retry: 5000" in head
    *events, error = _payloads(head)
    assert error["error"]["code"] == "draining"

    last_id = [line.removeprefix("id: ") for line in head if line.startswith("id: ")][-1]
    with other.client() as client:
        rest = client.post(CHAT, json=body, headers={"last-event-id": last_id}).text.splitlines()
        whole = client.post(CHAT, json=body).text.splitlines()
    assert _text([*events, *_payloads(rest)]) == _text(_payloads(whole))
    assert _payloads(rest)[-1] == "[DONE]"


def _payloads(lines: list[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def _text(events: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event != "[DONE]")
