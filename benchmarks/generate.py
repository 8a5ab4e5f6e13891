"""Generation load in our own process: distinct chat prompts, streamed, C at a time, as `vllm bench serve` sends them.

For trials of many settings, where the 8 seconds that vLLM's own client needs to start would outweigh the measurement.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import Any

import aiohttp

_WORDS = [first + last for first in ("river", "stone", "paper", "silver", "winter") for last in ("side", "gate", "man")]
_PROMPT_WORDS = 24  # about 64 tokens


def measure(
    url: str, model: str, *, concurrency: int, prompts: int, tokens: int, timeout_s: float = 600
) -> dict[str, float]:
    """Output tokens/s and the median time to the first token; every answer must have all its tokens."""
    return asyncio.run(asyncio.wait_for(_measure(url, model, concurrency, prompts, tokens), timeout_s))


async def _measure(url: str, model: str, concurrency: int, prompts: int, tokens: int) -> dict[str, float]:
    slots = asyncio.Semaphore(concurrency)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(None)) as client:

        async def one() -> float:
            async with slots:
                return await _ask(client, model, tokens)

        began = time.perf_counter()
        firsts_s = await asyncio.gather(*(one() for _ in range(prompts)))
        took_s = time.perf_counter() - began
    return {"tokens_per_s": prompts * tokens / took_s, "ttft_p50_ms": statistics.median(firsts_s) * 1000}


async def _ask(client: aiohttp.ClientSession, model: str, tokens: int) -> float:
    """Seconds to the first token of one call."""
    call: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(random.choices(_WORDS, k=_PROMPT_WORDS))}],
        "max_completion_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first_s, produced = time.perf_counter(), 0.0, 0
    async with client.post("/v1/chat/completions", json=call) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and not first_s:
                first_s = time.perf_counter() - began
            produced = (event.get("usage") or {}).get("completion_tokens", produced)
    assert produced == tokens, f"{produced} of {tokens} tokens came"
    return first_s
