"""Clients in threads, and a test's hands on the scripted engines behind the servers that they ask."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from app.engine.scripted import Script
from tests.conftest import Running, until

T = TypeVar("T")
CHAT = "/v1/chat/completions"


class Asking:
    """One streaming or plain call in a thread of its own; `events` grows while the answer comes."""

    def __init__(self, url: str, body: dict[str, Any], path: str = CHAT, **headers: str) -> None:
        self._url, self._body, self._path = url, body, path
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response: httpx.Response | None = None
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            with (
                httpx.Client(base_url=self._url, timeout=60) as client,
                client.stream("POST", self._path, json=self._body, headers=self._headers) as response,
            ):
                self.response = response
                for line in response.iter_lines():
                    self.lines.append(line)
                    if self._leave.is_set():
                        return
        except httpx.HTTPError as error:
            self.error = error

    @property
    def status(self) -> str | None:
        return self.response.headers.get("x-cache") if self.response else None

    @property
    def payloads(self) -> list[Any]:
        data = [line.removeprefix("data: ") for line in list(self.lines) if line.startswith("data: ")]
        return [each if each == "[DONE]" else json.loads(each) for each in data]

    @property
    def ids(self) -> list[str]:
        return [line.removeprefix("id: ") for line in self.lines if line.startswith("id: ")]

    @property
    def text(self) -> str:
        if not self._body.get("stream"):
            return json.loads("\n".join(self.lines))["choices"][0]["message"]["content"]
        return text_of(self.payloads)

    @property
    def is_whole(self) -> bool:
        return not self._body.get("stream") or self.payloads[-1] == "[DONE]"

    def leave(self) -> None:
        """Go at the next line that comes."""
        self._leave.set()

    def done(self) -> Asking:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "no answer"
        assert self.error is None, self.error
        return self


def text_of(payloads: list[Any]) -> str:
    chunks = [each for each in payloads if each != "[DONE]"]
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each.get("choices"))


def script_of(running: Running) -> Script:
    """The next call that this server's engine was asked."""
    return until(lambda: None if running.engine.asked.empty() else running.engine.asked.get_nowait())


def on_loop(running: Running, function: Callable[..., None], *arguments: object) -> None:
    """Scripts are not thread-safe; their queue lives in the server's loop."""
    running.engine.loop.call_soon_threadsafe(function, *arguments)


def of_loop(running: Running, function: Callable[[], T]) -> T:
    """What it returns in the server's loop: what lives there may change while another thread goes through it."""

    async def asked() -> T:
        return function()

    return asyncio.run_coroutine_threadsafe(asked(), running.engine.loop).result(timeout=60)


def boarded(running: Running) -> int:
    """How many are aboard this server's flights."""
    flights = running.app.state.service.flights
    return of_loop(running, lambda: sum(len(flight.seats) for flight in flights._by_key.values()))


def follows(there: Running, here: Running) -> bool:
    """Whether a flight of `there` has heard from Redis that `here` leads it: to be aboard comes before that."""
    ours, theirs = (
        of_loop(each, lambda each=each: {flight.uid for flight in each.app.state.service.flights._by_key.values()})
        for each in (there, here)
    )
    return bool(ours & theirs)
