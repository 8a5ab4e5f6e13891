"""The ledger by day, as an SVG picture and as a page that stands alone. Made by hand: it is two dozen rectangles."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from html import escape

from app.ledger import shown
from app.ledger.sums import Sums, Tally

# From what costs most to what costs least; as good in print, and to those who do not see red and green apart.
_COLOURS = {
    "miss": "#1f4e5f",
    "bypass": "#4f7f8f",
    "none": "#b0b0b0",
    "shared": "#e0b252",
    "stale": "#b9d3a0",
    "hit": "#7fb069",
}
_NAMES = {"miss": "generated", "bypass": "generated, not cached", "none": "refused", "stale": "hit, past its time"}
_WIDTH, _LEFT, _TOP, _PLOT, _GAP, _BOTTOM = 860, 64, 56, 150, 56, 40
_INK, _FAINT = "#222", "#ddd"


def by_day(sums: Sums) -> str:
    """Two plots above each other, a bar for each day: calls by what the cache had, and device time.

    `sums` are by day and cache.
    """
    days = _days(sorted({day for day, _ in sums.groups}))
    calls = {day: {cache: _tally(sums, day, cache).calls for cache in _COLOURS} for day in days}
    device_s = {day: sum(_tally(sums, day, cache).device_s for cache in _COLOURS) for day in days}
    unit, size = _unit(max(device_s.values(), default=0.0))
    height = _TOP + 2 * _PLOT + _GAP + _BOTTOM
    seconds = {day: {"miss": value / size} for day, value in device_s.items()}
    size_of = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    font = f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size_of} {font}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _legend([cache for cache in _COLOURS if any(each[cache] for each in calls.values())]),
        _plot(calls, _TOP, "calls a day"),
        _plot(seconds, _TOP + _PLOT + _GAP, f"device time a day, {unit}"),
        _dates(days, height - _BOTTOM + 18),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _tally(sums: Sums, day: str, cache: str) -> Tally:
    return sums.groups.get((day, cache), Tally())


def _days(found: list[str]) -> list[str]:
    """All from the first to the last: a day without a call is a gap, not left out."""
    if not found:
        return []
    first, last = date.fromisoformat(found[0]), date.fromisoformat(found[-1])
    return [str(first + timedelta(days=number)) for number in range((last - first).days + 1)]


def _unit(most_s: float) -> tuple[str, float]:
    return next(
        (unit, size) for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if most_s >= size or unit == "s"
    )


def _legend(caches: list[str]) -> str:
    parts, x = [], float(_LEFT)
    for cache in caches:
        name = _NAMES.get(cache, cache)
        parts.append(f'<rect x="{x:.0f}" y="14" width="11" height="11" fill="{_COLOURS[cache]}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="24">{escape(name)}</text>')
        x += 32 + 6.6 * len(name)
    return "".join(parts)


def _plot(stacks: Mapping[str, Mapping[str, float]], top: int, title: str) -> str:
    """Stacked bars over a scale of round numbers."""
    step, count = _scale(max((sum(stack.values()) for stack in stacks.values()), default=0))
    most, base, right = step * count, top + _PLOT, _WIDTH - 16
    parts = [f'<text x="{_LEFT}" y="{top - 10}" font-weight="600">{escape(title)}</text>']
    for number in range(count + 1):
        y = base - _PLOT * number / count
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_FAINT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step * number:,.6g}</text>')
    pitch = (right - _LEFT) / max(1, len(stacks))
    width = min(48.0, pitch * 0.72)
    for place, stack in enumerate(stacks.values()):
        y = float(base)
        for name, value in stack.items():
            tall = _PLOT * value / most
            y -= tall
            if value:
                x = _LEFT + pitch * (place + 0.5) - width / 2
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{_COLOURS[name]}"/>'
                )
    return "".join(parts)


def _scale(most: float) -> tuple[float, int]:
    """A step of 1, 2 or 5 times a power of ten, and how many of them reach `most`."""
    if most <= 0:
        return 1.0, 1
    power = 1e-9
    while True:
        for factor in (1, 2, 5):
            step = factor * power
            if most / step <= 5:
                return step, max(1, -int(-most // step))
        power *= 10


def _dates(days: list[str], y: int) -> str:
    """As many as there is room for."""
    pitch = (_WIDTH - 16 - _LEFT) / max(1, len(days))
    every = max(1, -int(-46 // pitch))
    return "".join(
        f'<text x="{_LEFT + pitch * (place + 0.5):.1f}" y="{y}" text-anchor="middle">{day[5:]}</text>'
        for place, day in enumerate(days)
        if place % every == 0
    )


# --- the page ------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 880px; margin: 32px auto; padding: 0 16px }
h1 { font-size: 22px } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid #ddd } td.name, th.name { text-align: left }
svg { max-width: 100%; height: auto } p { color: #555 }
"""
_COLUMNS = ("calls", "failed", "spared", "tokens in", "out", "not computed", "device", "cost")


def page(drawn: str, sums: Sums) -> str:
    """The picture, and the sums below it."""
    head = "".join(f'<th class="name">{escape(name)}</th>' for name in sums.by)
    head += "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = [_row(group, tally) for group, tally in sorted(sums.groups.items())]
    rows.append(_row(("all", *[""] * (len(sums.by) - 1))[: len(sums.by)], sums.total))
    remarks = "".join(f"<p>{escape(line)}</p>" for line in shown.remarks(sums))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Refrain: usage</title>'
        f"<style>{_STYLE}</style></head><body><h1>Usage</h1>{drawn}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{remarks}</body></html>\n"
    )


def _row(group: tuple[str, ...], tally: Tally) -> str:
    names = "".join(f'<td class="name">{escape(name)}</td>' for name in group)
    return f"<tr>{names}{''.join(f'<td>{cell}</td>' for cell in shown.cells(tally))}</tr>"
