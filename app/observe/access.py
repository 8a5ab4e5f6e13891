"""One line per request, written a few times a second in one piece.

A line through `logging` costs as much as the rest of a hit. These are put together by hand and handed to
the operating system together; what a crash can lose is the last fraction of a second.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import lru_cache
from typing import Any, Self, TextIO

import msgspec

FLUSH_EVERY_S = 0.2

_json = msgspec.json.Encoder()


@lru_cache(maxsize=1)
def _clock(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))


class AccessLog:
    """Collects lines while it is open (`async with`), and writes them to standard error."""

    def __init__(self, format: str, stream: TextIO | None = None) -> None:
        self._is_json = format == "json"
        self._stream = stream or sys.stderr
        self._lines: list[str] = []
        self._writing: asyncio.Task[None] | None = None

    def note(self, request_id: str, method: str, path: str, status: int, ms: float, fields: dict[str, Any]) -> None:
        """Remember one finished request. `fields` are what inner layers told of it; never a prompt or an answer."""
        if self._is_json:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "level": "INFO",
                "logger": "app.access",
                "message": f"{method} {path} {status}",
                "request_id": request_id,
                "status": status,
                "ms": round(ms, 2),
                **fields,
            }
            self._lines.append(_json.encode(line).decode() + "\n")
            return
        told = "".join(f" {name}={value}" for name, value in fields.items())
        # A client's path may hold control characters, which a terminal must not get.
        path = path if path.isprintable() else path.encode("unicode_escape").decode()
        self._lines.append(
            f"{_clock(int(time.time()))} INFO    {method} {path} {status} {ms:.1f}ms{told}  [{request_id}]\n"
        )

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write_regularly(), name="access-log")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writing:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        self._write()

    async def _write_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            self._write()

    def _write(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # a closed or full log must not take the server along
                return
