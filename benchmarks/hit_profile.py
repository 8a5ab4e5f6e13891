"""Where a hot hit spends its CPU time: from the bytes that a socket gave to those that it is to take, under cProfile.

`python -m benchmarks.hit_profile [--stream] [--whole-way] [--calls N]`. The profiler triples the cost of small
functions, so the total is measured without it and the breakdown gives shares. What the kernel takes comes on top.
`--whole-way` sends a header that makes the call go through the app, as a hit does that is not hot.
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

import uvicorn
import uvloop
from rich.console import Console
from rich.table import Table
from uvicorn.server import ServerState

from app.api.hot import HotProtocol
from app.domain import Weights
from app.engine.scripted import ScriptedEngine
from app.main import create_app, uvicorn_config
from app.settings import Settings
from benchmarks.hits import PATH, QUESTION
from benchmarks.servers import ROOT, prepare_process

WARM_UP = 500


class Client(asyncio.Transport):
    """A connection without a socket: what the server writes is kept."""

    def __init__(self, config: uvicorn.Config, state: dict[str, Any], body: bytes, headers: dict[str, str]) -> None:
        super().__init__()
        self.sent = b""
        self._protocol = HotProtocol(config, ServerState(), state)
        self._protocol.connection_made(self)
        lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._request = "\r\n".join([*lines, f"content-length: {len(body)}"]).encode() + b"\r\n\r\n" + body

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.sent = data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """It is kept, whatever the server thinks of a client that is silent while another one is measured."""

    @property
    def is_answered(self) -> bool:
        cycle = self._protocol.cycle
        return bool(self.sent) and (cycle is None or cycle.response_complete)

    def ask(self) -> None:
        self.sent = b""
        self._protocol.data_received(bytes(bytearray(self._request)))  # a new object each time, as from a socket


async def _run(*, stream: bool, whole_way: bool, calls: int) -> tuple[float, pstats.Stats]:
    body = json.dumps(QUESTION | {"stream": stream}).encode()
    headers = {
        "host": "127.0.0.1:8000",
        "authorization": "Bearer none",
        "content-type": "application/json",
        "accept": "*/*",
    }
    with tempfile.TemporaryDirectory(prefix="rb-") as home:
        settings = Settings(home=Path(home), engine="scripted", access_log=True)
        weights = Weights("scripted", "", "0" * 64, "0" * 64, {}, max_model_len=8192)
        app = create_app(settings, weights, engine=ScriptedEngine(settings, weights))

        async with app.router.lifespan_context(app) as state:
            config = uvicorn_config(settings, app)
            while not app.state.service.store.is_near:
                await asyncio.sleep(0.01)  # it subscribes in the background
            cold = Client(config, state, body, headers | {"x-whole-way": "1"})
            hot = Client(config, state, body, headers)

            async def ask(client: Client) -> None:
                client.ask()
                while not client.is_answered:  # a hot hit is answered before this is looked at
                    await asyncio.sleep(0)

            for _ in range(WARM_UP):
                await ask(cold)
                await asyncio.sleep(0.001)
            client = cold if whole_way else hot
            await ask(client)
            assert b"x-cache: hit" in client.sent, "the answer was not recorded"
            best = float("inf")
            for _ in range(3):
                began = time.process_time()
                for _ in range(calls):
                    await ask(client)
                best = min(best, (time.process_time() - began) / calls)
            with cProfile.Profile() as profile:
                for _ in range(calls):
                    await ask(client)
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
    parser.add_argument("--whole-way", action="store_true", help="through the app, not in the protocol")
    given = parser.parse_args()
    prepare_process()
    seconds, stats = uvloop.run(_run(stream=given.stream, whole_way=given.whole_way, calls=given.calls))
    own: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own_s, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        own[_room(file)] += own_s
    total = sum(own.values())
    shares = {room: taken / total for room, taken in sorted(own.items(), key=lambda item: -item[1])}
    table = Table(
        title=f"a hot hit{', streamed' if given.stream else ''}: {seconds * 1e6:.1f} us of CPU, less the kernel's"
    )
    table.add_column("where")
    table.add_column("share", justify="right")
    for room, share in shares.items():
        table.add_row(room, f"{share:.0%}")
    Console().print(table)
    told = {"benchmark": "hit_profile", "stream": given.stream, "whole_way": given.whole_way, "us": seconds * 1e6}
    print(json.dumps(told | {"shares": shares}))


if __name__ == "__main__":
    main()
