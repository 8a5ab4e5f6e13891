"""API keys: made, limited, listed, revoked in one small file; checked by hash, in constant time.

A key is `rf-` and 32 random bytes, so a plain SHA-256 is enough to store (nothing to guess, nothing to
salt). The running server sees a change of the file within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from filelock import FileLock

from app.domain import NO_LIMITS, Caller, Limits, Priority
from app.errors import StartRefused, Unauthenticated
from app.gate.limits import NONE_OF_ITS_OWN, OwnLimits

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Key(msgspec.Struct, frozen=True):
    """What is kept of a key; `id` is public, and what logs and `revoke` name it by."""

    id: str
    tenant: str
    sha256: str
    created: int
    admin: bool = False
    priority: Priority = Priority.INTERACTIVE
    limits: OwnLimits = NONE_OF_ITS_OWN


class KeyFile:
    """The file of keys. Writers take a lock and replace it whole; readers never see half of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Key]:
        """All keys. Raises StartRefused where the file is there and cannot be understood."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Key])
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:  # msgspec's errors, and bad UTF-8, are ValueErrors
            raise StartRefused(f"the keys in {self._path} cannot be read: {error}") from error

    def create(
        self,
        tenant: str,
        *,
        admin: bool = False,
        priority: Priority = Priority.INTERACTIVE,
        limits: OwnLimits = NONE_OF_ITS_OWN,
    ) -> tuple[str, Key]:
        """A new key: its secret, shown this once, and what is kept of it. Raises StartRefused on a bad tenant name."""
        if not _TENANT.fullmatch(tenant):
            raise StartRefused(f"{tenant!r} is no tenant name: letters, digits, and . _ @ - within, 64 at most")
        secret = f"rf-{secrets.token_urlsafe(32)}"
        key = Key(f"key_{secrets.token_hex(6)}", tenant, _hash(secret), int(time.time()), admin, priority, limits)
        with self._writing():
            self._write([*self.read(), key])
        return secret, key

    def revoke(self, key_id: str) -> Key:
        """Take a key back. Raises StartRefused where there is none of that id."""
        with self._writing():
            keys = self.read()
            for key in keys:
                if key.id == key_id:
                    self._write([other for other in keys if other is not key])
                    return key
        raise StartRefused(f"there is no key {key_id}; `refrain keys list` shows them")

    def limit(self, key_id: str, given: Mapping[str, str | None]) -> Key:
        """Change some limits of a key. Raises StartRefused where there is none of that id, or these are no limits."""
        with self._writing():
            keys = self.read()
            for at, key in enumerate(keys):
                if key.id == key_id:
                    keys[at] = msgspec.structs.replace(key, limits=key.limits.changed(given))
                    self._write(keys)
                    return keys[at]
        raise StartRefused(f"there is no key {key_id}; `refrain keys list` shows them")

    def stamp(self) -> tuple[int, int] | None:
        """Changes when the file does."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _writing(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._path}.lock")

    def _write(self, keys: list[Key]) -> None:
        beside = self._path.with_suffix(".tmp")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(keys), indent=1))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)


class Gate:
    """Who a request is from. Without any key (loopback only) everybody is the tenant `default`."""

    def __init__(self, file: KeyFile, defaults: Limits = NO_LIMITS, *, is_locked: bool = False) -> None:
        """`defaults` are the limits of who has none of its own. `is_locked`: there were keys before, so without any
        nobody may enter.

        Raises:
            StartRefused: the file cannot be understood.
        """
        self._file = file
        self._defaults = defaults
        self._anybody = Caller(limits=defaults)
        self._looked = time.monotonic()
        self._stamp = file.stamp()
        self._keys = _by_hash(file.read(), defaults)
        self._had_keys = is_locked or bool(self._keys)

    @property
    def is_open(self) -> bool:
        # Once there were keys, revoking the last one must not open the door.
        return not self._had_keys

    def admit(self, presented: str | None) -> Caller:
        """The caller that a key stands for.

        Raises:
            Unauthenticated: no key, or none of ours, where keys are required.
        """
        self._refresh()
        if self.is_open:
            return self._anybody
        if not presented:
            raise Unauthenticated("an API key is required: send it as `Authorization: Bearer <key>`")
        known = self._keys.get(_hash(presented))
        # The dictionary finds by hash of the secret; the comparison settles it in constant time.
        if known is None or not hmac.compare_digest(known.sha256, _hash(presented)):
            raise Unauthenticated("the API key is not valid")
        return known.caller

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        stamp = self._file.stamp()
        if stamp == self._stamp and self._keys:
            return
        try:
            self._keys = _by_hash(self._file.read(), self._defaults)
        except StartRefused as error:
            # Somebody wants keys, and it is not clear which: those we know stay in force, and no door is open.
            if stamp != self._stamp:
                log.warning("%s; until they can be, those known before stay in force", error)
            self._had_keys = True
        self._stamp = stamp
        self._had_keys = self._had_keys or bool(self._keys)


class _Known(NamedTuple):
    sha256: str
    caller: Caller


def _by_hash(keys: list[Key], defaults: Limits) -> dict[str, _Known]:
    return {key.sha256: _Known(key.sha256, _caller(key, defaults)) for key in keys}


def _caller(key: Key, defaults: Limits) -> Caller:
    try:
        return Caller(key.tenant, key.id, key.admin, key.priority, key.limits.over(defaults))
    except ValueError as error:
        raise StartRefused(f"the keys cannot be read: {key.id}: {error}") from error


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
