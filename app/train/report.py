"""What a run leaves to look at: the picture of the loss, and one HTML page with before and after side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One question, before and after."""

    group: str
    question: str
    before: str
    after: str
    before_failed: tuple[str, ...]
    after_failed: tuple[str, ...]


def draw_loss(metrics: Path, picture: Path) -> None:
    """Training loss by step, and the held-out loss where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="#2f6f4f", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c25b1e", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=130)


def write_html(
    path: Path, title: str, figures: Mapping[str, Any], settings: Mapping[str, str], rows: Sequence[Row]
) -> None:
    """The page stands alone but for `loss.png` beside it."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=title, figures=figures, settings=settings, rows=rows
    )
    path.write_text(page, encoding="utf-8")
