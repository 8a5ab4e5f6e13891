"""An object store of weights, through fsspec: S3 and what speaks like it, other clouds, or a shared folder.

```
files/<sha256>                 a file of weights, under the name of its content; versions that share it hold it once
models/<name>/<digest>.json    the manifest: a version is there when this is, for it is written after all its files
models/<name>/current.json     which version the name stands for, written after that
```
Whatever a killed push leaves is whole. What it shares with the registry is the form of manifests and pointers;
credentials and addresses are found where the store's own library looks for them (`AWS_*`, ...).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from app.errors import StartRefused
from app.weights import manifest as manifests
from app.weights.digest import FileDigest
from app.weights.manifest import BrokenWeights, Manifest, UnknownWeights
from app.weights.registry import Moved, moved_from

# Where an object appears under its name when the last of its bytes is there. Elsewhere that is done by a rename.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_MANIFEST = re.compile(r"([0-9a-f]{64})\.json")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_PART = ".part"
# Nobody writes for so long at a file of the size that one is split into.
_ABANDONED_S = 24 * 3600


class Store:
    """Every method raises `StartRefused`, with one line, where the store does not do what it is asked to."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = _opened(self.url)
        self._has_folders = not _OBJECT_STORES & set(_protocols(self._fs))

    # --- versions

    def find(self, reference: str) -> Manifest:
        """What `name` stands for in the store, or `name@digest`, where the digest's first digits do."""
        name, _, prefix = reference.partition("@")
        if "@" not in reference:
            return self._manifest(name, self._current_of(name))
        if not _PREFIX.fullmatch(prefix):
            raise UnknownWeights(f"{reference!r}: after the @ come 4 to 64 hexadecimal digits of the digest")
        match [prefix] if len(prefix) == 64 else self._digests(name, prefix):
            case [digest]:
                return self._manifest(name, digest)
            case []:
                raise UnknownWeights(f"no weights {reference!r} in {self.url}")
            case several:
                raise UnknownWeights(f"{reference!r} is ambiguous in {self.url}: {_shortened(several)}")

    def add(self, manifest: Manifest) -> None:
        """Make a version visible, whose files are all there. One that is there and whole stays as it is."""
        with suppress(UnknownWeights, BrokenWeights):
            self._manifest(manifest.name, manifest.digest)
            return
        self._put_bytes(f"models/{manifest.name}/{manifest.digest}.json", manifests.encode(manifest))

    def point(self, name: str, digest: str) -> None:
        path = f"models/{name}/current.json"
        before = self._bytes(path)
        if before is None or getattr(moved_from(before), "digest", None) != digest:
            self._put_bytes(path, msgspec.json.encode(Moved(digest, int(time.time()), "push")))

    # --- files

    def problem_with(self, file: FileDigest) -> str | None:
        """What is wrong with a file at first sight; None where one of the right size is there."""
        with self._told():
            try:
                size = self._fs.info(self._path(file))["size"]
            except FileNotFoundError:
                return f"files/{file.sha256} is missing"
        return None if size == file.size else f"files/{file.sha256} has {size} bytes, not {file.size}"

    def put(self, local: Path, file: FileDigest, at: Callable[[int], None]) -> None:
        """`at` gets the position, as often as the store's library tells of it."""
        from fsspec.callbacks import Callback

        callback = Callback(size=file.size, hooks={"at": lambda size, value, **_: at(min(value, size))})
        with self._told(), self._whole(self._path(file)) as path:
            self._fs.put_file(str(local), path, callback=callback)

    def read(self, file: FileDigest, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`."""
        with self._told():
            content: bytes = self._fs.cat_file(self._path(file), start=start, end=end)
            return content

    # --- below

    def _path(self, file: FileDigest) -> str:
        return f"{self._root}/files/{file.sha256}"

    def _manifest(self, name: str, digest: str) -> Manifest:
        path = f"models/{name}/{digest}.json"
        content = self._bytes(path)
        if content is None:
            raise UnknownWeights(f"no weights {name}@{digest[:12]} in {self.url}")
        manifest = manifests.decode(content, f"{self.url}/{path}")
        if (manifest.name, manifest.digest) != (name, digest):
            raise BrokenWeights(f"{self.url}/{path} is the manifest of {manifest.short}")
        return manifest

    def _current_of(self, name: str) -> str:
        content = self._bytes(f"models/{name}/current.json")
        if content is not None:
            if moved := moved_from(content):
                return moved.digest
            raise BrokenWeights(f"{self.url}/models/{name}/current.json is damaged: push {name!r} again")
        if there := self._digests(name, ""):
            raise UnknownWeights(f"no weights of {name!r} are current in {self.url}; there are {_shortened(there)}")
        raise UnknownWeights(f"no weights called {name!r} in {self.url}")

    def _digests(self, name: str, prefix: str) -> list[str]:
        with self._told():
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(f"{self._root}/models/{name}", detail=False)
            except FileNotFoundError:
                return []
        found = (_MANIFEST.fullmatch(path.rpartition("/")[2]) for path in paths)
        return sorted(match[1] for match in found if match and match[1].startswith(prefix))

    def _bytes(self, path: str) -> bytes | None:
        with self._told():
            try:
                content: bytes = self._fs.cat_file(f"{self._root}/{path}")
            except FileNotFoundError:
                return None
            return content

    def _put_bytes(self, path: str, content: bytes) -> None:
        with self._told(), self._whole(f"{self._root}/{path}") as target:
            self._fs.pipe_file(target, content)

    @contextmanager
    def _whole(self, path: str) -> Iterator[str]:
        """Where to write what shall be seen under `path` when it is all there, and not before."""
        if not self._has_folders:
            yield path
            return
        folder = path.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        self._sweep(folder)
        beside = f"{path}.{secrets.token_hex(6)}{_PART}"
        yield beside
        self._fs.mv(beside, path)

    def _sweep(self, folder: str) -> None:
        """Remove what pushes left that were killed long ago."""
        for path in self._fs.ls(folder, detail=False):
            if path.endswith(_PART):
                with suppress(FileNotFoundError, NotImplementedError):
                    if time.time() - self._fs.modified(path).timestamp() > _ABANDONED_S:
                        self._fs.rm_file(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The errors of a dozen libraries as one line. That a file is missing may be an answer, caught inside."""
        try:
            yield
        except StartRefused:
            raise
        except PermissionError as exc:
            raise StartRefused(f"{self.url} refuses: {_line(exc)}; are the credentials the right ones?") from exc
        except Exception as exc:  # botocore's, aiohttp's, the system's: for the operator all of them are one thing
            if type(exc).__name__ in _NO_CREDENTIALS:
                raise StartRefused(f"no credentials for {self.url}; for S3: AWS_ACCESS_KEY_ID, or a role") from exc
            raise StartRefused(f"{self.url} does not answer as it should ({type(exc).__name__}: {_line(exc)})") from exc


_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}


def _opened(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as exc:
        more = "pip install 'refrain[s3]'" if url.startswith("s3") else _line(exc)
        raise StartRefused(f"{url} needs a library that is not installed: {more}") from exc
    except ValueError as exc:
        raise StartRefused(f"{url} is no store: {_line(exc)}") from exc
    return fs, str(root).rstrip("/")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _line(exc: Exception) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


def _shortened(digests: list[str]) -> str:
    return ", ".join(digest[:12] for digest in digests)
