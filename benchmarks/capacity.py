"""From one replica's measured figures to 10, 100 and 1,000: what Redis, weights and money come to, and what gives way.

Calls are drawn (seeded): which prompt, which replica, when. Recordings live in Redis for their time and hot ones in
each replica; a generation takes its time, and who asks for the same meanwhile follows it. Everything else is
multiplication of what was measured (`results/redis_cost.jsonl`, `LOG.md`) with what was drawn. `deploy/CAPACITY.md`
is this module's output; a test compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.flight.publisher import PUBLISH_GAP_S
from benchmarks.capacity_page import page
from benchmarks.report import RESULTS, Report

PHYSICS = """\
Engines add up. What they share does not: Redis executes on one thread, its network card is one, and so is the store
that weights come from. Traffic of misses grows with the replicas; that of telling every replica of every write grows
with their square."""

PAGE = Path(__file__).resolve().parents[1] / "deploy" / "CAPACITY.md"
REPLICAS = (10, 100, 1000)
SEED = 1

Cost = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class World:
    """What was measured of one replica, and what is assumed of the load and the surroundings (said in the page)."""

    # Measured here (LOG.md): the default model on two cores at 32 at a time; a hit's processor time.
    tokens_per_s: float = 704.0
    places: int = 32
    hit_cpu_us: float = 49.0
    # Assumed of the load: this share of calls asks what others ask too, by Zipf's law; all others ask something new.
    repeated: float = 0.6
    prompts: int = 1_000_000
    exponent: float = 1.1
    answer_tokens: int = 200
    engine_load: float = 0.7
    ttl_s: float = 86_400.0
    near_mib: float = 64.0
    # Assumed of the surroundings.
    redis_full: float = 0.7
    network_bytes_per_s: float = 1.25e9
    weights_bytes: float = 16e9
    store_bytes_per_s: float = 12.5e9
    nfs_bytes_per_s: float = 1.25e9
    load_s: float = 20.0
    replica_per_hour: float = 0.10
    redis_per_hour: float = 0.30

    @property
    def answer_s(self) -> float:
        """How long one answer is under way where all places are taken."""
        return self.answer_tokens * self.places / self.tokens_per_s

    @property
    def publishes(self) -> float:
        """Writes of one live stream: a token each, or what came in PUBLISH_GAP_S."""
        return min(self.answer_tokens, self.answer_s / PUBLISH_GAP_S)

    @property
    def misses_per_s(self) -> float:
        """That one replica generates at its planned load."""
        return self.engine_load * self.tokens_per_s / self.answer_tokens


@dataclass(frozen=True, slots=True)
class Drawn:
    """Shares of all calls, and how many shared a generation: `fan_in` on the average, `most` at the most."""

    near: float
    far: float
    shared_here: float
    shared_elsewhere: float
    miss: float
    fan_in: float
    most: int


@dataclass(frozen=True, slots=True)
class Grown:
    """So many replicas at their planned load. Rates are per second."""

    replicas: int
    drawn: Drawn
    cold: Drawn
    calls: float
    round_trips: float
    bytes_in: float
    bytes_out: float
    redis_cpu: float
    wait_us: float
    told_cpu: float
    told_bytes: float
    memory_bytes: float
    hit_core_share: float
    swap_store_s: float
    swap_nfs_s: float
    per_million: float
    per_million_without: float


def run(*, quick: bool, rounds: int | None, save: bool, seed: int = SEED) -> dict[str, Any]:
    del quick, rounds
    report = Report("capacity", PHYSICS, {"seed": seed})
    grown = simulated(seed)
    rows = [
        [name, *(getattr(each, name) for each in grown)] for name in Grown.__slots__ if name not in {"drawn", "cold"}
    ]
    report.table("at so many replicas", ["", *(str(each.replicas) for each in grown)], rows)
    if save:
        PAGE.write_text(rendered(seed))
    return report.finish(save=False, results=[{"replicas": each.replicas, "calls": each.calls} for each in grown])


def measured() -> dict[str, Cost]:
    """The newest measurement of what calls cost Redis."""
    return dict(json.loads((RESULTS / "redis_cost.jsonl").read_text().splitlines()[-1])["results"])


def rendered(seed: int = SEED) -> str:
    """The page."""
    world, costs, grown = World(), measured(), simulated(seed)
    live_share = 1 - costs["short miss"]["cpu_us"] / miss_cost(world, costs, "cpu_us")
    return page(world, costs, grown, limits(world, costs, grown[-1]), live_share=live_share, seed=seed)


def simulated(seed: int = SEED, world: World | None = None) -> list[Grown]:
    world, costs = world or World(), measured()
    return [grow(world, costs, count, seed) for count in REPLICAS]


# What is drawn


def popularity(world: World) -> np.ndarray:
    """The probability of each prompt among the calls that ask what others ask."""
    weights = np.arange(1, world.prompts + 1, dtype=float) ** -world.exponent
    return weights / weights.sum()


def kept_share(world: World, calls_per_s: float) -> float:
    """Of the repeated calls, how many find a recording that lives `ttl_s`: the closed form.

    A recording is made by a miss and lives T; the calls for it are a Poisson process of rate r, so rT of 1 + rT calls
    find it (Jung, Berger, Balakrishnan, "Modeling TTL-based Internet caches", INFOCOM 2003).
    """
    chance = popularity(world)
    asked = chance * calls_per_s * world.repeated * world.ttl_s
    return float((chance * asked / (1 + asked)).sum())


def calls_at(world: World, replicas: int) -> float:
    """The calls/s at which the engines generate what is planned: what is recorded costs them nothing."""
    wanted, low, high = world.misses_per_s * replicas, 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        missed = middle * (1 - world.repeated * kept_share(world, middle)) if middle else 0.0
        low, high = (middle, high) if missed < wanted else (low, middle)
    return low


def near_chance(world: World, calls_per_s: float, entries: float) -> np.ndarray:
    """How likely one replica that is asked so often holds each prompt: Che's approximation of an LRU cache.

    All prompts stay for the same time t, for which sum(1 - exp(-r t)) is the number of places (Che, Tung, Wang,
    "Hierarchical web caching systems", IEEE JSAC 20(7), 2002).
    """
    rates = popularity(world) * calls_per_s * world.repeated
    if entries >= world.prompts:
        return np.ones(world.prompts)
    low, high = 0.0, 1e12
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-rates * middle).sum() < entries else (low, middle)
    return -np.expm1(-rates * low)


def draw(
    world: World,
    replicas: int,
    calls_per_s: float,
    near_entries: float,
    seed: int,
    *,
    calls: int = 100_000,
    is_cold: bool = False,
) -> Drawn:
    """So many calls to a Redis that is in balance, or holds nothing yet: what each finds, and whom it flies with."""
    rng = np.random.default_rng(seed)
    chance = popularity(world)
    at = np.cumsum(rng.exponential(1 / calls_per_s, calls))
    prompts = np.minimum(np.searchsorted(np.cumsum(chance), rng.random(calls)), world.prompts - 1)
    is_new = rng.random(calls) >= world.repeated
    is_near = rng.random(calls) < near_chance(world, calls_per_s / replicas, near_entries)[prompts]
    where = rng.integers(replicas, size=calls)
    asked = chance * calls_per_s * world.repeated * world.ttl_s
    is_kept = rng.random(world.prompts) < (0.0 if is_cold else asked / (1 + asked))
    until = np.where(is_kept, rng.random(world.prompts) * world.ttl_s, 0.0)
    return _played(world, at, prompts, where, is_new, is_near, until)


def _played(
    world: World,
    at: np.ndarray,
    prompts: np.ndarray,
    where: np.ndarray,
    is_new: np.ndarray,
    is_near: np.ndarray,
    until: np.ndarray,
) -> Drawn:
    """`until` says for each prompt when its recording expires; flights are {prompt: [its end, its replica, aboard]}."""
    counts = dict.fromkeys(("near", "far", "shared_here", "shared_elsewhere", "miss"), 0)
    flights: dict[int, list[Any]] = {}
    aboard: list[int] = []
    for now, prompt, replica, new, near in zip(at, prompts, where, is_new, is_near, strict=True):
        flight = None if new else flights.get(prompt)
        if flight is not None and now < flight[0]:
            flight[2] += 1
            counts["shared_here" if flight[1] == replica else "shared_elsewhere"] += 1
        elif not new and now < until[prompt]:
            counts["near" if near else "far"] += 1
        else:
            counts["miss"] += 1
            if not new:
                aboard += [flight[2]] if flight else []
                flights[prompt] = [now + world.answer_s, replica, 1]
                until[prompt] = now + world.answer_s + world.ttl_s
    aboard += [flight[2] for flight in flights.values()]
    shares = {name: count / len(at) for name, count in counts.items()}
    return Drawn(**shares, fan_in=sum(aboard) / max(1, len(aboard)), most=max(aboard, default=0))


# What it comes to


def grow(world: World, costs: Mapping[str, Cost], replicas: int, seed: int) -> Grown:
    calls = calls_at(world, replicas)
    recording = costs["recording"]["memory_bytes"]
    entries = near_entries(world, recording)
    drawn = draw(world, replicas, calls, entries, seed)
    # Other weights have other keys: nothing is recorded for them, and engines cannot keep up for a while.
    cold = draw(world, replicas, calls, entries, seed, calls=round(calls * world.answer_s), is_cold=True)
    spent = {name: traffic(world, costs, drawn, calls, replicas, name) for name in costs["far hit"]}
    writes, told = calls * drawn.miss, costs["replica told of a write"]
    redis_cpu = (spent["cpu_us"] + writes * replicas * told["cpu_us"]) / 1e6
    paid = replicas * world.replica_per_hour + world.redis_per_hour
    generated = calls / world.misses_per_s * world.replica_per_hour
    return Grown(
        replicas=replicas,
        drawn=drawn,
        cold=cold,
        calls=calls,
        round_trips=spent["round_trips"],
        bytes_in=spent["bytes_in"],
        bytes_out=spent["bytes_out"] + writes * replicas * told["bytes_out"],
        redis_cpu=redis_cpu,
        wait_us=waiting_us(redis_cpu * 1e6 / spent["round_trips"], redis_cpu),
        told_cpu=writes * replicas * told["cpu_us"] / 1e6,
        told_bytes=writes * replicas * told["bytes_out"],
        memory_bytes=writes * world.ttl_s * recording,
        hit_core_share=calls / replicas * (drawn.near + drawn.far) * world.hit_cpu_us / 1e6,
        swap_store_s=swap_s(world, replicas, world.store_bytes_per_s),
        swap_nfs_s=swap_s(world, replicas, world.nfs_bytes_per_s),
        per_million=paid / (calls * 3600) * 1e6,
        per_million_without=generated / (calls * 3600) * 1e6,
    )


def near_entries(world: World, recording_bytes: float) -> float:
    """How many recordings a replica holds itself; each costs its bytes and the objects around (`cache/near.py`)."""
    return world.near_mib * 2**20 / (1500 + recording_bytes)


def miss_cost(world: World, costs: Mapping[str, Cost], name: str) -> float:
    """Of one miss: what a short one costs, and each further write of its live stream."""
    short, long = costs["short miss"], costs["long miss"]
    # Few bytes come back from either, and noise between them must not count as less than none.
    each = max(0.0, long[name] - short[name]) / (long["evals"] - short["evals"])
    return short[name] + each * world.publishes


def traffic(world: World, costs: Mapping[str, Cost], drawn: Drawn, calls: float, replicas: int, name: str) -> float:
    """A second's, without what replicas are told of writes."""
    follower = costs["miss with a follower elsewhere"][name] - costs["long miss"][name]
    # A follower reads as long as the answer is under way.
    longer = world.publishes / (costs["long miss"]["evals"] - costs["short miss"]["evals"])
    each = drawn.miss * miss_cost(world, costs, name) + drawn.far * costs["far hit"][name]
    each += drawn.shared_elsewhere * max(0.0, follower) * longer
    return calls * each + replicas * costs["idle replica, a second"][name]


def swap_s(world: World, replicas: int, all_bytes_per_s: float) -> float:
    """Until all serve other weights, if all pull at once: the store's pace or a replica's own, then loading."""
    pulled = max(replicas * world.weights_bytes / all_bytes_per_s, world.weights_bytes / world.network_bytes_per_s)
    return pulled + world.load_s


def waiting_us(service_us: float, load: float) -> float:
    """The mean wait for a single server with random arrivals and services (M/M/1: load / (1 - load) services)."""
    return math.inf if load >= 1 else service_us * load / (1 - load)


def most_replicas(per_replica: float, per_pair: float, bound: float) -> float:
    """The N at which `per_replica` N + `per_pair` N^2 reaches the bound."""
    if per_pair == 0:
        return bound / per_replica
    return (math.sqrt(per_replica**2 + 4 * per_pair * bound) - per_replica) / (2 * per_pair)


def limits(world: World, costs: Mapping[str, Cost], grown: Grown) -> dict[str, float]:
    """How many replicas one Redis bears, by what gives way; from the traffic at the largest size drawn."""
    count = grown.replicas
    far = replaced_near(grown.drawn)
    found = {}
    for what, name, bound in (
        ("processor", "cpu_us", world.redis_full * 1e6),
        ("network out", "bytes_out", world.redis_full * world.network_bytes_per_s),
        ("network in", "bytes_in", world.redis_full * world.network_bytes_per_s),
    ):
        one = traffic(world, costs, grown.drawn, grown.calls, count, name) / count
        pair = grown.calls * grown.drawn.miss / count * costs["replica told of a write"][name]
        found[what] = most_replicas(one, pair, bound)
        asking = traffic(world, costs, far, grown.calls, count, name) / count
        found[f"{what}, near tier off"] = most_replicas(asking, 0.0, bound)
    return found


def replaced_near(drawn: Drawn) -> Drawn:
    """The same, with all hits asking Redis."""
    return replace(drawn, near=0.0, far=drawn.near + drawn.far)
