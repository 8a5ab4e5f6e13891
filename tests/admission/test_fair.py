"""Whose call is next: a model of an engine that is asked one call after the other, with a clock that stands still."""

from __future__ import annotations

import pytest

from app.admission.fair import AGED_S, LATELY_S, Entry, FairQueue, Places
from app.admission.work import Work
from app.domain import Priority

BATCH, INTERACTIVE = Priority.BATCH, Priority.INTERACTIVE


@pytest.fixture
def queue() -> FairQueue:
    found = FairQueue()
    found.places = Places(sequences=1)
    return found


def call(
    tenant: str, prompt: int = 10, output: int = 10, *, priority: Priority = INTERACTIVE, since: float = 0.0
) -> Entry:
    return Entry(tenant, priority, Work(prompt, output), since, name=f"{tenant} {prompt} {output}")


def add(queue: FairQueue, *entries: Entry, now: float = 0.0) -> None:
    for entry in entries:
        queue.add(entry, now)


def served(queue: FairQueue, number: int, now: float = 0.0) -> list[Entry]:
    """One after the other enters, is done as expected, and leaves."""
    found = []
    while len(found) < number and (entry := queue.next(now)) is not None:
        queue.end(entry, now, entry.work.cost)
        found.append(entry)
    return found


def test_two_tenants_are_served_the_same_tokens_however_many_calls_they_have_waiting(queue: FairQueue) -> None:
    add(queue, *(call("flood", 50, 50) for _ in range(100)), *(call("other", 5, 20) for _ in range(100)))
    costs = {"flood": 0.0, "other": 0.0}
    for entry in served(queue, 60):
        costs[entry.tenant] += entry.work.cost
    assert abs(costs["flood"] - costs["other"]) <= 150, "they are apart by one call at most"


def test_a_tenant_is_charged_what_its_answer_cost_and_not_what_was_expected(queue: FairQueue) -> None:
    add(queue, *(call("long", 10, 10) for _ in range(3)), *(call("short", 10, 10) for _ in range(3)))
    first = queue.next(0)
    assert first is not None
    queue.end(first, 0, 500.0)
    other = "short" if first.tenant == "long" else "long"
    assert [each.tenant for each in served(queue, 3)] == [other] * 3


def test_idleness_saves_up_no_credit(queue: FairQueue) -> None:
    add(queue, *(call("busy") for _ in range(100)))
    served(queue, 50)
    add(queue, *(call("late") for _ in range(50)))
    tenants = [each.tenant for each in served(queue, 20)]
    assert 9 <= tenants.count("late") <= 11


def test_interactive_goes_before_batch_until_batch_has_waited_long(queue: FairQueue) -> None:
    add(queue, call("bulk", priority=BATCH, since=0.0), *(call("chat", since=1.0) for _ in range(3)))
    assert [each.tenant for each in served(queue, 1, now=2.0)] == ["chat"]
    add(queue, *(call("chat", since=AGED_S) for _ in range(20)), now=AGED_S)
    assert "bulk" in [each.tenant for each in served(queue, 4, now=AGED_S + 1)]


def test_a_batch_call_that_somebody_in_a_hurry_shares_becomes_interactive(queue: FairQueue) -> None:
    hurried = call("bulk", 11, priority=BATCH)
    add(queue, call("bulk", 12, priority=BATCH), hurried, call("chat", since=1.0))
    queue.hasten(hurried.name, 2.0)
    assert {each.work.prompt_tokens for each in served(queue, 2)} == {10, 11}
    assert queue.calls(BATCH) == 1


def test_a_tenant_alone_is_never_held_back(queue: FairQueue) -> None:
    queue.places = Places(sequences=16, kv_tokens=100, quantum=1)
    add(queue, *(call("alone", 500, 500) for _ in range(20)))
    entered = [queue.next(0) for _ in range(20)]
    assert sum(each is not None for each in entered) == 16


def test_while_others_are_there_a_flood_leaves_places_and_sends_one_prefill_at_a_time(queue: FairQueue) -> None:
    queue.places = Places(sequences=16, quantum=256)
    add(queue, call("quiet"), *(call("flood", 200) for _ in range(40)))
    first = [each for each in (queue.next(0) for _ in range(40)) if each is not None]
    assert sorted(each.tenant for each in first) == ["flood", "quiet"], "400 tokens are more than a quantum"
    running = [each for each in first if each.tenant == "flood"]
    while running[-1] is not None:
        queue.said(running[-1])
        running.append(queue.next(0))
    assert len(running) - 1 == 12, "a quarter of the places stays free"
    add(queue, call("quiet"))
    assert queue.next(0).tenant == "quiet"


def test_who_was_served_less_sends_all_its_prompts_at_once(queue: FairQueue) -> None:
    queue.places = Places(sequences=64, quantum=256)
    add(queue, call("quiet"), *(call("flood", 200) for _ in range(20)))
    running = [each for each in (queue.next(0) for _ in range(3)) if each is not None]
    assert len(running) == 2
    for each in running:
        queue.said(each)
        queue.next(0)
    add(queue, *(call("quiet", 60, 0) for _ in range(6)))
    entered = [each.tenant for each in (queue.next(0) for _ in range(6)) if each is not None]
    assert entered.count("quiet") == 6, "360 tokens, which are less than the other has in hand"


def test_the_engine_is_behind_when_it_is_full_or_many_wait(queue: FairQueue) -> None:
    queue.places = Places(sequences=16, quantum=1)
    add(queue, call("quiet"), *(call("flood", 200) for _ in range(3)))
    queue.next(0)
    queue.next(0)
    assert queue.calls() == 2
    assert not queue.is_behind, "one prompt waits for another"
    add(queue, *(call("flood", 200) for _ in range(8)))
    assert queue.is_behind
    queue.places = Places(sequences=2)
    assert queue.is_behind


def test_nothing_is_left_free_for_who_has_long_gone(queue: FairQueue) -> None:
    queue.places = Places(sequences=4)
    add(queue, call("quiet"))
    served(queue, 1)
    add(queue, *(call("flood", 1000) for _ in range(8)), now=LATELY_S + 1)
    assert sum(queue.next(LATELY_S + 1) is not None for _ in range(8)) == 4


def test_a_batch_holds_nobody_back_and_leaves_places_even_to_its_own_tenant(queue: FairQueue) -> None:
    queue.places = Places(sequences=4)
    add(queue, call("one", priority=BATCH), call("one"))
    served(queue, 2)
    add(queue, *(call("one", 1000, priority=BATCH) for _ in range(8)))
    assert sum(queue.next(0) is not None for _ in range(8)) == 1
    queue = FairQueue()
    queue.places = Places(sequences=4)
    add(queue, call("bulk", priority=BATCH), *(call("chat", 1000) for _ in range(8)))
    assert sum(queue.next(0) is not None for _ in range(8)) == 4


def test_a_call_of_more_sequences_than_places_enters_when_nothing_else_runs(queue: FairQueue) -> None:
    wide = Entry("one", INTERACTIVE, Work(10, 10, sequences=9), 0.0)
    add(queue, wide, call("one"))
    assert queue.next(0) is wide
    assert queue.next(0) is None


def test_tallies_come_back_to_nothing(queue: FairQueue) -> None:
    queue.places = Places(sequences=3)
    entries = [
        call(f"t{number % 3}", number + 1, priority=BATCH if number % 2 else INTERACTIVE) for number in range(30)
    ]
    add(queue, *entries)
    for entry in entries[::5]:
        queue.remove(entry)
    assert len(served(queue, 100, now=AGED_S)) == 24
    assert (queue.calls(), queue.tokens(), queue.cost(), queue.running) == (0, 0, 0.0, 0)
    assert queue.next(AGED_S) is None
    add(queue, call("new"), now=10 * LATELY_S)
    served(queue, 1, now=10 * LATELY_S)
    assert {tenant for tenant, _ in queue.parties} == {"new"}, "who is gone is forgotten"
