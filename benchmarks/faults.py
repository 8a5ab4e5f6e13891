"""Faults at random moments under mixed clients on the real engine: who got what, and what is left behind.

`python -m benchmarks faults` makes 20 in 20 minutes; `--minutes`, `--faults` and `--seed` change that, `--quick` is
a few minutes. It ends with 1 where a bar is not met. Making a disk full needs the right to mount a tmpfs, moving the
clock a C compiler; a kind that cannot be made here is named, and left out.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from app.ledger import files
from app.ledger.record import Record
from app.settings import Settings
from benchmarks import servers
from benchmarks.faults_calls import UNSAVED, Case, Clients, Heard, cases, hot_cases
from benchmarks.faults_kinds import HURT_REDIS, Made, Place, drawn, furnish, make, movable_clock, possible, small_disk
from benchmarks.report import Report, console, step, verdict

PHYSICS = """\
A hit is a call for one of a set of prompts that were answered, and recorded, before the first fault; one comes every
quarter of a second, whatever happens. It is available if it ends whole, with the recorded text. Redis that loses
its recordings (FLUSHALL; kill -9 loses what its last snapshot lacks) makes the next such call a miss, which the engine
answers; so does a Redis that is away for longer than this process may answer from its own memory. These count as
available if they end whole, and are counted apart; a miss that no fault of Redis explains fails the run.

All others are sixteen clients of the official libraries and of bare HTTP, each with one call at a time. A call ends
whole (its end, its usage, and the text that its prompt had before the first fault), by its client's own wish, or with
a typed error. `continued` are those that ended whole though their engine died meanwhile. In float32, where a text that
is gone on with is the same as one that was not; prompts that said two things in an unhurt server are left out."""

CLIENTS, HIT_EVERY_S = 16, 0.25
SETTINGS = {
    "REFRAIN_DTYPE": "float32",
    "REFRAIN_COMPILE": "false",
    "REFRAIN_ENGINE_HANG_S": "8",
    "REFRAIN_LOADING_WAIT_S": "120",
    "REFRAIN_ACCESS_LOG": "false",
    # The server's own: what is measured is memory, and its own bounds shall be reached soon.
    "REFRAIN_CACHE_NEAR_MIB": "4",
    "REFRAIN_STREAM_KEEP_BYTES": "1000000",
}
UNSAVED_SHARE, LEAVING_SHARE = 0.6, 0.12
# What is nought when nobody is served.
GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "refrain_generations_in_flight",
    "refrain_queue_calls",
    "refrain_queue_tokens",
    "refrain_engine_calls",
    "refrain_flight_bytes",
    "refrain_ledger_held",
)
SETTLE_S = 90.0
SAMPLE_EVERY_S = 5.0
# Of a server of 1 GiB: a page of the allocator more is no leak, and a leak of a kilobyte a call is more than this.
FLAT_SHARE, FLAT_FDS = 0.05, 4


def run(
    *,
    quick: bool = False,
    rounds: int | None = None,
    save: bool = False,
    minutes: float | None = None,
    faults: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    del rounds
    seed = random.randrange(2**31) if seed is None else seed
    minutes = minutes or (3.0 if quick else 20.0)
    faults = faults or (8 if quick else 20)
    model = servers.weights(step)
    settings = {"minutes": minutes, "faults": faults, "seed": seed, "clients": CLIENTS} | SETTINGS
    report = Report("faults", PHYSICS, settings)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-")))
        (home := folder / "home").mkdir()
        is_small = stack.enter_context(small_disk(home))
        furnish(home)
        step_file, clock = movable_clock(folder)
        server = stack.enter_context(servers.refrain(home, folder, **SETTINGS, **clock))
        server.wait_ok("/readyz", 600, 0.1)
        trial = Trial(Place(server, home, is_small, step_file), model.name, minutes * 60, faults, seed)
        try:
            asyncio.run(trial.run())
        except* RuntimeError as failed:
            trial.findings += [str(error) for error in failed.exceptions]
        except* psutil.NoSuchProcess:
            trial.findings.append("the server is gone")
        server.stop()
        if server.process.returncode:
            trial.findings.append(f"the server ended with {server.process.returncode}")
        trial.compare_ledger()
        log = server.log.read_text(errors="replace")
    tracebacks = log.count("Traceback (most recent call last)")
    if tracebacks or trial.findings:
        kept = Path(tempfile.gettempdir()) / f"faults-{seed}.log"
        kept.write_text(log)
        step(f"the server's log is kept as {kept}")
    return _tell(report, trial, tracebacks, save)


@dataclass
class Standing:
    """What the server takes while nobody asks it anything."""

    rss: int = 0
    fds: int = 0
    core_rss: int = 0
    core_fds: int = 0
    processes: int = 0
    threads: int = 0

    @classmethod
    def of(cls, place: Place) -> Standing:
        leader, core = place.server.family()[0], place.core()
        assert core is not None
        return cls(
            leader.memory_info().rss,
            leader.num_fds(),
            core.memory_info().rss,
            core.num_fds(),
            len(place.server.family()),
            leader.num_threads(),
        )


@dataclass
class Trial:
    """One run, and all that it learns."""

    place: Place
    model: str
    seconds: float
    count: int
    seed: int
    right: dict[str, Heard] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    heard: list[Heard] = field(default_factory=list)
    hits: list[Heard] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    left_behind: dict[str, float] = field(default_factory=dict)
    before: Standing = field(default_factory=Standing)
    after: Standing = field(default_factory=Standing)
    ledger: Counter[str] = field(default_factory=Counter)
    preparation: list[Heard] = field(default_factory=list)

    async def run(self) -> None:
        place = self.place
        async with Clients(place.server.url) as clients:
            pool, hot = cases(self.model, self.seed), hot_cases(self.model)
            place.streams = [each for each in pool if each.stream]
            place.vanish = lambda case: self._vanish(clients, case)
            await self._learn(clients, pool, hot)
            await self._settle()
            self.before = Standing.of(place)
            plan = drawn(possible(place), self.count, self.seconds, random.Random(self.seed))
            step(f"{self.count} faults in {self.seconds / 60:g} minutes, of {', '.join(possible(place))}")
            until = time.monotonic() + self.seconds
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._sample())
                group.create_task(self._hit_regularly(clients, hot, until))
                callers = [group.create_task(self._call(clients, pool, until, n)) for n in range(CLIENTS)]
                await self._hurt(plan)
                await asyncio.wait(callers)
                watching.cancel()
            await self._settle()
            self.after = Standing.of(place)

    # --- before -----------------------------------------------------------------------------------------------------

    async def _learn(self, clients: Clients, pool: Sequence[Case], hot: Sequence[Case]) -> None:
        """What each prompt says, by two turns among different others; and the hot ones, recorded."""
        step(f"what {len(pool) + len(hot)} prompts say, twice")
        first = await self._all(clients, [*pool, *hot], UNSAVED)
        second = await self._all(clients, random.Random(self.seed).sample(pool, len(pool)), UNSAVED)
        recorded = await self._all(clients, hot, {})
        self.preparation = [*first, *second, *recorded]
        for each in self.preparation:
            if each.end != "whole":
                raise RuntimeError(f"before any fault: {each}")
            if each.told != self.right.setdefault(each.case, each).told:
                self.undecided.add(each.case)
        if self.undecided:
            step(f"left out, as they say two things: {', '.join(sorted(self.undecided))}")

    async def _all(self, clients: Clients, asked: Sequence[Case], headers: dict[str, str]) -> list[Heard]:
        places = asyncio.Semaphore(CLIENTS)

        async def one(case: Case) -> Heard:
            async with places:
                return await clients.ask(case, headers)

        return list(await asyncio.gather(*(one(case) for case in asked)))

    # --- during -----------------------------------------------------------------------------------------------------

    async def _call(self, clients: Clients, pool: Sequence[Case], until: float, number: int) -> None:
        """One client: a call, a breath, the next."""
        chance = random.Random(f"{self.seed} {number}")
        while time.monotonic() < until:
            case = chance.choice(pool)
            headers = UNSAVED if chance.random() < UNSAVED_SHARE else {}
            is_leaving = case.stream and chance.random() < LEAVING_SHARE
            self.heard.append(await clients.ask(case, headers, chance.randint(1, 12) if is_leaving else None))
            await asyncio.sleep(chance.uniform(0, 0.3))

    async def _vanish(self, clients: Clients, case: Case) -> None:
        self.heard.append(await clients.ask(case, UNSAVED, random.randint(1, 4)))

    async def _hit_regularly(self, clients: Clients, hot: Sequence[Case], until: float) -> None:
        chance = random.Random(self.seed)

        async def one() -> None:
            self.hits.append(await clients.ask(chance.choice(hot), {}))

        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                group.create_task(one())
                await asyncio.sleep(HIT_EVERY_S)

    async def _hurt(self, plan: Sequence[tuple[float, str]]) -> None:
        began, locks = time.monotonic(), dict[str, asyncio.Lock]()

        async def one(at: float, kind: str) -> None:
            await asyncio.sleep(began + at - time.monotonic())
            try:
                made = await make(self.place, kind, random.Random(f"{self.seed} {at}"), locks)
            except RuntimeError as error:
                self.findings.append(f"{kind}: {error}")
                return
            self.made.append(made)
            step(f"{kind}: {made.note}, well after {made.well - made.at:.1f} s")

        async with asyncio.TaskGroup() as group:
            for at, kind in plan:
                group.create_task(one(at, kind))
        self.place.server.check()

    async def _sample(self) -> None:
        leader = psutil.Process(self.place.server.process.pid)
        while True:
            self.memory.append((time.monotonic(), leader.memory_info().rss))
            await asyncio.sleep(SAMPLE_EVERY_S)

    # --- after ------------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Until nobody is served any more and idle connections are closed; what is left then is left behind."""
        await asyncio.sleep(Settings.model_fields["idle_timeout_s"].default + 3)
        deadline = time.monotonic() + SETTLE_S
        async with httpx.AsyncClient(base_url=self.place.server.url, timeout=30) as http:
            while time.monotonic() < deadline:
                told = await _metrics(http)
                self.left_behind = {name: told[name] for name in GAUGES if told[name]}
                if not self.left_behind and await self.place.is_well():
                    break
                await asyncio.sleep(1)
            if lost := told["refrain_ledger_lost_total"]:
                self.findings.append(f"{lost:g} records of the ledger lost")
        await asyncio.sleep(1)

    def compare_ledger(self) -> None:
        """Each call's record beside what its client knows; clients that left know only that they were there."""
        recorded: defaultdict[str, list[Record]] = defaultdict(list)
        skipped = files.Skipped()
        for path in files.listed(self.place.home / "ledger"):
            for lines in files.blocks(path, Record, skipped):
                for record in lines:
                    if record.kind == "call":
                        recorded[record.id].append(record)
        if skipped.lines:
            self.findings.append(f"{skipped.lines} lines of the ledger are not whole")
        for each in [*self.preparation, *self.heard, *self.hits]:
            found = recorded.pop(each.id, [])
            why = f"{len(found)} records" if len(found) != 1 else _differs(each, found[0])
            self.ledger["same" if not why else "different"] += 1
            if why:
                self.findings.append(f"ledger: {why}: {each.case} {each.end} {each.code}")
        if recorded:
            self.findings.append(f"{len(recorded)} records of calls that nobody made")

    # --- what it means ----------------------------------------------------------------------------------------------

    def bad(self) -> list[Heard]:
        """Neither whole and right, nor left, nor a typed error; a hit that is no whole answer is bad too."""
        wrong = [each for each in [*self.heard, *self.hits] if each.end == "whole" and not self._is_right(each)]
        for each in wrong:
            each.code = f"it says {each.told}, not {self.right[each.case].told}"
        broken = [each for each in self.heard if each.end == "bad"]
        return wrong + broken + [each for each in self.hits if each.end != "whole"]

    def _is_right(self, each: Heard) -> bool:
        return each.case in self.undecided or each.told == self.right[each.case].told

    def continued(self) -> int:
        """Whole answers in whose time an engine died."""
        deaths = [made.over for made in self.made if made.kind.startswith("engine")]
        whole = [each for each in [*self.heard, *self.hits] if each.end == "whole" and each.cache in ("miss", "bypass")]
        return sum(any(each.began < death < each.ended for death in deaths) for each in whole)

    def unexplained_misses(self) -> list[Heard]:
        """Not hits, though the same was answered since Redis was last hurt, and recorded."""
        hurt = [made for made in self.made if made.kind in HURT_REDIS]
        recorded = {each.case: each.ended for each in self.preparation if not each.code}
        found = []
        for each in sorted(self.hits, key=lambda each: each.began):
            if each.end != "whole":
                continue
            is_hurt = any(made.at < each.ended and each.began < made.well for made in hurt)
            last = max((made.well for made in hurt if made.well < each.began), default=0.0)
            if each.cache != "hit" and not is_hurt and last < recorded[each.case] < each.began:
                found.append(each)
            if not is_hurt:
                recorded[each.case] = max(recorded[each.case], each.ended)
        return found

    def growth(self) -> float:
        """Of the server's memory, from the second quarter of the time to the last, as a share of it."""
        quarter = len(self.memory) // 4
        if not quarter:
            return 0.0
        early = statistics.median(rss for _, rss in self.memory[quarter : 2 * quarter])
        return statistics.median(rss for _, rss in self.memory[-quarter:]) / early - 1


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    told: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            told[sample.name] += sample.value
    absent = [name for name in GAUGES if name not in told]
    if absent:
        raise RuntimeError(f"no such metrics: {', '.join(absent)}")
    return told


def _differs(each: Heard, record: Record) -> str:
    """Where client and ledger tell different things of one call; empty if nowhere."""
    if each.end == "bad":
        return ""  # it is told of already
    finishes = {"whole": {"whole"}, "error": {"refused", "broken"}, "left": {"left", "whole", "broken"}}[each.end]
    if record.finish not in finishes:
        return f"finish {record.finish}, the client saw {each.end}"
    if (record.status, record.stream) != (each.status, each.stream):
        return f"status {record.status}, stream {record.stream}; the client saw {each.status}, {each.stream}"
    if each.end != "whole":
        return "" if each.end == "left" or record.error == each.code else f"error {record.error}, not {each.code}"
    if (record.prompt_tokens, record.completion_tokens) != (each.prompt_tokens, each.completion_tokens):
        seen = each.prompt_tokens, each.completion_tokens
        return f"tokens {record.prompt_tokens}, {record.completion_tokens}; the client counted {seen}"
    return "" if record.cache == each.cache else f"x-cache {record.cache}, the client saw {each.cache}"


def _tell(report: Report, trial: Trial, tracebacks: int, save: bool) -> dict[str, Any]:
    began = min((made.at for made in trial.made), default=0.0)
    report.table(
        "faults",
        ["", "at, s after the first", "lasted, s", "well after, s", ""],
        [
            [made.kind, made.at - began, made.over - made.at, made.well - made.at, made.note]
            for made in sorted(trial.made, key=lambda made: made.at)
        ],
    )
    bad, misses = trial.bad(), trial.unexplained_misses()
    ends = Counter(f"{each.end} {each.code}".strip() for each in trial.heard if each not in bad)
    ends["continued"] = trial.continued()
    came = Counter(each.cache for each in trial.hits)
    report.table("how calls ended", ["", ""], sorted(ends.items()))
    report.table("what hits were", ["", ""], sorted(came.items()))
    tokens = sum(each.completion_tokens or 0 for each in trial.heard + trial.hits if each.end == "whole")
    available = sum(each not in bad for each in trial.hits) / max(1, len(trial.hits))
    before, after = trial.before, trial.after
    slowest_s = max((each.ended - each.began for each in trial.hits if each.cache == "hit"), default=0.0)
    growth, fds = trial.growth(), max(after.fds - before.fds, after.core_fds - before.core_fds)
    bars = [
        ("faults made", f"{trial.count}", len(trial.made), len(trial.made) == trial.count),
        ("availability of hits", "1", available, available == 1 and bool(trial.hits)),
        ("misses that nothing explains", "0", len(misses), not misses),
        ("calls that ended badly", "0", len(bad), not bad),
        ("slots left behind", "none", ", ".join(trial.left_behind) or "none", not trial.left_behind),
        ("memory of the server, growth", f"<= {FLAT_SHARE:g}", growth, growth <= FLAT_SHARE),
        ("file descriptors, more", f"<= {FLAT_FDS}", fds, fds <= FLAT_FDS),
        ("processes, more", "0", after.processes - before.processes, after.processes <= before.processes),
        ("calls that the ledger tells otherwise", "0", trial.ledger["different"], not trial.ledger["different"]),
        ("other findings", "0", len(trial.findings), not trial.findings),
        ("tracebacks in the log", "0", tracebacks, not tracebacks),
    ]
    report.table("bars", ["", "aim", "", ""], [[*bar[:3], verdict(bar[3])] for bar in bars])
    told = [f"{each.case} {each.status} {each.cache}: {each.end} {each.code}" for each in bad[:20]]
    told += [f"a miss: {each.case} {each.cache}" for each in misses[:20]] + trial.findings[:30]
    for line in told:
        console.print(line, markup=False, soft_wrap=True)
    return report.finish(
        save,
        calls=len(trial.heard),
        hits=len(trial.hits),
        completion_tokens=tokens,
        ends=dict(ends),
        hits_by_cache=dict(came),
        slowest_hit_s=round(slowest_s, 3),
        faults=[[made.kind, round(made.at - began, 1), round(made.well - made.at, 1)] for made in trial.made],
        undecided=sorted(trial.undecided),
        before=vars(before),
        after=vars(after),
        bars={name: value for name, _, value, _ in bars},
        findings=told,
        is_met=all(bar[3] for bar in bars),
    )
