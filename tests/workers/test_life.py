"""Workers come, are told, die and end: what a client, and an operator, sees of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from app.gate.keys import KeyFile
from tests.conftest import chat, until
from tests.journeys.test_process import is_gone
from tests.weights.conftest import publish
from tests.workers.conftest import BOT, CHAT, HOT, House, Start
from tests.workers.test_answering import connected, raw


def digest_of(answer: httpx.Response) -> str:
    """The digest that headers, body and the scripted text speak of."""
    assert answer.status_code == 200, answer.text
    digest, body = answer.headers["x-weights"].partition("@")[2], answer.json()
    assert body["choices"][0]["message"]["content"].split()[0] == digest
    assert body["system_fingerprint"] == f"rf_{digest}"
    return digest


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def swap_to(house: House, digest: str) -> None:
    house.registry.point(BOT, digest, "test")
    with house.client() as client:
        assert client.post("/admin/models/reload").json()["served"].endswith(digest[:12])


def test_no_old_answer_after_a_swap_and_the_old_one_at_once_after_rollback(start: Start) -> None:
    house = start(REFRAIN_HTTP_WORKERS="2")
    second = publish(house.registry, BOT, 2)
    over = threading.Event()

    def ask_on() -> int:
        with house.client() as client:
            asked = 0
            while not over.is_set():
                digest_of(client.post(CHAT, json=HOT))
                asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_on) for _ in range(4)]
        try:
            for digest in (second, house.first) * 3:
                swap_to(house, digest)
                with ThreadPoolExecutor(8) as others:
                    answers = list(others.map(lambda _: house.ask(), range(16)))
                assert {digest_of(answer) for answer in answers} == {digest[:12]}
        finally:
            over.set()
        assert all(each.result() > 0 for each in asking)
    with house.server_paused():
        assert house.ask().headers["x-cache"] == "hit"


def test_a_worker_that_does_not_heed_a_swap_is_replaced(start: Start) -> None:
    house = start()
    (stuck,) = house.workers()
    stuck.suspend()
    until(lambda: stuck.status() == psutil.STATUS_STOPPED)
    second = publish(house.registry, BOT, 2)
    swap_to(house, second)
    until(lambda: is_gone(stuck))
    house.wait_for_another(stuck)
    until(lambda: house.ask().headers["x-cache"] == "hit")
    with house.server_paused():
        assert digest_of(house.ask()) == second[:12]


def test_a_killed_worker_loses_its_own_connections_and_comes_back(start: Start) -> None:
    house = start(REFRAIN_SCRIPTED_TOKENS_PER_S="100")
    (worker,) = house.workers()
    slow = chat("through it all", model=BOT, max_tokens=100, stream=True)
    with house.client_of_a_worker() as idle, house.client_of_a_worker() as client:
        counted = house.metric('refrain_calls_total{cache="hit"')
        with client.stream("POST", CHAT, json=slow) as response:
            lines = response.iter_lines()
            next(lines)
            worker.kill()
            until(lambda: is_gone(worker))
            *_, last = (line for line in lines if line.startswith("data: "))
        assert last == "data: [DONE]", "what is no hit is not in the worker any more"
        assert house.metric('refrain_calls_total{cache="hit"') >= counted, "no counter goes back"
        house.wait_for_another(worker)
        try:
            assert idle.post(CHAT, json=HOT).status_code == 200  # httpx opened another connection
        except httpx.TransportError:
            assert idle.post(CHAT, json=HOT).status_code == 200
    with house.server_paused():
        assert house.ask().headers["x-cache"] == "hit"
    assert "an http worker ended (code -9)" in house.running.log.read_text()


def test_keys_count_in_workers_and_a_new_worker_opens_no_door(start: Start) -> None:
    house = start()
    file = KeyFile(house.home / "keys.json")
    other, key = file.create("bank")
    others = {"authorization": f"Bearer {other}"}
    with house.client_of_a_worker() as client:
        until(lambda: client.post(CHAT, json=HOT, headers=others).status_code == 200)
        assert client.post(CHAT, json=HOT, headers=others).headers["x-cache"] == "hit"
        file.revoke(key.id)
        until(lambda: client.post(CHAT, json=HOT, headers=others).status_code == 401, 10)
    url, (mine,) = house.url, file.read()
    file.revoke(mine.id)
    until(lambda: httpx.post(url + CHAT, json=HOT, headers=house.keys).status_code == 401, 10)
    (worker,) = house.workers()
    worker.kill()
    until(lambda: is_gone(worker))
    house.wait_for_another(worker)
    statuses = {httpx.post(url + CHAT, json=HOT).status_code for _ in range(20)}
    assert statuses == {401}


def test_a_killed_server_leaves_no_worker_and_its_port_is_free(start: Start) -> None:
    house = start(REFRAIN_HTTP_WORKERS="2")
    workers = house.workers()
    assert len(workers) == 2
    port = int(house.url.rpartition(":")[2])
    assert not is_free(port)
    house.running.process.kill()
    house.running.process.wait()
    for worker in workers:
        until(lambda worker=worker: is_gone(worker), 10)
    until(lambda: is_free(port), 10)  # a process is a zombie before the last of its threads has let its sockets go


def test_what_runs_and_what_has_begun_to_arrive_is_answered_before_the_end(start: Start) -> None:
    house = start(REFRAIN_SCRIPTED_TOKENS_PER_S="40", REFRAIN_DRAIN_S="10")
    family = psutil.Process(house.running.process.pid).children(recursive=True)
    slow = chat("draining", model=BOT, max_tokens=60, stream=True)
    request = raw(house, json.dumps(HOT).encode())
    with (
        house.client_of_a_worker() as client,
        connected(house) as arriving,
        client.stream("POST", CHAT, json=slow) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        with house.server_paused():  # so that it is a worker that has the first half
            arriving.sendall(request[:-3])
            os.kill(house.running.process.pid, signal.SIGTERM)
        until(lambda: "draining" in house.running.log.read_text())
        arriving.sendall(request[-3:])
        assert arriving.recv(65536).startswith(b"HTTP/1.1 200 OK")
        *_, last = (line for line in lines if line.startswith("data: "))
    assert last == "data: [DONE]"
    assert house.running.process.wait(timeout=30) == 0
    for member in family:
        until(lambda member=member: is_gone(member), 10)
    assert "Traceback" not in house.running.log.read_text()
