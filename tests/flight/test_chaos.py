"""Servers killed and started again under load: the small edition of `python -m benchmarks flights`."""

from __future__ import annotations

from benchmarks.flights import Plan, measure


def test_servers_are_killed_and_nobody_gets_a_wrong_a_cut_or_no_answer() -> None:
    # A server that stands still for longer than its lease is taken over like a dead one: that is not asked here.
    found = measure(Plan(calls=500, keys=8, kills=2, seconds=12.0, clients=32, lease_s=4.0), seed=7)
    assert found.right == 500
    assert (found.wrong, found.truncated, found.errors) == (0, 0, 0)
    assert len(found.kills) == 2
    assert len(found.generations) == 8
    assert found.unexplained == 0, "a key is generated once, and once more per takeover"
