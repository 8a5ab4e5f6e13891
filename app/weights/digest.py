"""What weights *are*: one SHA-256 over the content of every file that can change an answer.

It owns the choice of those files, the digest, and the memory of files already hashed. It does not know where
weights come from or which are served.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import rfc8785

from app.weights.durable import write_whole

MANIFEST = "manifest.json"

Progress = Callable[[int], None]

# The rule leans to *more*: a file too many costs one cold cache, a file too few serves old answers for new weights.
# So every JSON file counts (configs of quantization, processors and pooling have many names), and what engines
# read besides: safetensors, Jinja templates, sentencepiece and tiktoken models, vocabularies.
_MATTERS = re.compile(r".+\.(safetensors|json|jinja|model|tiktoken)|tokenizer.*|vocab.*|merges\.txt")
# Written beside weights by trainers, never read by an engine.
_NEVER = re.compile(
    r"\..*|manifest\.json|(trainer_state|training_args|(train|eval|all|test)_results)\.json"
    r"|.*\.(bin|pt|pth|gguf|py|md|ckpt|h5|msgpack|onnx|lock|tmp)",
    re.IGNORECASE,
)
# Folders that are read: named chat templates, and sentence-transformers' modules (`1_Pooling`, `2_Dense`).
_FOLDERS = re.compile(r"(additional_)?chat_templates|\d+_[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class FileDigest:
    size: int
    sha256: str


def files_that_matter(folder: Path) -> list[str]:
    """The files that can change an answer: posix paths relative to `folder`, sorted. Links are followed."""
    names = [entry.name for entry in folder.iterdir() if _matters(entry)]
    for inner in folder.iterdir():
        if _FOLDERS.fullmatch(inner.name) and inner.is_dir():
            names += [f"{inner.name}/{entry.name}" for entry in inner.iterdir() if _matters(entry)]
    return sorted(names)


def _matters(entry: Path) -> bool:
    name = entry.name
    return bool(_MATTERS.fullmatch(name)) and not _NEVER.fullmatch(name) and entry.is_file()


def digest_files(
    folder: Path, *, memo: DigestMemo | None = None, progress: Progress | None = None
) -> dict[str, FileDigest]:
    """Hash every file that matters. `progress` gets the bytes as they are read, a remembered file's at once."""
    digest = memo.digest_file if memo else digest_file
    files = {name: digest(folder / name, progress) for name in files_that_matter(folder)}
    if memo:
        memo.save()
    return files


def digest_file(path: Path, progress: Progress | None = None) -> FileDigest:
    with _Counted(path, progress) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it asks for readinto alone
        return FileDigest(size=file.tell(), sha256=sha256)


def weights_digest(files: Mapping[str, FileDigest]) -> str:
    """The name of these weights: independent of order, sizes, times and places."""
    return canonical_sha256({name: file.sha256 for name, file in files.items()})


def canonical_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of RFC 8785 canonical JSON."""
    return hashlib.sha256(rfc8785.dumps(dict(value))).hexdigest()


class _Counted(FileIO):
    """A file that tells how many bytes are read from it."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        if self._progress and count:
            self._progress(count)
        return count


class DigestMemo:
    """Remembers the hash of files by (real path, size, mtime, ctime, inode), so that 15 GB are hashed once.

    It is a cache and nothing else: a broken, absent or unwritable file is an empty memo. Two processes that save
    at once may lose entries of one of them, which costs a hash.
    """

    # A file changed twice within the clock's grain keeps its times; git calls such an entry racy. Two seconds is
    # the coarsest grain in use (FAT; ext4 and xfs have milliseconds).
    RACY_S = 2.0

    def __init__(self, path: Path, bound: int = 4096) -> None:
        self._path = path
        self._bound = bound
        self._entries = self._load()
        self._changed = False

    def digest_file(self, path: Path, progress: Progress | None = None) -> FileDigest:
        real = os.path.realpath(path)
        before = self._mark(real)
        entry = self._entries.pop(real, None)
        if entry and entry[:-1] == before:
            self._entries[real] = entry  # moved to the end: the oldest use is forgotten first
            if progress:
                progress(before[0])
            return FileDigest(size=before[0], sha256=entry[-1])
        digest = digest_file(path, progress)
        if self._mark(real) == before and before[0] == digest.size and self._is_settled(before):
            self._entries[real] = [*before, digest.sha256]
        self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        merged = {**self._load(), **self._entries}
        self._entries = dict(list(merged.items())[-self._bound :])
        with suppress(OSError):  # a read-only home: hashed again at the next start
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._entries).encode())
            self._changed = False

    def _load(self) -> dict[str, list[Any]]:
        try:
            entries = json.loads(self._path.read_bytes())
            return {path: entry for path, entry in entries.items() if _is_entry(entry)}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    @staticmethod
    def _mark(real: str) -> list[int]:
        stat = os.stat(real)  # noqa: PTH116  # `real` is a string, as it is in the memo
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def _is_settled(self, mark: list[int]) -> bool:
        return time.time() - max(mark[1], mark[2]) / 1e9 > self.RACY_S


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    return all(isinstance(number, int) for number in entry[:-1]) and bool(re.fullmatch("[0-9a-f]{64}", str(entry[-1])))
