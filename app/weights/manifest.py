"""The manifest: what lies in a published folder, and where it came from. Written last, so it says "complete"."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from app.errors import StartRefused
from app.weights.digest import MANIFEST, FileDigest, weights_digest

SCHEMA = 1


class UnknownWeights(StartRefused):
    """Raised when no published weights are called that."""


class BrokenWeights(StartRefused):
    """Raised when published weights are not what their manifest says, or the manifest itself cannot be read."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One set of published weights. Fields that a newer Refrain adds are ignored; a new `schema` is refused.

    `source` says where the files came from (`{"kind": "pip", ...}`, `{"kind": "finetune", ...}`). `base`, `metrics` and
    `settings` are the training job's: the digest of the base, what was measured, and the settings that made it.
    `kind` is "model", or "adapter" for a LoRA adapter of the weights whose digest `base` is. `fingerprint` is what the
    engine said to fixed probes at the trial (see `fingerprint.py`); empty where there was none.
    """

    schema: int
    name: str
    digest: str
    files: dict[str, FileDigest]
    created: int
    source: dict[str, Any]
    software: dict[str, str] = {}
    base: str | None = None
    metrics: dict[str, float] = {}
    settings: dict[str, Any] = {}
    kind: Literal["model", "adapter"] = "model"
    fingerprint: dict[str, Any] = {}

    @property
    def short(self) -> str:
        return f"{self.name}@{self.digest[:12]}"

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def read(folder: Path) -> Manifest:
    """The manifest of a published folder; `BrokenWeights` if it is absent, unreadable or contradicts itself."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise BrokenWeights(f"{path} cannot be read: {exc}") from exc
    return decode(content, str(path))


def decode(content: bytes, path: str) -> Manifest:
    """The manifest that `content` is; `path` says in messages where it lies. Raises `BrokenWeights`."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (ValueError, msgspec.MsgspecError) as exc:
        raise BrokenWeights(f"{path} cannot be read: {exc}") from exc
    if manifest.schema != SCHEMA:
        raise BrokenWeights(f"{path} has schema {manifest.schema}; this version of Refrain reads {SCHEMA}")
    if bad := [name for name in manifest.files if not _is_inside(name)]:
        raise BrokenWeights(f"{path} names a file outside its folder: {bad[0]!r}")
    if weights_digest(manifest.files) != manifest.digest:
        raise BrokenWeights(f"{path} contradicts itself: its files do not make the digest it states")
    return manifest


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(re.fullmatch(r"[^\\\0]+", name)) and not path.is_absolute() and ".." not in path.parts
