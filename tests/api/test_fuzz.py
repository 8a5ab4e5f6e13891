"""A few seconds of what `python -m benchmarks fuzz` does for minutes, the same inputs each time."""

from __future__ import annotations

import time

import pytest

from benchmarks.fuzz_child import mutated
from benchmarks.fuzz_targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_small_faults_in_good_inputs_are_refused_and_break_nothing(target: str) -> None:
    assert mutated(target, seed=7, count=20_000, until=time.monotonic() + 10) > 1_000
