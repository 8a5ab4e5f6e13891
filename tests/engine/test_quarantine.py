"""Who is kept out after an engine's death, and when an engine hangs: by counting, without an engine."""

from __future__ import annotations

import pytest

from app.engine.quarantine import MOST_DEATHS, Quarantine
from app.engine.watch import Watch
from app.errors import Quarantined


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_stands_at_the_same_token_at_two_deaths_is_kept_out_for_a_while() -> None:
    clock = Clock()
    quarantine = Quarantine(100, clock)
    assert not quarantine.died("guilty", 7)
    assert not quarantine.died("bystander", 7)
    quarantine.check("guilty")
    assert quarantine.died("guilty", 7)
    assert not quarantine.died("bystander", 8)
    with pytest.raises(Quarantined) as refused:
        quarantine.check("guilty")
    assert refused.value.headers["retry-after"] == "100"
    quarantine.check("bystander")
    assert len(quarantine) == 1
    clock.now = 101
    quarantine.check("guilty")
    assert len(quarantine) == 0


def test_who_makes_again_what_it_had_and_is_elsewhere_at_the_next_death_is_innocent() -> None:
    quarantine = Quarantine(100)
    assert not quarantine.died("replaying", 400)
    assert not quarantine.died("replaying", 100)
    assert quarantine.died("replaying", 100)


def test_who_came_to_its_end_is_innocent() -> None:
    quarantine = Quarantine(100)
    quarantine.died("call", 3)
    quarantine.ended("call")
    assert not quarantine.died("call", 3)


def test_however_far_it_comes_a_call_costs_an_engine_so_often_and_not_more() -> None:
    quarantine = Quarantine(100)
    assert [quarantine.died("call", tokens) for tokens in range(MOST_DEATHS)] == [False] * (MOST_DEATHS - 1) + [True]


def test_without_a_time_nobody_is_kept_out_and_a_probe_never_is() -> None:
    off, on = Quarantine(0), Quarantine(100)
    assert not any(off.died("call", 1) for _ in range(9))
    assert not any(on.died("", 1) for _ in range(9))


def looks(
    watch: Watch, seconds: int, *, cpu_s: float | None = 0.0, step: int = 1, per_look_s: float = 0.0
) -> int | None:
    """After how many looks something is wrong, while no step ends."""
    for number in range(seconds):
        cpu = None if cpu_s is None else cpu_s + number * per_look_s
        if watch.look(steps=step, has_calls=True, cpu_s=cpu):
            return number
    return None


def test_a_core_that_does_nothing_hangs_and_one_that_computes_has_longer() -> None:
    assert looks(Watch(5, 60), 20) in (5, 6)
    assert looks(Watch(5, 60), 50, per_look_s=1.0) is None
    assert looks(Watch(5, 60), 70, per_look_s=1.0) in (60, 61)
    assert looks(Watch(5, 60), 50, cpu_s=None) is None, "waiting for a disk is work"
    assert looks(Watch(0, 0), 1000) is None


def test_a_core_without_calls_or_with_steps_is_well() -> None:
    watch = Watch(5, 60)
    assert all(watch.look(steps=0, has_calls=False, cpu_s=0.0) is None for _ in range(100))
    assert all(watch.look(steps=step, has_calls=True, cpu_s=0.0) is None for step in range(1, 100))
