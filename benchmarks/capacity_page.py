"""`deploy/CAPACITY.md` from the figures of `capacity`; no figure in it is written by hand."""

# ruff: noqa: E501 - the lines of a page, which is wider

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from app.flight.publisher import PUBLISH_GAP_S

if TYPE_CHECKING:
    from benchmarks.capacity import Cost, Grown, World

_KINDS = ("short miss", "long miss", "miss with a follower elsewhere", "far hit", "near hit")
_KINDS += ("idle replica, a second", "replica told of a write")


def page(
    world: World,
    costs: Mapping[str, Cost],
    grown: Sequence[Grown],
    limits: Mapping[str, float],
    *,
    live_share: float,
    seed: int,
) -> str:
    """`live_share`: of a miss's cost in Redis's processor time, what its live stream takes."""
    parts = (
        _opening(world, seed),
        _measured(costs),
        _grown(grown),
        _limits(world, limits),
        _advice(world, costs, grown, live_share),
    )
    return "\n".join(part.rstrip() + "\n" for part in parts)


def rounded(value: float) -> str:
    """Two significant figures: no more is known."""
    if math.isinf(value):
        return "no end"
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _opening(world: World, seed: int) -> str:
    return f"""\
# How far it grows

Made by `python -m benchmarks capacity --save` (seed {seed}) from what was measured of one replica; nothing here was run at this
size. Two significant figures are shown, and not even the second is sure. Replace the assumptions with your own (`World` in
`benchmarks/capacity.py`) before you believe it.

**Measured**: {rounded(world.tokens_per_s)} tokens/s of a replica at {world.places} calls at a time and {world.hit_cpu_us:g} µs of a processor for a hot hit
(two cores, the default model, `benchmarks/LOG.md`); what calls cost Redis (below, `python -m benchmarks redis_cost`).

**Assumed of the load**: {world.repeated:.0%} of the calls ask one of {world.prompts:,} prompts by Zipf's law with exponent {world.exponent:g}, the others what
nobody asked before; {world.answer_tokens} tokens in an answer; engines {world.engine_load:.0%} busy; recordings live {world.ttl_s / 3600:g} h; {world.near_mib:g} MiB for hot ones in each replica.

**Assumed of the surroundings**: Redis on a core like the measured one, full at {world.redis_full:.0%}; {world.network_bytes_per_s * 8 / 1e9:g} Gbit/s for each machine; {world.weights_bytes / 1e9:g} GB of weights
from an object store that gives {world.store_bytes_per_s * 8 / 1e9:g} Gbit/s in all, or from one NFS server at {world.nfs_bytes_per_s * 8 / 1e9:g}; {world.load_s:g} s to load them; ${world.replica_per_hour:.2f} an hour
for a replica and ${world.redis_per_hour:.2f} for Redis.
"""


def _measured(costs: Mapping[str, Cost]) -> str:
    names = {"commands": "commands", "round_trips": "round trips", "bytes_in": "bytes in", "bytes_out": "bytes out"}
    names |= {"cpu_us": "processor, µs"}
    rows = [[kind, *(rounded(costs[kind][name]) for name in names)] for kind in _KINDS]
    return f"""\
## What a call costs Redis

{_table(["one", *names.values()], rows)}

A short miss has 1 token, a long one 60 over 1.5 s, so their difference is the live stream: {rounded(costs["long miss"]["evals"])} scripts against {rounded(costs["short miss"]["evals"])}. A
recording of the long one takes {rounded(costs["recording"]["memory_bytes"])} bytes. Commands count those inside scripts.
"""


def _grown(grown: Sequence[Grown]) -> str:
    def row(title: str, *values: float | str) -> list[str]:
        return [title, *(value if isinstance(value, str) else rounded(value) for value in values)]

    drawn, cold = [each.drawn for each in grown], [each.cold for each in grown]
    rows = [
        row("calls/s", *(each.calls for each in grown)),
        row("... hits held by the replica", *(f"{each.near:.1%}" for each in drawn)),
        row("... hits from Redis", *(f"{each.far:.1%}" for each in drawn)),
        row("... shared with a generation, here", *(f"{each.shared_here:.2%}" for each in drawn)),
        row("... shared, elsewhere", *(f"{each.shared_elsewhere:.2%}" for each in drawn)),
        row("... misses", *(f"{each.miss:.1%}" for each in drawn)),
        row("calls for one generation that others may share", *(f"{each.fan_in:.2f}" for each in drawn)),
        row("... as long as an answer takes after other weights came", *(f"{each.fan_in:.2f}" for each in cold)),
        row("... at the most, then", *(str(each.most) for each in cold)),
        row("... misses, then", *(f"{each.miss:.0%}" for each in cold)),
        row("Redis: round trips/s", *(each.round_trips for each in grown)),
        row("... MB/s in", *(each.bytes_in / 1e6 for each in grown)),
        row("... MB/s out", *(each.bytes_out / 1e6 for each in grown)),
        row("... of that, telling replicas of writes", *(each.told_bytes / 1e6 for each in grown)),
        row("... cores wanted", *(each.redis_cpu for each in grown)),
        row("... of that, telling replicas of writes", *(each.told_cpu for each in grown)),
        row("... mean wait for its thread, µs", *(each.wait_us for each in grown)),
        row("... GB if all were kept", *(each.memory_bytes / 1e9 for each in grown)),
        row("a replica's core, taken by hits", *(f"{each.hit_core_share:.2%}" for each in grown)),
        row("other weights everywhere, s, object store", *(each.swap_store_s for each in grown)),
        row("... one NFS server", *(each.swap_nfs_s for each in grown)),
        row("$ per million calls", *(each.per_million for each in grown)),
        row("... if every call were generated", *(each.per_million_without for each in grown)),
    ]
    return f"## What it comes to\n\n{_table(['replicas', *(str(each.replicas) for each in grown)], rows)}\n"


def _limits(world: World, limits: Mapping[str, float]) -> str:
    bounds = ("processor", "network out", "network in")
    rows = [[what, rounded(limits[what]), rounded(limits[f"{what}, near tier off"])] for what in bounds]
    first = min(bounds, key=lambda what: limits[what])
    return f"""\
## How many replicas one Redis bears

{_table([f"full at {world.redis_full:.0%}", "replicas", "with `REFRAIN_CACHE_NEAR_MIB=0`"], rows)}

First to give way: Redis's **{first}**. These figures take the hit shares of the largest size drawn.
"""


def _advice(world: World, costs: Mapping[str, Cost], grown: Sequence[Grown], live_share: float) -> str:
    gap_ms = PUBLISH_GAP_S * 1000
    largest = grown[-1]
    told = largest.told_cpu / largest.redis_cpu
    return f"""\
## What gives way, and what to do then

1. **Memory, at any size.** What nobody asks again fills Redis: {rounded(grown[0].memory_bytes / 1e9)} GB a day from {grown[0].replicas} replicas. The {world.prompts:,} prompts that are asked again take
   {rounded(world.prompts * costs["recording"]["memory_bytes"] / 1e9)} GB at most. Set `maxmemory` to a few times that with `volatile-lfu` (as the compose file does), or a shorter `REFRAIN_CACHE_TTL_S`.
2. **The minute after other weights came**: their keys are others, so nothing is recorded. Misses are {largest.cold.miss:.0%} of the calls instead of {largest.drawn.miss:.0%}, and one prompt gathers up to
   {largest.cold.most:,} calls aboard one generation at {largest.replicas} replicas; without flights each of them would be one more generation. Swap when load is low, or keep replicas in reserve.
3. **Weights from one NFS server**: {rounded(largest.swap_nfs_s / 60)} minutes for {largest.replicas} replicas, {rounded(largest.swap_store_s / 60)} from an object store. Pull to local disks first and move the pointer when all
   have them; a swap is then the loading alone.
4. **Redis's thread**: it wants {rounded(largest.redis_cpu)} cores at {largest.replicas} replicas, {told:.0%} of that to tell each replica of each write, which grows with the square.
   Then switch the near tier off (`REFRAIN_CACHE_NEAR_MIB=0`): a hit is one question to Redis and nobody is told. Beyond that a Redis Cluster (`REFRAIN_REDIS_CLUSTER=true`), where the near
   tier is off by itself, divides keys and live streams among its nodes; or a Redis for each group of replicas, with tenants kept to a group, which keeps the near tier.
5. **Live streams** take {live_share:.0%} of what a miss costs Redis's processor: a script every {gap_ms:g} ms while the answer is under way, whether or not anybody follows. They are what lets others
   follow, and resume; they are also why answers that take long cost Redis more than long answers.
6. **Replicas' own processors** hardly notice hits at this load. Where they do, `REFRAIN_HTTP_WORKERS` gives them more processes; each of those is one more that is told of writes.

Not in these figures: limits and budgets of keys (one script per call of a limited key), encryption, TLS, replication of Redis, bursts (arrivals are Poisson), queues at the engines, a
balancer that sends equal prompts to one replica (the near tier would then hold more), and other models: a faster engine makes more misses a second, and all limits come sooner in proportion.
"""
