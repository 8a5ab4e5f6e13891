"""Scripts are sent to a server once, and again to one that has forgotten them."""

from __future__ import annotations

from pathlib import Path

import redis.asyncio

from app.cache.scripts import Scripts
from tests.conftest import RedisServer


async def test_the_source_is_sent_once_and_again_after_a_restart(tmp_path: Path, own_redis: RedisServer) -> None:
    (tmp_path / "common.lua").write_text("local prefix = 'seen '\n")
    (tmp_path / "tell.lua").write_text("return prefix .. KEYS[1] .. ARGV[1]")
    scripts = Scripts(tmp_path)
    client = redis.asyncio.Redis.from_url(own_redis.url, retry=None)

    async def sources_sent() -> int:
        told = await client.info("commandstats")
        return int(told.get("cmdstat_eval", {}).get("calls", 0))

    for number in range(3):
        assert await scripts.run(client, "tell", ["k"], [number]) == f"seen k{number}".encode()
    assert await sources_sent() == 1
    await client.script_flush()
    assert await scripts.run(client, "tell", ["k"], [3]) == b"seen k3"
    assert await sources_sent() == 2
    await client.aclose()
