"""Where a hot hit spends its CPU time: the app alone, called as uvicorn would call it, under cProfile.

`python -m benchmarks.hit_profile [--stream] [--calls N]`. The profiler triples the cost of small functions, so the
total is measured without it and the breakdown gives shares. What uvicorn and the kernel take comes on top.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from app.domain import Weights
from app.engine.scripted import ScriptedEngine
from app.main import create_app
from app.settings import Settings
from benchmarks.hits import PATH, QUESTION
from benchmarks.servers import ROOT, prepare_process

WARM_UP = 500


class Client:
    """What uvicorn would be to the app, less the socket. As with uvicorn, `receive` is a method of something that
    knows whether the body is complete."""

    more_body = False

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._left = asyncio.Event()
        self.sent: list[Any] = []
        headers = {
            "host": "127.0.0.1:8000",
            "authorization": "Bearer none",
            "content-type": "application/json",
            "accept": "*/*",
            "content-length": str(len(body)),
        }
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }

    async def receive(self) -> Any:
        body, self._body = self._body, b""
        if not body:
            await self._left.wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def cache(self) -> str:
        return next(value.decode() for name, value in self.sent[0]["headers"] if name == b"x-cache")


async def _run(*, stream: bool, calls: int) -> tuple[float, pstats.Stats]:
    body = json.dumps(QUESTION | {"stream": stream}).encode()
    with tempfile.TemporaryDirectory(prefix="rb-") as home:
        settings = Settings(home=Path(home), engine="scripted", access_log=True)
        weights = Weights("scripted", "", "0" * 64, "0" * 64, {}, max_model_len=8192)
        app = create_app(settings, weights, engine=ScriptedEngine(settings, weights))

        async def ask() -> Client:
            client = Client(bytes(bytearray(body)))  # a new object each time, as from a socket
            await app(client.scope.copy(), client.receive, client.send)
            return client

        async with app.router.lifespan_context(app):
            while not app.state.service.store.is_near:
                await asyncio.sleep(0.01)  # it subscribes in the background
            for _ in range(WARM_UP):
                last = await ask()
            assert last.cache == "hit", "the answer was not recorded"
            best = float("inf")
            for _ in range(3):
                began = time.process_time()
                for _ in range(calls):
                    await ask()
                best = min(best, (time.process_time() - began) / calls)
            with cProfile.Profile() as profile:
                for _ in range(calls):
                    await ask()
    return best, pstats.Stats(profile)


def _room(file: str) -> str:
    """`app.api` for its files, a library's name for its files."""
    path = Path(file)
    if path.is_relative_to(ROOT / "app"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:2])
    if "site-packages" in path.parts:
        return path.parts[path.parts.index("site-packages") + 1]
    return "benchmark" if path.is_relative_to(ROOT / "benchmarks") else "python"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hit_profile", description=__doc__)
    parser.add_argument("--stream", action="store_true", help="replay as a stream")
    parser.add_argument("--calls", type=int, default=10_000)
    given = parser.parse_args()
    prepare_process()
    seconds, stats = uvloop.run(_run(stream=given.stream, calls=given.calls))
    own: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own_s, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        own[_room(file)] += own_s
    total = sum(own.values())
    shares = {room: taken / total for room, taken in sorted(own.items(), key=lambda item: -item[1])}
    table = Table(title=f"a hot hit{', streamed' if given.stream else ''}: {seconds * 1e6:.1f} us of CPU in the app")
    table.add_column("where")
    table.add_column("share", justify="right")
    for room, share in shares.items():
        table.add_row(room, f"{share:.0%}")
    Console().print(table)
    print(json.dumps({"benchmark": "hit_profile", "stream": given.stream, "us": seconds * 1e6, "shares": shares}))


if __name__ == "__main__":
    main()
