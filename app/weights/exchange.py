"""Weights to an object store and back: pushed file by file, pulled piece by piece, by digest.

Both may be killed at any moment and go on where they were when they are asked again. Nothing enters the registry but
whole versions, through its own `publish`, which hashes every byte; nothing enters the store before its files did.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from app.errors import StartRefused
from app.weights.digest import FileDigest
from app.weights.manifest import BrokenWeights, Manifest, UnknownWeights
from app.weights.pull import one_at_a_time
from app.weights.registry import Registry
from app.weights.store import Store

# One stream of an object store is slower than a network card; more than this is held in memory: 8 x 16 MiB.
PIECE_BYTES = 16 * 2**20
_PIECES_AHEAD = 8

Report = Callable[[str], None]
# The bytes that are done, and all of them.
Tell = Callable[[int, int], None]


def _nobody(done: int, total: int) -> None:
    """Nobody looks on."""


def push_weights(
    reference: str,
    registry: Registry,
    store: Store,
    report: Report,
    tell: Tell = _nobody,
    *,
    make_current: bool = True,
    resend: bool = False,
) -> Manifest:
    """Send published weights to the store; with `resend` also the files that seem to be there.

    Raises `StartRefused`: they are damaged here, or the store does not take them. What it took stays there, and is not
    sent again by the next push.
    """
    manifest = registry.find(reference)
    folder = registry.path(manifest.name, manifest.digest)
    report(f"checking {manifest.short} ({manifest.size_bytes / 1e6:.0f} MB)")
    if problems := registry.verify(manifest.name, manifest.digest):
        raise BrokenWeights(f"{manifest.short} is damaged: {problems[0]}; not pushed")
    done, total = 0, manifest.size_bytes
    for name, file in sorted(manifest.files.items()):
        if resend or store.problem_with(file):
            report(f"sending {name} ({file.size / 1e6:.1f} MB)")
            store.put(folder / name, file, _past(tell, done, total))
        done += file.size
        tell(done, total)
    store.add(manifest)
    if make_current:
        store.point(manifest.name, manifest.digest)
    report(f"{manifest.short} is in {store.url}{', and current there' if make_current else ''}")
    return manifest


def pull_weights(
    reference: str,
    registry: Registry,
    store: Store,
    report: Report,
    tell: Tell = _nobody,
    *,
    make_current: bool = True,
) -> Manifest:
    """Bring weights from the store into the registry: `name` for what is current there, or `name@digest`.

    Raises `StartRefused`: they are not there or not what their digest says, there is no room, or the store fails. What
    arrived whole or in part is kept for the next pull of the same digest.
    """
    registry.pointer(reference.partition("@")[0])  # raises for what cannot be a name
    wanted = store.find(reference)
    try:
        with one_at_a_time(registry, wanted.name, report):
            manifest = _already_there(registry, wanted) or _bring(wanted, registry, store, report, tell)
        if make_current:
            registry.point(manifest.name, manifest.digest, why="pull")
    except OSError as exc:
        raise StartRefused(f"{registry.root} cannot take {wanted.short}: {exc.strerror or exc}") from exc
    report(f"{manifest.short} is ready{', and current' if make_current else ''}")
    return manifest


def pull_missing(reference: str, registry: Registry, url: str, report: Report) -> None:
    """Pull `name` or `name@digest` where the registry has none; `current` is moved where only a name is given.

    Raises `StartRefused` as `pull_weights` does.
    """
    try:
        registry.find(reference)
    except UnknownWeights:
        pull_weights(reference, registry, Store(url), report, make_current="@" not in reference)


def _already_there(registry: Registry, wanted: Manifest) -> Manifest | None:
    try:
        found = registry.find(f"{wanted.name}@{wanted.digest}")
        registry.check(found)
    except (UnknownWeights, BrokenWeights):
        return None  # damaged: publishing the same digest replaces it
    return found


def _bring(wanted: Manifest, registry: Registry, store: Store, report: Report, tell: Tell) -> Manifest:
    folder = registry.half_pulled(wanted.name, wanted.digest)
    _require_room(wanted, folder)
    report(f"pulling {wanted.short} from {store.url} ({wanted.size_bytes / 1e6:.0f} MB)")
    done, total = 0, wanted.size_bytes
    with ThreadPoolExecutor(_PIECES_AHEAD, thread_name_prefix="pull") as pool:
        for name, file in sorted(wanted.files.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (left := file.size - _size(folder / name)) > 0:
                report(f"fetching {name} ({left / 1e6:.1f} MB)")
            _fetch(folder / name, file, store, pool, _past(tell, done, total))
            done += file.size
    facts = {name: getattr(wanted, name) for name in ("software", "base", "metrics", "settings", "kind", "fingerprint")}
    manifest = registry.publish(folder, wanted.name, wanted.source, expected=wanted.digest, **facts)
    shutil.rmtree(folder, ignore_errors=True)  # still there where somebody published them meanwhile
    return manifest


def _past(tell: Tell, before: int, total: int) -> Callable[[int], None]:
    """Tells of a file by its position, where `before` bytes of others are done."""
    return lambda here: tell(before + here, total)


def _require_room(wanted: Manifest, folder: Path) -> None:
    there = sum(min(_size(folder / name), file.size) for name, file in wanted.files.items())
    needed, free = wanted.size_bytes - there, shutil.disk_usage(folder).free
    if needed > free:
        raise StartRefused(
            f"{folder.parent} has {free // 1_000_000} MB free; {wanted.short} needs {needed // 1_000_000 + 1} MB more"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch(path: Path, file: FileDigest, store: Store, pool: Executor, at: Callable[[int], None]) -> None:
    """Make `path` the file, from as much of it as is there. `at` gets the position. Raises `BrokenWeights`."""
    is_begun = _size(path) > 0
    if _went_on(path, file, store, pool, at) == file.sha256:
        return
    path.unlink()
    # What was here before may have been torn by a power cut: then all of it is asked for again, once.
    if is_begun and _went_on(path, file, store, pool, at) == file.sha256:
        return
    path.unlink(missing_ok=True)
    raise BrokenWeights(
        f"files/{file.sha256} in {store.url} is damaged: its SHA-256 is another; not used "
        "(`refrain models push --resend` replaces it)"
    )


def _went_on(path: Path, file: FileDigest, store: Store, pool: Executor, at: Callable[[int], None]) -> str:
    """Append what is missing; the SHA-256 of it all. Killed, it leaves a file that is right as far as it goes."""
    sha256 = hashlib.sha256()
    with path.open("a+b") as out:
        out.seek(0)
        while block := out.read(1 << 20):
            sha256.update(block)
        here = out.tell()
        at(here)
        if here < file.size and (problem := store.problem_with(file)):
            raise BrokenWeights(f"{problem} in {store.url}: pushing these weights again sends it")
        for piece in _pieces(file, here, store, pool):
            out.write(piece)
            out.flush()
            sha256.update(piece)
            here += len(piece)
            at(here)
    return sha256.hexdigest()


def _pieces(file: FileDigest, start: int, store: Store, pool: Executor) -> Iterator[bytes]:
    """In order; the next few are asked for while one is written."""
    ahead = deque[Future[bytes]]()
    for begin in range(start, file.size, PIECE_BYTES):
        ahead.append(pool.submit(store.read, file, begin, min(begin + PIECE_BYTES, file.size)))
        if len(ahead) == _PIECES_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
