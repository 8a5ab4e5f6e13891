"""What is done to a server on purpose, and the place in which it can be done: its home on a small disk of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import redis.asyncio

from app.cache import embedded
from app.weights import Registry
from benchmarks.faults_calls import Case
from benchmarks.servers import CACHE, ROOT, WEIGHTS_HOME, Server

DISK_MIB = 48
_SETTLED_S = 120.0
_SOURCE = Path(__file__).with_name("clock_step.c")


@dataclass
class Place:
    """A running server, and all of it that can be hurt. `step_file` is None where its clock cannot be moved."""

    server: Server
    home: Path
    is_small_disk: bool
    step_file: Path | None
    streams: list[Case] = field(default_factory=list)
    vanish: Callable[[Case], Awaitable[None]] | None = None

    def core(self) -> psutil.Process | None:
        for member in self.server.family():
            with contextlib.suppress(psutil.Error):
                if any("EngineCore" in part for part in member.cmdline()):
                    return member
        return None

    def redis(self) -> psutil.Process | None:
        for member in self.server.family():
            with contextlib.suppress(psutil.Error):
                if "valkey" in member.name() or "redis-server" in member.name():
                    return member
        return None

    async def until(self, is_so: Callable[[], Awaitable[bool]], what: str, timeout_s: float = _SETTLED_S) -> None:
        """Raises RuntimeError: it did not become so."""
        deadline = time.monotonic() + timeout_s
        while not await is_so():
            self.server.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not happen within {timeout_s:g} s; the log: {self.server.tail()}")
            await asyncio.sleep(0.2)

    async def is_well(self) -> bool:
        """What an operator sees: engine and Redis there, the ledger written."""
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(base_url=self.server.url, timeout=10) as http:
                ready = await http.get("/readyz")
                return ready.status_code == 200 and ready.json().get("redis") == "up"
        return False


@dataclass(slots=True)
class Made:
    """A fault that was made. `over`: what was done is undone; `well`: the server says so of itself again."""

    kind: str
    at: float
    over: float = 0.0
    well: float = 0.0
    note: str = ""


# --- the kinds: each does it, waits its time, undoes it, and tells what there is to tell ---


async def engine_killed(place: Place, chance: random.Random) -> str:
    return await _core_signalled(place, signal.SIGKILL)


async def engine_stopped(place: Place, chance: random.Random) -> str:
    """It is not let go on: that is the server's to find out and to end."""
    return await _core_signalled(place, signal.SIGSTOP)


async def _core_signalled(place: Place, number: signal.Signals) -> str:
    async def is_there() -> bool:
        return place.core() is not None and await place.is_well()

    await place.until(is_there, "an engine core")
    core = place.core()
    assert core is not None
    core.send_signal(number)

    async def is_gone() -> bool:
        return not core.is_running() or core.status() == psutil.STATUS_ZOMBIE

    await place.until(is_gone, "the end of the core")
    return f"pid {core.pid}"


async def redis_killed(place: Place, chance: random.Random) -> str:
    found = place.redis()
    if found is None:
        return "it was not there"
    found.kill()
    return f"pid {found.pid}"


async def redis_stopped(place: Place, chance: random.Random) -> str:
    found, seconds = place.redis(), chance.uniform(2, 15)
    if found is None:
        return "it was not there"
    found.suspend()
    try:
        await asyncio.sleep(seconds)
    finally:
        found.resume()
    return f"{seconds:.0f} s"


async def redis_flushed(place: Place, chance: random.Random) -> str:
    (url,) = embedded.running(place.home)
    async with redis.asyncio.from_url(url, socket_timeout=5) as client:
        held = await client.dbsize()
        await client.flushall()
    return f"{held} keys"


async def disk_filled(place: Place, chance: random.Random) -> str:
    """The disk of the ledger, of Redis's snapshot and of the registry; somebody publishes meanwhile."""
    registry, filler, seconds = Registry(place.home / "weights"), place.home / "filler", chance.uniform(5, 20)
    try:
        fill(filler)
        published = await asyncio.to_thread(_publish, registry, f"small-{time.monotonic_ns()}")
        await asyncio.sleep(seconds)
        fill(filler)  # what was freed meanwhile
    finally:
        filler.unlink(missing_ok=True)
    rows = [row for row in registry.list() if row.name.startswith("small-")]
    damaged = [row.name for row in rows if await asyncio.to_thread(registry.verify, row.name, row.digest)]
    if damaged or published != "No space left on device":
        raise RuntimeError(f"publishing on a full disk: {published}; damaged: {damaged}")
    again = await asyncio.to_thread(_publish, registry, "small-afterwards")
    if again:
        raise RuntimeError(f"publishing on a disk that has room again: {again}")
    return f"{seconds:.0f} s; publishing: {published}"


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass


def _publish(registry: Registry, name: str) -> str:
    """Small weights of that name; what kept them out, or nothing."""
    try:
        with registry.stage(name) as staged:
            (staged / "config.json").write_text("{}")
            (staged / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(1 << 16))
            registry.publish(staged, name, {"kind": "benchmark"})
    except OSError as error:
        return error.strerror or str(error)
    return ""


async def clients_vanished(place: Place, chance: random.Random) -> str:
    """A crowd comes and goes at once, each in the middle of its stream."""
    assert place.vanish is not None
    crowd = chance.choices(place.streams, k=chance.randint(8, 24))
    await asyncio.gather(*(place.vanish(case) for case in crowd))
    return f"{len(crowd)} clients"


async def clock_stepped(place: Place, chance: random.Random) -> str:
    """The wall clock of server, core and Redis; it stays there until the next step."""
    assert place.step_file is not None
    seconds = chance.choice((-1, 1)) * chance.randint(30, 7200)
    with place.step_file.open("r+b") as file:  # it is mapped: it must never be shorter
        file.write(struct.pack("q", seconds))
    await asyncio.sleep(5)
    return f"to {seconds:+d} s"


KINDS: dict[str, Callable[[Place, random.Random], Awaitable[str]]] = {
    "engine kill -9": engine_killed,
    "engine SIGSTOP": engine_stopped,
    "redis kill -9": redis_killed,
    "redis SIGSTOP": redis_stopped,
    "redis FLUSHALL": redis_flushed,
    "disk full": disk_filled,
    "clients vanish": clients_vanished,
    "clock step": clock_stepped,
}
HURT_REDIS = frozenset({"redis kill -9", "redis SIGSTOP", "redis FLUSHALL"})


def possible(place: Place) -> list[str]:
    cannot = {"disk full": not place.is_small_disk, "clock step": place.step_file is None}
    return [kind for kind in KINDS if not cannot.get(kind, False)]


def drawn(kinds: list[str], count: int, seconds: float, chance: random.Random) -> list[tuple[float, str]]:
    """So many faults at random moments of that time, the kinds as even as can be."""
    deck: list[str] = []
    while len(deck) < count:
        deck += chance.sample(kinds, len(kinds))
    return list(zip(sorted(chance.uniform(2, seconds) for _ in range(count)), deck[:count], strict=True))


@asynccontextmanager
async def one_at_a_time(kind: str, locks: dict[str, asyncio.Lock]) -> AsyncIterator[None]:
    """Faults of different parts may overlap; what is stopped is not killed before it goes on."""
    async with locks.setdefault(kind.split()[0], asyncio.Lock()):
        yield


async def make(place: Place, kind: str, chance: random.Random, locks: dict[str, asyncio.Lock]) -> Made:
    """Raises RuntimeError: the server did not bear it."""
    async with one_at_a_time(kind, locks):
        made = Made(kind, time.monotonic())
        made.note = await KINDS[kind](place, chance)
        made.over = time.monotonic()
        await asyncio.sleep(0.5)  # until it can have noticed
        await place.until(place.is_well, f"recovery from: {kind}")
        made.well = time.monotonic()
    return made


# --- the place ---


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """`folder` on a file system of its own, if we may mount one here."""
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)  # noqa: S607
    if mounted.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


def furnish(home: Path) -> None:
    """The registry of WEIGHTS_HOME: its pointers as copies, which can be written, the weights themselves by links."""
    for name in (WEIGHTS_HOME / "weights").iterdir():
        there = home / "weights" / name.name
        there.mkdir(parents=True)
        for entry in name.iterdir():
            if entry.is_dir() and not entry.name.startswith("."):
                (there / entry.name).symlink_to(entry)
            elif entry.suffix in (".json", ".jsonl"):
                shutil.copy(entry, there)


def movable_clock(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The file that moves a server's clock, and the environment it must be started with; None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None, {}
    library = CACHE / "bench-clock" / "clock_step.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, cwd=ROOT, check=True)
    step_file = folder / "clock"
    step_file.write_bytes(struct.pack("q", 0))
    return step_file, {"LD_PRELOAD": str(library), "CLOCK_STEP_FILE": str(step_file)}
