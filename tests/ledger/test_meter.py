"""Whose the engine's time is."""

from __future__ import annotations

import random

import pytest

from app.domain import Timings
from app.engine.meter import Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_divided_by_the_tokens_computed_in_it() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    asking, going_on = Timings(), Timings()
    clock.now = 110.0
    for _ in range(2):
        meter.begin()
    meter.step([(asking, 30), (going_on, 10)], at=114.0)
    assert (asking.device_s, going_on.device_s) == (3.0, 1.0)
    meter.step([(going_on, 1)], at=115.0)  # the other waits in the engine's queue: it pays nothing
    assert (asking.device_s, going_on.device_s) == (3.0, 2.0)
    clock.now = 120.0
    meter.end(asking)
    meter.end(going_on, at=115.0)  # it was finished by then; our loop heard of it later
    assert meter.busy_s == 5.0
    assert meter.idle_s == 15.0


def test_what_the_last_call_had_begun_when_its_client_left_is_its_own() -> None:
    clock = Clock()
    meter, left = Meter(clock=clock), Timings()
    meter.begin()
    clock.now = 102.5
    meter.end(left)
    assert left.device_s == meter.busy_s == 2.5


def test_each_device_of_an_engine_counts() -> None:
    clock = Clock()
    meter, call = Meter(devices=4, clock=clock), Timings()
    meter.begin()
    meter.step([(call, 1)], at=101.0)
    clock.now = 102.0
    meter.end(call, at=101.0)
    assert (call.device_s, meter.busy_s, meter.idle_s) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_the_calls_used_what_the_engine_was_busy(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    meter, running, calls, wall_s = Meter(clock=clock), [], [], 0.0
    for _ in range(400):
        passed = chance.random()
        clock.now += passed
        wall_s += passed if running else 0.0
        match chance.randrange(4):
            case 0:
                running.append(Timings())
                calls.append(running[-1])
                meter.begin()
            case 1 if running:
                meter.end(running.pop(chance.randrange(len(running))))
            case _ if running:
                meter.step([(each, chance.randint(1, 40)) for each in chance.sample(running, k=len(running) // 2)])
    while running:
        meter.end(running.pop())
    assert sum(call.device_s for call in calls) == pytest.approx(meter.busy_s)
    assert meter.busy_s == pytest.approx(wall_s)
