"""Every metric of ours, prefix `refrain_`; vLLM's own stand beside them in the same registry.

Labels come from fixed lists and never from a client's text, so their number is bounded. `model` is a name that is
served here, or was.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

calls = Counter("refrain_calls_total", "Calls for an answer, by what the cache had.", ["endpoint", "cache", "model"])
responses = Counter("refrain_http_responses_total", "HTTP responses by status.", ["status"])
bypasses = Counter(
    "refrain_cache_bypass_total",
    "Calls that were kept apart from the cache, by reason.",
    ["endpoint", "model", "reason"],
)
cache_errors = Counter(
    "refrain_cache_errors_total", "Cache reads and writes that came to nothing, by cause.", ["cause"]
)
recorded = Counter("refrain_cache_recorded_total", "Answers recorded.", ["endpoint"])
not_recorded = Counter("refrain_cache_not_recorded_total", "Answers that were cacheable and not recorded.", ["reason"])
tokens_saved = Counter("refrain_tokens_saved_total", "Tokens answered from the cache.", ["kind", "model"])
seconds_saved = Counter("refrain_generation_seconds_saved_total", "Seconds of generation that hits spared.", ["model"])
near_hits = Counter("refrain_near_hits_total", "Hits answered from this process's own memory, without asking Redis.")
near_evicted = Counter("refrain_near_evicted_total", "Recordings pushed out of this process's memory by others.")
near_bytes = Gauge("refrain_near_bytes", "Memory of this process that recordings take.")
near_on = Gauge("refrain_near_on", "1 while Redis tells of changes, so that recordings may be held here, else 0.")
memory_bytes = Gauge("refrain_memory_bytes", "What this process's smaller memories hold, by memory.", ["memory"])
memory_evicted = Counter("refrain_memory_evicted_total", "What they pushed out for something newer.", ["memory"])
redis_up = Gauge("refrain_redis_up", "1 while Redis answers in time, else 0.")
redis_bytes = Gauge("refrain_redis_bytes", "Memory of the embedded server; of another, its own exporter tells.")
redis_evicted = Gauge("refrain_redis_evicted_keys", "Keys that the embedded server has evicted since it started.")
engine_ready = Gauge("refrain_engine_ready", "1 while the engine takes calls, else 0.")
engine_restarts = Gauge("refrain_engine_restarts", "Times the engine died and was started again.")
engine_quarantined = Gauge("refrain_engine_quarantined", "Calls that the engine died of, kept out for a while.")
weights_served = Gauge("refrain_weights_served", "1 for each set of weights that is served now.", ["name", "digest"])
swaps = Counter("refrain_swaps_total", "Swaps of the served weights, by how and how they ended.", ["way", "outcome"])
swap_failed = Gauge("refrain_swap_failed", "1 while other weights than those served are wanted and do not serve.")
swap_seconds = Histogram(
    "refrain_swap_seconds", "From the wish for other weights to the first call that they take.", buckets=_SECONDS
)
in_flight = Gauge("refrain_generations_in_flight", "Generations that are running or queued for this server's clients.")
queue_calls = Gauge("refrain_queue_calls", "Calls that wait for the engine.", ["class"])
queue_tokens = Gauge("refrain_queue_tokens", "Tokens that wait, prompts and expected answers.", ["class"])
queue_drain_seconds = Gauge("refrain_queue_drain_seconds", "Until what waits is worked off, at the measured speed.")
queue_wait = Histogram(
    "refrain_queue_wait_seconds", "Time that calls waited for the engine.", ["class"], buckets=_SECONDS
)
engine_calls = Gauge("refrain_engine_calls", "Calls that the engine has.")
refused = Counter("refrain_refused_total", "Calls that were refused for lack of room or time, by reason.", ["reason"])
deadlines_missed = Counter("refrain_deadlines_missed_total", "Calls that were ended because their time was up.")
left = Counter("refrain_clients_left_total", "Clients that went away before their answer was complete.")
cut_off = Counter(
    "refrain_connections_cut_off_total", "Connections that were ended because the client was too slow.", ["waiting_for"]
)
reused = Counter(
    "refrain_cache_reused_total", "Hits on an answer that was made for a call of another shape, by rule.", ["rule"]
)
pool_draws = Counter("refrain_cache_pool_draws_total", "Calls that drew from a pool of sampled answers.")
refreshed = Counter("refrain_cache_refreshes_total", "Recordings past their time that were generated anew.")
limited = Counter("refrain_limited_total", "Calls that a limit of their key kept out, by limit.", ["limit"])
uncounted = Counter("refrain_uncounted_total", "Calls of keys with limits that were let in uncounted: Redis was away.")
spared_refusals = Counter("refrain_refusals_spared_total", "Calls refused from memory, without asking the engine.")
boarded = Counter(
    "refrain_flight_boardings_total",
    "Calls that began a generation (leader), shared one (follower), or carried one on (takeover).",
    ["role"],
)
flight_bytes = Gauge("refrain_flight_bytes", "Memory that the answers under way take, for those who read them.")
flights_closed = Counter(
    "refrain_flight_closed_total",
    "Generations that took nobody aboard any more for their size, by the limit that they met (own, all).",
    ["limit"],
)
flight_put_off = Counter("refrain_flight_put_off_total", "Clients cut off since they read too slowly to be waited for.")
streams_cut = Counter("refrain_flight_streams_cut_total", "Generations too large to be passed on to other servers.")
leases_lost = Counter("refrain_flight_leases_lost_total", "Generations whose lease another server took meanwhile.")
resumed = Counter("refrain_streams_resumed_total", "Streams that a client came back to, by where they were.", ["found"])
streams_kept_bytes = Gauge("refrain_streams_kept_bytes", "Memory of finished streams that can still be resumed.")
streams_evicted = Counter("refrain_streams_evicted_total", "Finished streams that were forgotten before their time.")
ledger_records = Counter("refrain_ledger_records_total", "Records of the usage ledger that are on the disk.")
ledger_lost = Counter("refrain_ledger_lost_total", "Records of the usage ledger that were lost: the disk took none.")
ledger_held = Gauge("refrain_ledger_held", "Records of the usage ledger in memory that could not be written yet.")
ledger_up = Gauge("refrain_ledger_up", "1 while the usage ledger can be written, else 0.")
device_seconds = Gauge(
    "refrain_device_seconds", "Device-seconds since the start, in which the engine worked or not.", ["state"]
)
http_workers = Gauge("refrain_http_workers", "Processes beside this one that answer hits now.")
connections_handed = Counter(
    "refrain_connections_handed_total", "Connections that went to the server's own process, or to a worker.", ["to"]
)
duration = Histogram("refrain_call_seconds", "From request to last byte.", ["cache"], buckets=_SECONDS)
phases = Histogram("refrain_phase_seconds", "Time per phase of a call.", ["phase"], buckets=_SECONDS)


@cache
def child(metric: Any, *labels: str) -> Any:
    """`metric.labels(*labels)`, looked up once: on the way of every hit that look-up is half the cost."""
    return metric.labels(*labels)


class _Saved:
    """What calls of one kind spared; plain numbers, as they are added to on the way of every hit."""

    __slots__ = ("calls", "completion", "prompt", "seconds")

    def __init__(self) -> None:
        self.calls = self.prompt = self.completion = 0
        self.seconds = 0.0


class HitTally:
    """What hits are counted by: plain additions, handed on to the counters when somebody looks.

    On a hot hit the counters' own locks and checks would be a tenth of all the work. One thread adds.
    """

    def __init__(self) -> None:
        self._saved: collections.defaultdict[tuple[str, str, str], _Saved] = collections.defaultdict(_Saved)
        self.near = 0

    def add(self, endpoint: str, status: str, model: str, prompt: int, completion: int, seconds: float) -> None:
        """One call that was answered without a generation of its own; `seconds` and tokens are what that spared."""
        saved = self._saved[endpoint, status, model]
        saved.calls += 1
        saved.prompt += prompt
        saved.completion += completion
        saved.seconds += seconds

    def save(self, model: str, prompt: int, completion: int) -> None:
        """Tokens that need not be computed, of a call that is counted apart."""
        saved = self._saved["", "", model]
        saved.prompt += prompt
        saved.completion += completion

    def settle(self) -> None:
        for (endpoint, status, model), saved in self._saved.items():
            if saved.calls:
                calls.labels(endpoint, status, model).inc(saved.calls)
            tokens_saved.labels("prompt", model).inc(saved.prompt)
            tokens_saved.labels("completion", model).inc(saved.completion)
            seconds_saved.labels(model).inc(saved.seconds)
        near_hits.inc(self.near)
        self._saved.clear()
        self.near = 0


hits = HitTally()


class _Memory(Protocol):
    @property
    def currsize(self) -> float: ...


_memories: dict[str, WeakValueDictionary[int, _Memory]] = {}


def watch(name: str, memory: _Memory) -> None:
    """Show its size for as long as there is anything to show; several of one name are added up."""
    _memories.setdefault(name, WeakValueDictionary())[id(memory)] = memory


# A family's name, a sample's name, and its labels.
Key = tuple[str, str, tuple[tuple[str, str], ...]]
Counts = collections.Counter[Key]


def counts(*, but: str) -> Counts:
    """What this process has counted since it began, but for the family `but`: all that adds up over processes."""
    hits.settle()
    return Counts(
        {
            (family.name, sample.name, tuple(sample.labels.items())): sample.value
            for family in REGISTRY.collect()
            if _adds_up(family) and family.name != but
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
    )


def exposition(elsewhere: Mapping[Key, float]) -> bytes:
    """Everything in Prometheus's text format, with what other processes have counted for this one added."""
    hits.settle()
    for name, memories in _memories.items():
        memory_bytes.labels(name).set(sum(memory.currsize for memory in memories.values()))
    if not elsewhere:
        return generate_latest()
    registry = CollectorRegistry()
    registry.register(_WithCounts(elsewhere))
    return generate_latest(registry)


def _adds_up(family: Metric) -> bool:
    return family.name.startswith("refrain_") and family.type in ("counter", "histogram")


class _WithCounts(Collector):
    def __init__(self, counts: Mapping[Key, float]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        more: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = collections.defaultdict(dict)
        for (family, name, labels), value in self._counts.items():
            more[family][name, labels] = value
        for metric in REGISTRY.collect():
            added = more.pop(metric.name, {}) if _adds_up(metric) else {}
            metric.samples = [
                sample._replace(value=sample.value + added.pop((sample.name, tuple(sample.labels.items())), 0.0))
                for sample in metric.samples
            ]
            # What only others have counted yet.
            metric.samples += [Sample(name, dict(labels), value) for (name, labels), value in added.items()]
            yield metric
