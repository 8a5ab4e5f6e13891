"""What is expected of a call before it runs, what those that ran taught, and who is told that there is no room."""

from __future__ import annotations

import pytest

from app.admission.bounds import Bounds, misfit, retry_after_s
from app.admission.fair import Entry, FairQueue, Places
from app.admission.learned import Drain, Learned
from app.admission.work import Work, asked
from app.domain import Call, Caller, Endpoint, Priority, Timings
from app.errors import QueueFull, QueueShareUsed


def call(endpoint: Endpoint = Endpoint.CHAT, priority: Priority = Priority.INTERACTIVE, **body: object) -> Call:
    return Call(endpoint, dict(body), Caller(priority=priority), "")


def test_the_size_of_a_prompt_is_read_off_its_body() -> None:
    text = asked(call(messages=[{"role": "user", "content": "x" * 400}], max_tokens=7, n=3))
    assert 400 <= text.characters <= 410
    assert (text.limit, text.sequences) == (7, 3)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert asked(call(messages=[{"role": "user", "content": [picture]}])).characters < 100
    ids = asked(call(Endpoint.COMPLETIONS, prompt=[[1] * 30, [2] * 40]))
    assert (ids.characters, ids.token_ids, ids.sequences, ids.limit) == (0, 70, 2, 16)
    assert asked(call(Endpoint.EMBEDDINGS, input=["a", "b"])).sequences == 2
    assert asked(call(Endpoint.CHAT, messages="no list", n="many", max_tokens=-1)).limit is None


def test_prompts_are_estimated_as_finished_calls_taught() -> None:
    learned, size = Learned(), asked(call(messages=[{"content": "x" * 900}], max_tokens=8))
    before = learned.expected(size, None).prompt_tokens
    for _ in range(30):
        learned.learn(size, Timings(prompt_tokens=100, completion_tokens=8, prefill_s=0.5, decode_s=0.7))
    assert before == 225
    assert learned.expected(size, None).prompt_tokens == 100
    assert learned.prefill_s(Work(100, 8)) == pytest.approx(0.5)
    assert learned.decode_s(Work(100, 8)) == pytest.approx(0.8)
    assert learned.prefilled_in(0.05) == 10
    learned.learn(size, Timings(prompt_tokens=100, completion_tokens=8, prefill_s=5.0, decode_s=0.7))
    assert learned.prefilled_in(0.05) == 9, "one that shared its step says little"


def test_answers_are_expected_to_be_as_long_as_those_that_were_allowed_as_much() -> None:
    learned = Learned()
    short, unlimited = asked(call(messages="hi", max_tokens=16)), asked(call(messages="hi"))
    assert learned.expected(unlimited, 8192).output_tokens == 256, "and not 8192"
    for _ in range(10):
        learned.learn(short, Timings(prompt_tokens=10, completion_tokens=12))
        learned.learn(unlimited, Timings(prompt_tokens=10, completion_tokens=700))
    assert learned.expected(short, 8192).output_tokens == 12
    assert learned.expected(unlimited, 8192).output_tokens == 700
    assert learned.expected(asked(call(messages="hi", max_tokens=17, n=2)), None).output_tokens == 24
    assert learned.expected(unlimited, 512).output_tokens == 512


def test_a_call_may_lower_itself_and_not_raise_itself() -> None:
    assert call(priority=Priority.INTERACTIVE).priority is Priority.INTERACTIVE
    lowered = Call(Endpoint.CHAT, {"priority": 3}, Caller(), "")
    assert lowered.priority is Priority.BATCH
    assert Call(Endpoint.CHAT, {"service_tier": "flex"}, Caller(), "").priority is Priority.BATCH
    for body in ({"priority": -5}, {"priority": 0}, {"service_tier": "priority"}, {"priority": "x"}):
        assert Call(Endpoint.CHAT, body, Caller(priority=Priority.BATCH), "").priority is Priority.BATCH
        assert Call(Endpoint.CHAT, body, Caller(), "").priority is Priority.INTERACTIVE


def test_the_drain_is_measured_only_while_calls_wait() -> None:
    drain = Drain()
    drain.note(0.0, 0.0, is_busy=False)
    drain.note(100.0, 1000.0, is_busy=True)
    assert drain.per_s is None, "10 a second came; more may be possible"
    for second in range(1, 11):
        drain.note(100.0 + second, 1000.0 + 50.0 * second, is_busy=second < 10)
    assert drain.per_s == pytest.approx(50.0)
    drain.note(1000.0, 1500.0, is_busy=False)
    assert drain.per_s == pytest.approx(50.0), "idle time is no slowness"
    for second in range(200):
        drain.note(2000.0 + second, 1500.0 + 10.0 * second, is_busy=True)
    assert drain.per_s == pytest.approx(10.0, rel=0.05), "what was long ago counts no more"


def waiting(*tenants: str) -> tuple[FairQueue, Entry]:
    """A queue with a call of 30 tokens (cost 50) of each, and the last of them."""
    queue = FairQueue()
    queue.places = Places(sequences=1)
    entries = [Entry(tenant, Priority.INTERACTIVE, Work(10, 20), 0.0) for tenant in tenants]
    for entry in entries:
        queue.add(entry, 0.0)
    return queue, entries[-1]


@pytest.mark.parametrize(
    ("bounds", "code"),
    [
        (Bounds(9, None, None), "queue_full"),
        (Bounds(None, 299, None), "queue_full_tokens"),
        (Bounds(None, None, 49.0), "queue_slow"),
        (Bounds(10, 300, 51.0), None),
        (Bounds(None, None, None), None),
    ],
)
def test_what_does_not_fit_is_told_why(bounds: Bounds, code: str | None) -> None:
    queue, last = waiting(*["one"] * 10)
    error = misfit(queue, last, bounds, 10.0, has_key=False)
    assert (error.code if error else None) == code
    if error is not None:
        assert isinstance(error, QueueFull)
        assert error.status == 503
        assert 40 <= int(error.headers["retry-after"]) <= 60, "500 to drain, 10 a second"


def test_a_tenant_may_not_fill_the_queue_and_another_finds_room() -> None:
    bounds = Bounds(100, None, None)
    queue, last = waiting(*["flood"] * 80)
    assert misfit(queue, last, bounds, None, has_key=True) is None
    queue, last = waiting(*["flood"] * 81)
    error = misfit(queue, last, bounds, None, has_key=True)
    assert isinstance(error, QueueShareUsed)
    assert error.status == 429
    assert misfit(queue, last, bounds, None, has_key=False) is None, "without keys there is nobody else"
    queue, last = waiting(*["flood"] * 80, *["other"] * 10)
    assert misfit(queue, last, bounds, None, has_key=True) is None


def test_a_tenant_waits_for_itself_and_as_much_for_each_other() -> None:
    queue, _ = waiting(*["flood"] * 100, "quiet")
    assert queue.ahead("quiet", Priority.INTERACTIVE) == 100.0
    assert queue.ahead("flood", Priority.INTERACTIVE) == 5050.0
    assert queue.ahead("new", Priority.INTERACTIVE) == 0.0
    assert queue.ahead("new", Priority.BATCH) == 5050.0


def test_retry_after_follows_the_measured_rate_within_what_clients_heed() -> None:
    assert retry_after_s(0.0, 10.0) == 1
    assert 8 <= retry_after_s(100.0, 10.0) <= 12
    assert retry_after_s(1e9, 10.0) == 60
    assert retry_after_s(1e9, None) in (1, 2)
