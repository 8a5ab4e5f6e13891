"""From a folder to served weights: copied beside, tried in the real engine, published by digest, made current."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import app
from app.errors import StartRefused
from app.weights.digest import files_that_matter
from app.weights.manifest import Manifest
from app.weights.registry import Registry
from app.weights.resolve import require_weights

# What a trial may take: an engine's start and a few answers, on a machine that is busy with something else.
TRIAL_S = 1800.0

Report = Callable[[str], None]


def publish_folder(
    folder: Path, name: str, registry: Registry, report: Report, *, base: str | None = None, make_current: bool = True
) -> Manifest:
    """Publish `folder` as `name`, after a trial; with `base` (a registry name) as a LoRA adapter of it.

    Killed at any moment it leaves nothing that is listed, or all of it. Raises `StartRefused` with one line: nothing is
    published then, unless the line says that `current` could not be moved.
    """
    if not folder.is_dir():
        raise StartRefused(f"{folder} is no folder")
    of = registry.find(base) if base is not None else None
    kind: Literal["model", "adapter"] = "model" if of is None else "adapter"
    if of is None:
        require_weights(folder)
    elif not (folder / "adapter_config.json").is_file():
        raise StartRefused(f"{folder} holds no adapter_config.json: it is no LoRA adapter")
    with registry.stage(name) as staged:
        report(f"copying {folder}")
        _copy(folder, staged)
        report("trying it in the engine")
        found = run_trial(staged) if of is None else run_trial(registry.check(of), adapter=staged)
        manifest = registry.publish(
            staged,
            name,
            {"kind": "folder", "folder": folder.name},
            software={"refrain": app.__version__},
            base=of.digest if of else None,
            kind=kind,
            fingerprint=found["fingerprint"],
        )
    if make_current:
        registry.point(name, manifest.digest, why="publish")
    report(f"published {manifest.short}{', now current' if make_current else ''}")
    return manifest


def run_trial(weights: Path, *, adapter: Path | None = None, ask: Path | None = None) -> dict[str, Any]:
    """What `python -m app.engine.trial` finds; raises `StartRefused` with its one line where it fails."""
    with tempfile.TemporaryDirectory(prefix="refrain-trial-") as folder:
        out = Path(folder) / "trial.json"
        command = [sys.executable, "-m", "app.engine.trial", str(weights), "--out", str(out)]
        command += ["--adapter", str(adapter)] if adapter else []
        command += ["--ask", str(ask)] if ask else []
        # The child must find this package wherever it was started from, as we did.
        path = os.pathsep.join([str(Path(app.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TRIAL_S, env=os.environ | {"PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            raise StartRefused(f"the trial of {weights} took more than {TRIAL_S:.0f} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            told = next((line for line in reversed(lines) if line.startswith("trial: ")), lines[-1] if lines else "")
            raise StartRefused(f"the trial failed: {told.removeprefix('trial: ') or f'exit code {done.returncode}'}")
        found: dict[str, Any] = json.loads(out.read_bytes())
        return found


def _copy(folder: Path, staged: Path) -> None:
    """What can change an answer, and nothing else; links become what they lead to."""
    for name in files_that_matter(folder):
        (staged / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, staged / name)
