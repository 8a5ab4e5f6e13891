"""A running server's tokens/s at a steady number of calls, to hold a plan against."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

import httpx

from app.errors import StartRefused
from app.plan.arithmetic import Load

# Prompts of about so many tokens: a word of these is one, give or take.
_WORDS = "the of and to in is was for on are with as his they at be this from have or by one had not but what".split()


@dataclass(frozen=True, slots=True)
class Measured:
    batch: int
    tokens_per_s: float
    first_token_s: float


async def measure(
    url: str, load: Load, batches: list[int], *, key: str | None = None, rounds: int = 2
) -> list[Measured]:
    """Output tokens/s at each batch, the best of so many rounds; no call is answered from a cache.

    Raises:
        StartRefused: the server does not answer as it should.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(
        base_url=url, timeout=600, headers=headers, limits=httpx.Limits(max_connections=None)
    ) as client:
        try:
            await _round(client, load, 1)
            found = []
            for batch in batches:
                took = [await _round(client, load, batch) for _ in range(rounds)]
                found.append(max(took, key=lambda each: each.tokens_per_s))
            return found
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise StartRefused(f"{url} cannot be measured: {error}") from error


async def _round(client: httpx.AsyncClient, load: Load, batch: int) -> Measured:
    began = time.perf_counter()
    calls = await asyncio.gather(*[_call(client, load) for _ in range(batch)])
    took_s = time.perf_counter() - began
    tokens = sum(count for count, _ in calls)
    return Measured(batch, tokens / took_s, min(first - began for _, first in calls))


async def _call(client: httpx.AsyncClient, load: Load) -> tuple[int, float]:
    """Tokens generated, and when the first came."""
    words = " ".join(secrets.choice(_WORDS) for _ in range(max(1, load.prompt_tokens - 8)))
    body = {
        "prompt": f"{secrets.token_hex(4)} {words}",
        "max_tokens": load.output_tokens,
        "min_tokens": load.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache": {"no_store": True, "no_cache": True},
    }
    first, usage = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError((await response.aread()).decode()[:300])
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            if '"usage":{' in line:
                usage = int(line.rpartition('"completion_tokens":')[2].split(",")[0].rstrip("}"))
    return usage, first
