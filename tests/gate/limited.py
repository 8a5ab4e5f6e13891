"""Keys with limits, calls with them, and a look at what Redis counts of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import redis

from app.gate.keys import KeyFile
from app.gate.limits import NONE_OF_ITS_OWN
from app.settings import Settings
from tests.conftest import RedisServer, Running, chat, until

CHAT = "/v1/chat/completions"


def key(settings: Settings, **limits: str) -> dict[str, str]:
    """Headers of a new key: `key(settings, rpm="3")`."""
    secret, _ = KeyFile(settings.keys_path).create("shop", limits=NONE_OF_ITS_OWN.changed(limits))
    return {"authorization": f"Bearer {secret}"}


def ask(running: Running, headers: dict[str, str], content: str = "hello", **fields: Any) -> httpx.Response:
    """In the scripted engine `ask(..., "one two")` takes 5 tokens in (with JSON's own) and 6 out."""
    with running.client(headers=headers) as client:
        return client.post(CHAT, json=chat(content, **({"max_tokens": 6} | fields)))


def all_at_once(calls: Sequence[tuple[Running, str]], headers: dict[str, str]) -> list[int]:
    """The statuses of many calls that are all under way together."""

    async def ask_all() -> list[int]:
        unbounded = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=headers, limits=unbounded, timeout=60) as client:

            async def one(running: Running, content: str) -> int:
                response = await client.post(running.url + CHAT, json=chat(content, max_tokens=6))
                return response.status_code

            return await asyncio.gather(*(one(*call) for call in calls))

    return asyncio.run(ask_all())


def client_of(server: RedisServer) -> Any:
    return redis.Redis(unix_socket_path=server.url.removeprefix("unix://"), decode_responses=True)


def counted(server: RedisServer, running: Running, name: str) -> int:
    """One counter of the only key that was used."""
    found = list(client_of(server).scan_iter(f"{running.settings.redis_namespace}:limit:*:counters"))
    return int(float(client_of(server).hget(found[0], name) or 0)) if found else 0


def settled(server: RedisServer, running: Running) -> int:
    """What is spent of the budget, once no call runs any more."""
    running_calls = f"{running.settings.redis_namespace}:limit:*:running"
    until(lambda: not list(client_of(server).scan_iter(running_calls)))
    return counted(server, running, "spent")
