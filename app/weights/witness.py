"""Comparing what an engine says with what its weights said before, and remembering it where nobody wrote it down."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from app.domain import Weights
from app.weights.durable import write_whole
from app.weights.fingerprint import compare, is_comparable

log = logging.getLogger(__name__)


class Witness:
    """Published weights carry a fingerprint in their manifest. For others (a plain folder, a hub id, the default
    model) the first engine that loads them is believed, and its fingerprint is kept under `folder` by the digests of
    weights and settings: every later start has to say the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, weights: Weights, measured: dict[str, Any]) -> None:
        """Raises `Mismatch` where an engine that claims to serve `weights` says something else than they did."""
        if is_comparable(weights.fingerprint, measured):
            apart = compare(weights.fingerprint, measured)
            log.info("%s says what it said at publication (%.4f apart)", weights.short, apart)
            return
        path = self._folder / f"{weights.digest}-{weights.settings_digest[:16]}.json"
        if is_comparable(before := _read(path), measured):
            apart = compare(before, measured)
            log.info("%s says what it said when it was first served here (%.4f apart)", weights.short, apart)
            return
        if not measured.get("probes"):
            log.info("%s has no fingerprint: it does not generate", weights.short)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(measured).encode())
        except OSError as error:  # a read-only home: measured anew at the next start
            log.warning("the fingerprint of %s cannot be kept: %s", weights.short, error)
            return
        log.info("%s has no recorded fingerprint; what it says now is kept for later starts", weights.short)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
