"""The ledger's folder: what its files are called, reading them whatever happened to them, old ones made small, or gone.

```
20261125-042310-<host>-<pid>-<random>.new         not locked yet, and empty
20261125-042310-<host>-<pid>-<random>.jsonl       of one process, which holds a lock on it while it writes
20261125-042310-<host>-<pid>-<random>.jsonl.zst   the same, compressed once nobody writes it any more
```
A file belongs to the day (UTC) in its name, and holds nothing that ended after that day.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import zstandard

PLAIN, PACKED = ".jsonl", ".jsonl.zst"
_BLOCK_BYTES = 1 << 20
_T = TypeVar("_T")


def new_name() -> str:
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum())[:16]
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{host}-{os.getpid()}-{secrets.token_hex(4)}{PLAIN}"


def day_of(path: Path) -> str:
    """`20261125`."""
    return path.name[:8]


def listed(folder: Path, *, since: float | None = None, until: float | None = None) -> list[Path]:
    """Its files, oldest first, less those that can hold nothing of that time. Each only once: what was interrupted
    while it was compressed is there in both forms."""
    # In this order nothing that is compressed meanwhile is missed.
    plain = {path.name.removesuffix(PLAIN): path for path in folder.glob(f"*{PLAIN}")}
    packed = {path.name.removesuffix(PACKED): path for path in folder.glob(f"*{PACKED}")}
    first = _day(since) if since is not None else ""
    # What was held in memory while the disk was full is written later, perhaps on the next day.
    last = _day(until + 86_400) if until is not None else "9"
    return [path for _, path in sorted((plain | packed).items()) if first <= day_of(path) <= last]


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y%m%d")


@dataclass(slots=True)
class Skipped:
    """Lines that are not whole: torn by a crash, or spoiled on the disk."""

    lines: int = 0


def blocks(path: Path, kind: type[_T], skipped: Skipped) -> Iterator[list[_T]]:
    """The file's lines, a megabyte at a time. A line that is not whole is counted, and spoils no other."""
    decoder = msgspec.json.Decoder(kind)
    rest = b""
    try:
        with _opened(path) as file:
            while block := file.read(_BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    yield _decoded(decoder, whole, skipped)
    except FileNotFoundError:  # its days were over a moment ago
        return
    except zstandard.ZstdError:  # what stands before the damage was given
        skipped.lines += 1
    skipped.lines += bool(rest)


def _decoded(decoder: msgspec.json.Decoder[_T], lines: bytes, skipped: Skipped) -> list[_T]:
    try:
        return decoder.decode_lines(lines)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    found = []
    for line in lines.split(b"\n"):
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            skipped.lines += 1
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:  # compressed a moment ago
            path = path.with_name(path.name.removesuffix(PACKED).removesuffix(PLAIN) + PACKED)
            file = stack.enter_context(path.open("rb"))
        if path.name.endswith(PACKED):
            yield stack.enter_context(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            yield file


def tidy(folder: Path, keep_days: int, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Compress what nobody writes any more, of processes that died too, and remove what is older than `keep_days`.

    Raises:
        OSError: the disk is full or cannot be written; nothing is lost by it.
    """
    oldest = (datetime.now(UTC) - timedelta(days=keep_days)).strftime("%Y%m%d") if keep_days else ""
    for path in [*folder.glob(f"*{PLAIN}"), *folder.glob(f"*{PACKED}")]:
        if is_stopping():
            return
        if path.name.endswith(PACKED):
            if day_of(path) < oldest:
                path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file, _held(file) as is_ours:
            if is_ours and day_of(path) < oldest:
                path.unlink(missing_ok=True)
            elif is_ours:
                _pack(path, file)


@contextlib.contextmanager
def _held(file: IO[bytes]) -> Iterator[bool]:
    """Whether nobody else writes or compresses this file, now and until the context ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
        return
    yield os.fstat(file.fileno()).st_nlink > 0


def _pack(path: Path, file: IO[bytes]) -> None:
    packed = path.with_name(path.name.removesuffix(PLAIN) + PACKED)
    beside = packed.with_name(f".{packed.name}.part")
    try:
        beside.touch(mode=0o600)
        with beside.open("wb") as target:
            zstandard.ZstdCompressor(level=3).copy_stream(file, target)
            target.flush()
            os.fsync(target.fileno())
        beside.replace(packed)
        sync(path.parent)
        path.unlink()
    finally:
        beside.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """fsync a directory: a name is safe on the disk once its directory is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
