"""Hostile calls against the real engine: others do not notice, and nothing is fetched."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import psutil
import pytest

from tests.conftest import Process
from tests.engine.conftest import ANEW, CHAT, chat, payloads

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

    def stream() -> tuple[list[float], int]:
        body = chat(stream=True, max_tokens=200, ignore_eos=True)
        with http.stream("POST", CHAT, json=body, headers=ANEW) as response:
            moments = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
        return [after - before for before, after in pairwise(moments)], response.status_code

    def attack(number: int) -> httpx.Response:
        hostile = {kind: f"{spec} " if number > 2 else spec for kind, spec in HOSTILE[number % 3].items()}
        return httpx.post(engine_server.url + CHAT, json=chat(structured_outputs=hostile), headers=ANEW, timeout=120)

    with ThreadPoolExecutor(4) as pool:
        streaming = pool.submit(stream)
        time.sleep(0.5)  # it runs
        refused = list(pool.map(attack, range(3)))
        gaps, status = streaming.result()
    for response in refused:
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "grammar_too_complex"
    assert status == 200
    # Two cores are shared with the child; a core that compiled by itself would be silent for the length of it.
    assert max(gaps) < max(2.0, 25 * statistics.median(gaps))
    began = time.monotonic()
    assert attack(0).status_code == 400
    assert time.monotonic() - began < 1.0, "it was remembered"
    assert http.post(CHAT, json=chat(**held), headers=ANEW).status_code == 200
    assert len(psutil.Process(engine_server.process.pid).children(recursive=True)) < 10, "no child is left behind"


def test_nothing_is_fetched_whatever_is_asked_for(http: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as canary:
        knocks: list[object] = []
        threading.Thread(target=lambda: knocks.append(canary.accept()), daemon=True).start()
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/x.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        asked = chat(messages=[{"role": "user", "content": [part]}])
        response = http.post(CHAT, json=asked)
        assert response.json()["error"]["code"] == "url_not_allowed"
        assert http.post(CHAT, json=chat(chat_template="{{ 1 }}")).json()["error"]["code"] == "field_not_allowed"
        assert knocks == []


def test_streams_end_as_ever(http: httpx.Client) -> None:
    assert payloads(http.post(CHAT, json=chat(stream=True), headers=ANEW).text)[-1] == "[DONE]"
