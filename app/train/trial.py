"""Weights in the real engine, in a child process: they must load and answer before anybody is served by them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import app
from app.errors import StartRefused

# What launchers of distributed training set would tell the engine that it is one of several.
_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "OMP_",
    "FSDP_",
)


@dataclass(frozen=True, slots=True)
class Asked:
    id: str
    messages: list[dict[str, Any]]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What the engine said."""

    answers: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class TrialFailed(StartRefused):
    """Raised when weights do not load in the engine, or answer nothing: they are not published."""


def trial(weights: Path, questions: Sequence[Asked], home: Path, *, adapter: Path | None = None) -> Trial:
    """Load `weights` (with `adapter` on them) in an engine of its own and ask; `TrialFailed` with its last words."""
    with tempfile.TemporaryDirectory(prefix="refrain-trial-") as scratch:
        out, ask = Path(scratch, "out.json"), Path(scratch, "ask.json")
        told = [{"id": each.id, "messages": each.messages, "max_tokens": each.max_tokens} for each in questions]
        ask.write_text(json.dumps(told))
        command = [sys.executable, "-m", "app.engine.trial", str(weights), "--out", str(out), "--ask", str(ask)]
        command += ["--adapter", str(adapter)] if adapter else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(home))
        if done.returncode or not out.is_file():
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise TrialFailed(f"the engine does not serve these weights (exit {done.returncode}): {said[-1]}")
        found = json.loads(out.read_bytes())
    answers = {each["id"]: each["text"] for each in found["answers"]}
    if missing := {each.id for each in questions} - answers.keys():
        raise TrialFailed(f"the engine left {len(missing)} questions unanswered, {min(missing)} among them")
    return Trial(answers, found.get("fingerprint") or {}, float(found.get("seconds", 0.0)))


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    path = os.pathsep.join(filter(None, [str(Path(app.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    return kept | {"REFRAIN_HOME": str(home), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
