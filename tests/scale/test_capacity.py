"""The arithmetic of growth, against closed forms and a small real measurement; and the page, against the arithmetic."""

from __future__ import annotations

import math
import tempfile
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capacity, redis_cost
from benchmarks.capacity import World
from tests.conftest import PATIENCE_S, RedisServer

# Prompts few enough to come again within a drawing.
SMALL = World(prompts=2000, ttl_s=40.0, answer_tokens=1, repeated=0.8)


@pytest.fixture(scope="module")
def rendered() -> str:
    return capacity.rendered()


def test_the_page_is_what_the_seed_gives(rendered: str) -> None:
    assert capacity.PAGE.read_text() == rendered, "run `python -m benchmarks capacity --save`"


@pytest.mark.parametrize("ttl_s", [5.0, 40.0, 300.0])
def test_what_is_drawn_finds_as_many_recordings_as_the_closed_form_says(ttl_s: float) -> None:
    world = replace(SMALL, ttl_s=ttl_s)
    drawn = capacity.draw(world, 10, 100.0, 50, seed=7)
    found = (drawn.near + drawn.far + drawn.shared_here + drawn.shared_elsewhere) / world.repeated
    assert found == pytest.approx(capacity.kept_share(world, 100.0), abs=0.015)
    assert drawn.near + drawn.far + drawn.shared_here + drawn.shared_elsewhere + drawn.miss == pytest.approx(1)


def test_what_a_replica_holds_is_what_a_least_recently_used_memory_holds() -> None:
    world, entries = replace(SMALL, repeated=1.0), 200
    asked = np.random.default_rng(3).choice(world.prompts, 60_000, p=capacity.popularity(world))
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, prompt in enumerate(asked.tolist()):
        hits += number >= 20_000 and prompt in held
        held.pop(prompt, None)
        held[prompt] = None
        if len(held) > entries:
            held.popitem(last=False)
    expected = (capacity.popularity(world) * capacity.near_chance(world, 10.0, entries)).sum()
    assert hits / 40_000 == pytest.approx(expected, abs=0.015)


def test_calls_for_one_generation_are_those_that_come_while_it_is_under_way() -> None:
    """One prompt, asked r times a second, that is never recorded: 1 + r x its seconds aboard each flight."""
    world = World(prompts=1, ttl_s=1e-9, answer_tokens=22, repeated=1.0)
    drawn = capacity.draw(world, 4, 10.0, 1, seed=5, calls=50_000)
    assert drawn.fan_in == pytest.approx(1 + 10.0 * world.answer_s, rel=0.05)
    assert drawn.shared_here / drawn.shared_elsewhere == pytest.approx(1 / 3, rel=0.05)


def test_the_wait_at_a_thread_is_that_of_a_queue_that_is_played() -> None:
    """Lindley's recursion: each waits for what the one before it still has to wait and to be served."""
    rng, service, load = np.random.default_rng(11), 20.0, 0.6
    between, served = rng.exponential(service / load, 400_000), rng.exponential(service, 400_000)
    wait, total = 0.0, 0.0
    for gap, took in zip(between.tolist(), served.tolist(), strict=True):
        total += wait
        wait = max(0.0, wait + took - gap)
    assert total / 400_000 == pytest.approx(capacity.waiting_us(service, load), rel=0.1)
    assert capacity.waiting_us(service, 1.0) == math.inf


def test_engines_generate_what_was_planned_at_the_calls_that_are_found() -> None:
    world = World()
    for replicas in capacity.REPLICAS:
        calls = capacity.calls_at(world, replicas)
        missed = calls * (1 - world.repeated * capacity.kept_share(world, calls))
        assert missed == pytest.approx(world.misses_per_s * replicas, rel=1e-6)


@pytest.mark.parametrize(("one", "pair"), [(3.0, 0.0), (3.0, 0.25), (1e-9, 2.0)])
def test_the_bound_is_reached_at_the_number_of_replicas_that_is_told(one: float, pair: float) -> None:
    count = capacity.most_replicas(one, pair, 700.0)
    assert one * count + pair * count**2 == pytest.approx(700.0)


def test_weights_come_at_the_stores_pace_or_at_a_replicas_own() -> None:
    world = World(weights_bytes=10e9, network_bytes_per_s=1e9, load_s=5)
    assert capacity.swap_s(world, 1, 100e9) == 15
    assert capacity.swap_s(world, 100, 100e9) == 15
    assert capacity.swap_s(world, 1000, 100e9) == 105


async def test_what_is_multiplied_is_what_redis_counts_now() -> None:
    """A few calls to two real replicas: the same kinds of traffic, of the same order as the figures that are kept."""
    kept = capacity.measured()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        redis = RedisServer(logs)
        redis.start()
        stack.callback(redis.stop)
        # Those that are followed are long, so that a follower that comes late still finds them under way.
        patience = {"REFRAIN_REDIS_TIMEOUT_S": str(PATIENCE_S)}
        found = await redis_cost.measure_on(stack, logs, redis.url, calls=5, followed=200, **patience)
    assert found["near hit"]["mgets"] == 0, "what a replica holds asks nobody"
    assert found["far hit"]["mgets"] > 0
    # How many there are of a miss is up to the pace of this machine, but not more than one for each token and a few.
    assert 2 * kept["long miss"]["evals"] > found["long miss"]["evals"] > found["short miss"]["evals"] > 0
    for each in (found, kept):
        each["long miss"]["bytes_in"] /= each["long miss"]["evals"]
    for kind, name in (
        ("long miss", "bytes_in"),
        ("recording", "memory_bytes"),
        ("replica told of a write", "bytes_out"),
    ):
        assert found[kind][name] == pytest.approx(kept[kind][name], rel=0.5), (kind, name)
