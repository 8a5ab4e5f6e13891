"""The smaller memories of a process: bounded in bytes, and what they push out is counted."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from app.cache import refusals
from app.cache.refusals import Refusals
from app.errors import BadCall
from app.observe import metrics
from app.observe.bounded import Brief, Recent


def shown(name: str, memory: str) -> float:
    families = text_string_to_metric_families(metrics.exposition({}).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if sample.labels["memory"] == memory)


def test_what_is_pushed_out_is_counted_and_what_is_held_is_shown() -> None:
    first, second = Recent("test-recent", 1000, len), Brief("test-recent", 1000, 60, len)
    for memory in (first, second):
        for number in range(30):
            memory[number] = "x" * 100
    assert shown("refrain_memory_bytes", "test-recent") == 2000
    assert shown("refrain_memory_evicted_total", "test-recent") == 40
    del memory, second
    assert shown("refrain_memory_bytes", "test-recent") == 1000, "what is gone is not shown any more"


def test_what_has_had_its_time_was_not_pushed_out() -> None:
    brief = Brief("test-brief", 1000, 60, len)
    brief[1] = "x" * 100
    brief.expire(brief.timer() + 30)
    assert brief.currsize == 100
    brief.expire(brief.timer() + 61)
    assert brief.currsize == 0
    brief[2] = "x" * 100
    assert (brief.currsize, shown("refrain_memory_evicted_total", "test-brief")) == (100, 0)


def test_refusals_are_bounded_by_their_bytes() -> None:
    held = shown("refrain_memory_bytes", "refusals")  # by servers that this process had before
    known, before = Refusals(60), shown("refrain_memory_evicted_total", "refusals")
    for number in range(100):
        known.remember(str(number), BadCall("x" * 100_000))
    assert shown("refrain_memory_bytes", "refusals") <= held + refusals.MEMORY_BYTES
    assert shown("refrain_memory_evicted_total", "refusals") > before
    known.remember("huge", BadCall("x" * 10_000_000))
    known.check("huge")
