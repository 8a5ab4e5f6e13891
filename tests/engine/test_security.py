"""Hostile calls against the real engine: others do not notice, and nothing is fetched."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import psutil
import pytest

from tests.conftest import Process, until
from tests.engine.conftest import ANEW, CHAT, PATIENCE_S, chat, payloads

pytestmark = pytest.mark.engine

# Each can take a tenth of a second and more for a token that it is asked about, as the path through it has it.
HOSTILE = (
    {"regex": "(([a-z0-9]{1,50}){1,50}x){1,50}"},
    {"grammar": 'root ::= root root | "a" | [a-z]+ root | ""'},
    {"grammar": "start: (A|B)*\nA: /[a-z]{1,200}/\nB: /([0-9]{1,100}){1,100}/"},
)


def test_hostile_constraints_are_refused_and_do_not_stop_others(engine_server: Process, http: httpx.Client) -> None:
    held = {"structured_outputs": {"regex": "[A-Z][a-z]+"}}
    assert http.post(CHAT, json=chat(**held), headers=ANEW).status_code == 200  # the child is there now

    moments: list[float] = []
    are_refused = threading.Event()

    def stream() -> None:
        body = chat(stream=True, max_tokens=4000, ignore_eos=True)
        with http.stream("POST", CHAT, json=body, headers=ANEW) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    moments.append(time.monotonic())
                if are_refused.is_set():
                    return
        raise AssertionError("the stream ended before the last attack was refused")

    def attack(number: int) -> tuple[httpx.Response, float]:
        body = chat(structured_outputs=HOSTILE[number])
        response = httpx.post(engine_server.url + CHAT, json=body, headers=ANEW, timeout=PATIENCE_S)
        return response, time.monotonic()

    with ThreadPoolExecutor(4) as pool:
        streaming = pool.submit(stream)
        try:
            until(lambda: moments or streaming.done(), PATIENCE_S)
            began = time.monotonic()
            refused = list(pool.map(attack, range(3)))
        finally:
            are_refused.set()
        streaming.result()
    for response, _ in refused:
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "grammar_too_complex"
    # They are looked at one by one, for two seconds of processor time and more. A core that compiled by itself, or a
    # server, would be silent for the length of it.
    for begin, end in pairwise([began, *sorted(at for _, at in refused)]):
        heard_in = {int(10 * (moment - begin) / (end - begin)) for moment in moments if begin <= moment < end}
        assert len(heard_in) > 2, "tenths of the time in which something came"
    assert min(_seconds(lambda: attack(0)) for _ in range(3)) < 1.0, "it was remembered"
    assert http.post(CHAT, json=chat(**held), headers=ANEW).status_code == 200
    assert len(psutil.Process(engine_server.process.pid).children(recursive=True)) < 10, "no child is left behind"


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_nothing_is_fetched_whatever_is_asked_for(http: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.setblocking(False)
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/x.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        asked = chat(messages=[{"role": "user", "content": [part]}])
        response = http.post(CHAT, json=asked)
        assert response.json()["error"]["code"] == "url_not_allowed"
        assert http.post(CHAT, json=chat(chat_template="{{ 1 }}")).json()["error"]["code"] == "field_not_allowed"
        with pytest.raises(BlockingIOError):  # nobody knocked: who does waits in its backlog, accepted or not
            canary.accept()


def test_streams_end_as_ever(http: httpx.Client) -> None:
    assert payloads(http.post(CHAT, json=chat(stream=True), headers=ANEW).text)[-1] == "[DONE]"
