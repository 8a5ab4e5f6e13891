"""Calls that are sent at moments fixed beforehand, however slow the server is, on a connection each.

Times are counted from the planned moment, not from when the client came to it: a server that stands still is charged
for all who would have come meanwhile (no coordinated omission). `closed` sends the next call when one is answered, for
the most that a server can do.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Call = dict[str, Any]

_CONTENT = re.compile(rb'"content":"[^"]')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_WORDS = "river stone winter candle garden market silver window thunder paper bridge orange engine letter".split()


@dataclass(slots=True)
class Outcome:
    """One call; seconds are since its planned moment, `at_s` is that moment since the beginning of all.

    `late_s` is how late the client itself came to it; `cache` is what `x-cache` said.
    """

    at_s: float
    who: str
    status: int = 0
    chunks_s: list[float] = field(default_factory=list)
    done_s: float = 0.0
    tokens: int = 0
    is_whole: bool = False
    late_s: float = 0.0
    cache: str = ""

    @property
    def first_s(self) -> float | None:
        return self.chunks_s[0] if self.chunks_s else None

    def tokens_between(self, from_s: float, until_s: float) -> float:
        """What came in that time of a whole answer; of any other nothing counts."""
        if not self.is_whole or not self.chunks_s:
            return 0.0
        came = sum(from_s <= self.at_s + each < until_s for each in self.chunks_s)
        return self.tokens * came / len(self.chunks_s)


def call(words: int, tokens: int, model: str | None = None) -> Call:
    """A chat call that nobody sent before, about `words` long, answered with exactly `tokens`."""
    text = " ".join([f"{random.getrandbits(64):x}", *random.choices(_WORDS, k=words)])
    body: Call = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    return body | ({"model": model} if model else {})


def poisson(per_s: float, seconds: float) -> Iterator[float]:
    """The moments of a Poisson process."""
    at = 0.0
    while (at := at + random.expovariate(per_s)) < seconds:
        yield at


class Client:
    """Sends calls to one server. `began` is moment 0."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._host, self._port = target.hostname, target.port
        self.began = time.perf_counter()
        self.outcomes: list[Outcome] = []

    async def open_loop(self, who: str, moments: Iterator[float], make: Callable[[], Call], key: str = "none") -> None:
        """Send at each moment, and return when all are answered."""
        async with asyncio.TaskGroup() as group:
            for at in moments:
                await asyncio.sleep(self.began + at - time.perf_counter())
                group.create_task(self.send(Outcome(at, who), make(), key))

    async def closed(
        self, who: str, connections: int, seconds: float, make: Callable[[], Call], key: str = "none"
    ) -> None:
        until = time.perf_counter() + seconds

        async def one() -> None:
            while (now := time.perf_counter()) < until:
                await self.send(Outcome(now - self.began, who), make(), key)

        await asyncio.gather(*(one() for _ in range(connections)))

    async def send(self, outcome: Outcome, body: Call, key: str = "none") -> Outcome:
        self.outcomes.append(outcome)
        planned, content = self.began + outcome.at_s, json.dumps(body).encode()
        outcome.late_s = time.perf_counter() - planned
        reader, writer = await asyncio.open_connection(self._host, self._port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\nauthorization: Bearer {key}\r\n"
            f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + content)
            outcome.status = int((await reader.readline()).split()[1])
            async for line in reader:
                self._note(outcome, line, time.perf_counter() - planned)
        finally:
            writer.close()
        outcome.done_s = time.perf_counter() - planned
        return outcome

    @staticmethod
    def _note(outcome: Outcome, line: bytes, passed_s: float) -> None:
        if _CONTENT.search(line):
            outcome.chunks_s.append(passed_s)
        if found := _USAGE.search(line):
            outcome.tokens = int(found[1])
        if line.startswith(b"x-cache:"):
            outcome.cache = line[8:].strip().decode()
        outcome.is_whole |= line.startswith(b"data: [DONE]")


def quantile(values: list[float], share: float) -> float:
    """0 where there is nothing to tell of."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0
