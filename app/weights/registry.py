"""The registry: published weights on a disk, `<root>/<name>/<digest>/`, and which of them is current.

A folder is published by a rename, after its manifest was written as the last of its files: whatever a reader
sees under a digest is complete. Everything else in `<root>/<name>/` starts with a dot (work under way) or is one of
the two pointer files. It does not know what weights are for.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from app.weights import manifest as manifests
from app.weights.digest import MANIFEST, FileDigest, Progress, digest_file, digest_files, files_that_matter
from app.weights.digest import weights_digest as digest_of
from app.weights.durable import append_line, sync, sync_tree, write_whole
from app.weights.manifest import BrokenWeights, Manifest, UnknownWeights

if TYPE_CHECKING:
    from filelock import BaseFileLock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_STAGED = ".stage-"
_PULLED = ".pulled-"
# A folder without its lock file was cut off between two system calls, or its file system keeps no locks.
_ABANDONED_S = 3600
# Small files are hashed at every start: an edit of the same length (`"temperature": 0.7` to `0.2`) is the likeliest
# damage, and a megabyte costs a millisecond.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    digest: str
    size_bytes: int
    created: int
    is_current: bool


@dataclass(frozen=True, slots=True)
class Problem:
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, slots=True)
class Moved:
    """One move of the pointer `current`, as `current.json` and every line of `history.jsonl` hold it."""

    digest: str
    at: int
    why: str = ""


class Registry:
    """Reading takes no lock and writes nothing, so a read-only mount is enough to serve."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # --- reading

    def path(self, name: str, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise UnknownWeights(f"{digest!r} is no digest: 64 hexadecimal digits are")
        return self._home(name) / digest

    def knows(self, name: str) -> bool:
        """Whether anything is published under `name`; False also for what cannot be a name."""
        return bool(_NAME.fullmatch(name)) and bool(self._digests(name))

    def find(self, reference: str) -> Manifest:
        """The weights called `name` (the current ones) or `name@digest`, where the digest's first digits do."""
        name, _, prefix = reference.partition("@")
        digests = self._digests(name)
        if not digests:
            raise UnknownWeights(f"no weights called {name!r} in {self.root}")
        if "@" not in reference:
            return self._read(name, self._current_of(name, digests))
        if not _PREFIX.fullmatch(prefix):
            raise UnknownWeights(f"{reference!r}: after the @ come 4 to 64 hexadecimal digits of the digest")
        match [digest for digest in digests if digest.startswith(prefix)]:
            case [digest]:
                return self._read(name, digest)
            case []:
                raise UnknownWeights(f"no weights {reference!r} in {self.root}; there are {_shortened(digests)}")
            case several:
                raise UnknownWeights(f"{reference!r} is ambiguous: {_shortened(several)}")

    def current(self, name: str) -> str | None:
        """The digest that `current` points at; None where it was never set. `BrokenWeights` if it cannot be read."""
        moved = self._pointer(name)
        return moved.digest if moved else None

    def pointer(self, name: str) -> Path:
        """The file that is replaced when `current` moves: to be watched, not to be read."""
        return self._home(name) / "current.json"

    def history(self, name: str) -> tuple[Moved, ...]:
        """Every move of the pointer, oldest first; lines torn by a crash are left out."""
        try:
            lines = (self._home(name) / "history.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return ()
        return tuple(moved for line in lines if (moved := moved_from(line)))

    def list(self) -> tuple[Row, ...]:
        """Everything published, by name, newest first. What is under way or unreadable is not listed."""
        rows = []
        for home in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if not _NAME.fullmatch(home.name):
                continue
            current = self._pointer_or_none(home.name)
            for digest in self._digests(home.name):
                try:
                    found = self._read(home.name, digest)
                except BrokenWeights:
                    continue
                rows.append(Row(home.name, digest, found.size_bytes, found.created, digest == current))
        return tuple(sorted(rows, key=lambda row: (row.name, -row.created, row.digest)))

    def check(self, manifest: Manifest) -> Path:
        """The folder of these weights, after a look that costs milliseconds: names, sizes, small files' hashes.

        Raises `BrokenWeights`. `verify` is the look that reads everything.
        """
        folder = self.path(manifest.name, manifest.digest)
        if problems := _differences(folder, manifest.files, hash_up_to=_SMALL_BYTES):
            raise BrokenWeights(f"{manifest.short} is damaged: {problems[0]}; publish it again")
        return folder

    def verify(self, name: str, digest: str, progress: Progress | None = None) -> tuple[Problem, ...]:
        """Read every byte; empty if the files that matter are what was published. `UnknownWeights` if there is none."""
        folder = self.path(name, digest)
        if not folder.is_dir():
            raise UnknownWeights(f"no weights {name}@{digest[:12]} in {self.root}")
        try:
            manifest = self._read(name, digest)
        except BrokenWeights as exc:
            return (Problem(MANIFEST, str(exc)),)
        return tuple(_differences(folder, manifest.files, hash_up_to=None, progress=progress))

    # --- writing

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """An empty folder on the registry's own disk, to fill and `publish`. What is left of it is removed on leaving.

        Its lock lives as long as this process: what a killed one leaves is swept away by the next `stage`.
        """
        home = self._home(name)
        home.mkdir(parents=True, exist_ok=True)
        self._sweep(home)
        folder = home / f"{_STAGED}{secrets.token_hex(8)}"
        at_work = lock(folder.with_name(f"{folder.name}.lock"))
        with at_work:
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                Path(at_work.lock_file).unlink(missing_ok=True)

    def publish(
        self,
        staged: Path,
        name: str,
        source: Mapping[str, Any],
        *,
        software: Mapping[str, str] | None = None,
        base: str | None = None,
        metrics: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        kind: Literal["model", "adapter"] = "model",
        fingerprint: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        expected: str | None = None,
    ) -> Manifest:
        """Make `staged` the weights `name@<digest>`, on the disk when this returns; `current` is not moved.

        If that digest is there and whole, its manifest is returned and `staged` is left to its owner; if it is there
        and damaged, it is replaced. Raises `BrokenWeights` for a folder that cannot be published, or whose digest is
        not the one that was `expected`.
        """
        home = self._home(name)
        # 1. What they are.
        for file in staged.rglob("*"):
            if file.is_symlink():
                raise BrokenWeights(f"{file} is a link; published weights hold their files themselves")
        files = digest_files(staged, progress=progress)
        if not any(file.endswith(".safetensors") for file in files):
            raise BrokenWeights(f"{staged} holds no *.safetensors: there are no weights to publish")
        if kind == "adapter" and not base:
            raise BrokenWeights(f"{staged} is an adapter, and nothing says of which weights")
        digest = digest_of(files)
        if expected not in (None, digest):
            raise BrokenWeights(f"{staged} holds {digest[:12]}, not {str(expected)[:12]}: not published")
        manifest = Manifest(
            schema=manifests.SCHEMA,
            name=name,
            digest=digest,
            files=files,
            created=int(time.time()),
            source=dict(source),
            software=dict(software or {}),
            base=base,
            metrics=dict(metrics or {}),
            settings=dict(settings or {}),
            kind=kind,
            fingerprint=dict(fingerprint or {}),
        )
        # 2. Everything on the disk, and the manifest last.
        (staged / MANIFEST).unlink(missing_ok=True)
        _share(staged)
        sync_tree(staged)
        write_whole(staged / MANIFEST, manifests.encode(manifest))
        # 3. One rename makes it visible.
        target = home / manifest.digest
        with self._locked(home):
            if target.exists():
                if not self.verify(name, manifest.digest):
                    return self._read(name, manifest.digest)
                target.rename(home / f"{_STAGED}{secrets.token_hex(8)}")  # damaged: the next sweep takes it
            staged.rename(target)
            sync(home)
        return manifest

    def point(self, name: str, digest: str, why: str = "") -> None:
        """Make `digest` current: readers see the old or the new. Raises if it is not there or damaged at first sight.

        The pointer is moved first and the history written after it. A crash between the two leaves a history that
        lacks the last move; the pointer holds it whole, so the next `point` writes it down first.
        """
        with self._locked(self._existing(name)):
            self._move(name, digest, why)

    def rollback(self, name: str, to: str | None = None) -> Moved:
        """Point `current` at what was current before, or at `to` (a digest); returns the move.

        A rollback takes back the last publication that is still in force: A, B, C were published, and rolling back
        twice gives B, then A. What was published after a rollback is taken back to where the rollback had led. To go
        forward again, name the digest. Raises `UnknownWeights` where there is nothing before.
        """
        with self._locked(self._existing(name)):
            before = self._pointer_or_repair(name)
            moves = self.history(name)
            if before and moves[-1:] != (before,):
                moves = (*moves, before)
            there = self._digests(name)
            target = to or next((digest for digest in reversed(_in_force(moves)[:-1]) if digest in there), None)
            if target is None:
                raise UnknownWeights(f"nothing was current before in {name!r}: name what to go to, with --to")
            return self._move(name, target, "rollback")

    def unused(self, name: str, keep: int, in_use: Set[str], *, younger_than_s: float = 3600) -> tuple[Row, ...]:
        """What may be removed: neither current, nor one of the last `keep` that were, nor in use (digests; the bases of
        kept adapters count), nor so young that its publisher may be about to make it current."""
        recent: dict[str, None] = dict.fromkeys(move.digest for move in reversed(self.history(name)))
        kept = {self._pointer_or_none(name), *list(recent)[:keep], *in_use}
        rows = self.list()
        kept |= {self._read(row.name, row.digest).base for row in rows if row.name != name or row.digest in kept}
        young = time.time() - younger_than_s
        return tuple(row for row in rows if row.name == name and row.digest not in kept and row.created <= young)

    def remove(self, name: str, digest: str) -> None:
        """Take weights out of the registry: gone from every list at once, from the disk a moment later."""
        home = self._existing(name)
        with self._locked(home):
            if self._pointer_or_none(name) == digest:
                raise BrokenWeights(f"{name}@{digest[:12]} is current and stays")
            gone = home / f"{_STAGED}{secrets.token_hex(8)}"
            self.path(name, digest).rename(gone)
            sync(home)
        shutil.rmtree(gone, ignore_errors=True)

    def half_pulled(self, name: str, digest: str) -> Path:
        """A folder on the registry's own disk for weights that come in pieces, to fill and `publish`: what a killed
        pull of `digest` left is in it. What pulls of other digests left is removed, for it may be large.

        Under the lock of `pull.one_at_a_time` alone.
        """
        folder = self.path(name, digest).with_name(f"{_PULLED}{digest}")
        for other in folder.parent.glob(f"{_PULLED}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # --- below

    def _home(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise UnknownWeights(
                f"{name!r} cannot be a name: up to 96 letters, digits and . _ -, a letter or digit first"
            )
        return self.root / name

    def _existing(self, name: str) -> Path:
        if not self._digests(name):
            raise UnknownWeights(f"no weights called {name!r} in {self.root}")
        return self._home(name)

    def _move(self, name: str, digest: str, why: str) -> Moved:
        """Move the pointer, under the lock; nothing is written where it stands there already."""
        home = self._home(name)
        if not self.path(name, digest).is_dir():
            raise UnknownWeights(f"no weights {name}@{digest[:12]} in {self.root}")
        self.check(self._read(name, digest))
        before, history = self._pointer_or_repair(name), self.history(name)
        if before and history[-1:] != (before,):
            append_line(home / "history.jsonl", msgspec.json.encode(before))
        if before and before.digest == digest:
            return before
        moved = Moved(digest, int(time.time()), why)
        write_whole(self.pointer(name), msgspec.json.encode(moved))
        append_line(home / "history.jsonl", msgspec.json.encode(moved))
        return moved

    def _read(self, name: str, digest: str) -> Manifest:
        folder = self.path(name, digest)
        manifest = manifests.read(folder)
        if (manifest.name, manifest.digest) != (name, digest):
            raise BrokenWeights(f"{folder} holds the manifest of {manifest.short}")
        return manifest

    def _digests(self, name: str) -> tuple[str, ...]:
        home = self._home(name)
        if not home.is_dir():
            return ()
        return tuple(sorted(entry.name for entry in home.iterdir() if _DIGEST.fullmatch(entry.name)))

    def _current_of(self, name: str, digests: tuple[str, ...]) -> str:
        current = self.current(name)
        if current is None:
            # Never guessed, not even when there is only one: publishing and serving are two decisions.
            raise UnknownWeights(f"no weights of {name!r} are current; name them {name}@digest: {_shortened(digests)}")
        if current not in digests:
            raise BrokenWeights(f"{name!r} points at {current[:12]}, which is not in {self.root}: publish it again")
        return current

    def _pointer(self, name: str) -> Moved | None:
        path = self.pointer(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise BrokenWeights(f"{path} cannot be read: {exc}") from exc
        if moved := moved_from(content):
            return moved
        raise BrokenWeights(f"{path} is damaged: point {name!r} at published weights again")

    def _pointer_or_repair(self, name: str) -> Moved | None:
        """A damaged pointer must not stop the move that repairs it."""
        try:
            return self._pointer(name)
        except BrokenWeights:
            return None

    def _pointer_or_none(self, name: str) -> str | None:
        moved = self._pointer_or_repair(name)
        return moved.digest if moved else None

    @contextmanager
    def _locked(self, home: Path) -> Iterator[None]:
        with lock(home / ".lock"):
            yield

    def _sweep(self, home: Path) -> None:
        """Remove what killed processes left: their locks are free. Work keeps its lock, however long it takes."""
        from filelock import Timeout

        for stem in {entry.name.removesuffix(".lock") for entry in home.iterdir() if entry.name.startswith(_STAGED)}:
            folder, lock_file = home / stem, home / f"{stem}.lock"
            try:
                if lock_file.exists():
                    with lock(lock_file, timeout=0):
                        shutil.rmtree(folder, ignore_errors=True)
                        lock_file.unlink(missing_ok=True)
                elif time.time() - folder.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
            except (Timeout, FileNotFoundError):
                continue  # at work; or another process swept it first


def lock(path: Path, timeout: float = -1) -> BaseFileLock:
    from filelock import FileLock  # 50 ms that a start from published weights need not wait for

    return FileLock(path, timeout=timeout)


def _differences(
    folder: Path, files: Mapping[str, FileDigest], hash_up_to: int | None, progress: Progress | None = None
) -> list[Problem]:
    """Where `folder` is not what `files` say; files larger than `hash_up_to` are compared by size alone."""
    there = files_that_matter(folder) if folder.is_dir() else []
    problems = [Problem(name, "is missing") for name in sorted(files.keys() - set(there))]
    for name in there:
        if name not in files:
            problems.append(Problem(name, "is not in the manifest, and can change an answer"))
            continue
        expected, size = files[name], (folder / name).stat().st_size
        if size != expected.size:
            problems.append(Problem(name, f"has {size} bytes, not {expected.size}"))
        elif (hash_up_to is None or size <= hash_up_to) and digest_file(folder / name, progress) != expected:
            problems.append(Problem(name, "holds other content than was published"))
    return problems


def _in_force(moves: Sequence[Moved]) -> list[str]:
    """The publications that no rollback has taken back, oldest first; the last is what the moves end at."""
    stack: list[str] = []
    for move in moves:
        if move.why == "rollback" and move.digest in stack:
            del stack[len(stack) - stack[::-1].index(move.digest) :]
        elif stack[-1:] != [move.digest]:
            stack.append(move.digest)
    return stack


def moved_from(line: bytes) -> Moved | None:
    """A move as it is kept; None where that is torn or something else."""
    try:
        moved = msgspec.json.decode(line, type=Moved)
    except (ValueError, msgspec.MsgspecError):
        return None
    return moved if _DIGEST.fullmatch(moved.digest) else None


def _share(folder: Path) -> None:
    """safetensors writes with mode 0600; whoever may enter the registry must be able to read what is published."""
    mode = folder.stat().st_mode & 0o777
    for entry in folder.rglob("*"):
        entry.chmod(mode if entry.is_dir() else mode & 0o666)


def _shortened(digests: Sequence[str]) -> str:
    return ", ".join(digest[:12] for digest in digests)
