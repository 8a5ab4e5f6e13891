"""Compiled models on disk, under the home: each is whole, or it is gone.

What is loaded from here is machine code, so a file that a power cut, a full disk or another machine spoilt must not
get so far. A compilation is used by one process at a time until it is loaded: whoever comes second finds it made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.weights import write_whole

log = logging.getLogger(__name__)

# 7 MB each for a model of 30 layers; as many as a few models under a few settings need.
MOST_KEPT = 8
_SEAL = "whole.json"


@contextmanager
def kept(root: Path, key: str) -> Iterator[Path]:
    """The folder of one compilation, empty where there is none that is whole; what is in it at the end is kept.

    Raises:
        OSError: `root` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with (root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
        write_whole(folder / _SEAL, json.dumps(_digests(folder)).encode())
    _sweep(root, folder)


def machine() -> str:
    """What code that was compiled here needs to run elsewhere: the processor's instructions."""
    try:
        told = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    return f"{platform.machine()} {' '.join(sorted(told[1].split())) if told else platform.processor()}"


def _is_whole(folder: Path) -> bool:
    try:
        sealed = json.loads((folder / _SEAL).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(sealed, dict) and bool(sealed) and sealed.items() <= _digests(folder).items()


def _digests(folder: Path) -> dict[str, str]:
    """By path, of all that was made; lock files come and go."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != _SEAL
    }


def _sweep(root: Path, used: Path) -> None:
    """The one that was just used stays, and those that were used last before it."""
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=_used_at, reverse=True)
    for folder in [each for each in folders if each != used][MOST_KEPT - 1 :]:
        log.info("compilation %s was not used for long: removed", folder.name)
        shutil.rmtree(folder, ignore_errors=True)


def _used_at(folder: Path) -> float:
    """Its seal is written at each use. One without is being made at this moment, or it was never finished."""
    try:
        return (folder / _SEAL).stat().st_mtime
    except OSError:
        return folder.stat().st_mtime if folder.exists() else 0.0
