"""Which checkpoint to go on from: the newest that is whole. The trainer does not write them atomically.

A folder cut off by a kill lacks files or holds torn ones. `trainer_state.json` is written last, and every file is
opened, so what is taken here is what the trainer will be able to load.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from app.weights import write_whole

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_whole(folder: Path) -> Path | None:
    found = sorted(_in(folder), key=_step, reverse=True)
    return next((each for each in found if not why_broken(each)), None)


def remove_broken(folder: Path) -> list[str]:
    """Remove what was cut off, so that the trainer neither loads nor counts it; says what and why."""
    removed = []
    for each in _in(folder):
        if why := why_broken(each):
            shutil.rmtree(each)
            removed.append(f"{each.name} {why}")
    return removed


def why_broken(checkpoint: Path) -> str:
    """Empty if it is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        if state["global_step"] != _step(checkpoint):
            return f"says that it is of step {state['global_step']}"
    except (OSError, ValueError, KeyError):
        return "was not finished"
    tensors = list(checkpoint.glob("*.safetensors")) or list(checkpoint.glob("pytorch_model_fsdp*"))
    if not tensors:
        return "holds no weights"
    for path in tensors:
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, "pt") as opened:  # checks the header against the file's length
                opened.keys()
        except (OSError, SafetensorError):
            return f"holds a torn {path.name}"
    for path in sorted(each for each in checkpoint.iterdir() if each.suffix in {".pt", ".pth", ".bin"}):
        if not _is_whole_archive(path):
            return f"holds a torn {path.name}"
    return ""


def _is_whole_archive(path: Path) -> bool:
    """PyTorch's files are zip archives; their checksums are read, nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def forget_later(metrics: Path, step: int) -> float:
    """Drop the lines of steps that will be done again, and a last torn one; returns the seconds spent so far."""
    if not metrics.exists():
        return 0.0
    kept, spent_s = [], 0.0
    for line in metrics.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line + b"\n")
                spent_s = float(entry["spent_s"])
        except (ValueError, KeyError):
            continue
    write_whole(metrics, b"".join(kept))
    return spent_s


def _in(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if _NAME.fullmatch(each.name)] if folder.is_dir() else []


def _step(checkpoint: Path) -> int:
    named = _NAME.fullmatch(checkpoint.name)
    return int(named[1]) if named else -1
