"""Servers killed and started again under load: the small edition of `python -m benchmarks flights`."""

from __future__ import annotations

from benchmarks.flights import Plan, measure


def test_servers_are_killed_and_nobody_gets_a_wrong_a_cut_or_no_answer() -> None:
    found = measure(Plan(calls=500, keys=8, kills=2, seconds=12.0, clients=32), seed=7)
    assert found.right == 500
    assert (found.wrong, found.truncated, found.errors) == (0, 0, 0)
    assert len(found.kills) == 2
    assert len(found.generations) == 8
    assert found.unexplained == 0, "a key is generated once, and once more per takeover"
