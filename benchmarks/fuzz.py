"""Hostile input for as long as is asked for: schemathesis on the wire, atheris on what takes bytes apart.

`python -m benchmarks fuzz --minutes 10` gives each of the two so long. Found: crashes, and 5xx over bad input; there
should be none. What crashed a target lies in `.cache/fuzz/`; `python -m benchmarks.fuzz_child TARGET FILE` replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fuzz_child import CORPUS
from benchmarks.servers import ROOT, refrain

_SETTINGS = {"REFRAIN_ENGINE": "scripted", "REFRAIN_SCRIPTED_TOKENS_PER_S": "5000"}
# 504 is what HTTP prescribes for `only-if-cached` without a recording; 501 is no fault either.
EXPECTED = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "504"]\n'


def run(*, quick: bool = False, rounds: int | None = None, save: bool = False, minutes: float = 1.0) -> dict[str, Any]:
    """Both kinds, so many minutes each; `rounds` is the seed."""
    seconds, seed = (10.0 if quick else minutes * 60), rounds or 1
    return {"bytes": _bytes(seconds, seed), "wire": _wire(seconds, seed)}


# --- what takes bytes apart ----------------------------------------------------------------------------------------


def _bytes(seconds: float, seed: int) -> dict[str, Any]:
    from benchmarks.fuzz_targets import TARGETS

    return {name: _one(name, seconds / len(TARGETS), seed) for name in TARGETS}


def _one(target: str, seconds: float, seed: int) -> dict[str, Any]:
    """One target in a process of its own, guided by coverage where atheris is there."""
    CORPUS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz_child", target, str(seconds), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * 3 + 120, check=False)
    told = (done.stdout + done.stderr).splitlines()
    counts = [line for line in told if line.startswith("Done ") or "runs in" in line]
    found: dict[str, Any] = {"crashed": done.returncode != 0, "told": counts[-1] if counts else told[-1:]}
    if done.returncode != 0:
        found["last"] = "\\n".join(told[-25:])
    return found


# --- the wire ------------------------------------------------------------------------------------------------------


def _wire(seconds: float, seed: int) -> dict[str, Any]:
    """Schemathesis against a server of its own: calls made from our OpenAPI document, good and bad."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schemathesis.toml").write_text(EXPECTED)
        with refrain(Path(folder) / "home", Path(folder), **_SETTINGS) as server:
            server.wait_ok("/readyz")
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
            command += ["--checks", "not_a_server_error", "--max-time", str(round(seconds)), "--seed", str(seed)]
            command += ["--max-examples", "100000", "--phases", "examples,coverage,fuzzing", "--no-color"]
            command += ["--suppress-health-check", "all", "--request-timeout", "20", "--generation-database", "none"]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds * 2 + 300,
                check=False,
            )
            statuses = _statuses(server.url)
            lives = server.process.poll() is None
    failed = [] if done.returncode == 0 else done.stdout.splitlines()[-60:]
    return {"exit": done.returncode, "statuses": statuses, "server lives": lives, "failures": failed}


def _statuses(url: str) -> dict[str, int]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        sample.labels["status"]: int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "refrain_http_responses_total"
    }
