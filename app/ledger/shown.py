"""The ledger's sums as people read them, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from app.ledger.cost import BreakEven, Costs
from app.ledger.record import Prices
from app.ledger.sums import Sums, Tally

_BAR_CELLS = 24
_GENERATED, _SPARED = "green4", "light_green"


def table(sums: Sums) -> Table:
    """A row for each group, with a bar of its tokens: dark what was generated, light what need not be."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in sums.by:
        shown.add_column(name)
    for name in ("calls", "failed", "spared", "tokens in", "out", "not computed", "device", "cost"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    most = max((tally.tokens for tally in sums.groups.values()), default=0)
    for group, tally in sorted(sums.groups.items()):
        shown.add_row(*group, *cells(tally), _bar(tally, most))
    if len(sums.groups) != 1:
        shown.add_row(*["all", *[""] * (len(sums.by) - 1)][: len(sums.by)], *cells(sums.total), style="bold")
    return shown


def cells(tally: Tally) -> list[str]:
    return [
        f"{tally.calls:,}",
        f"{tally.failed:,}",
        percent(tally.spared_calls, tally.calls),
        f"{tally.prompt_tokens:,}",
        f"{tally.completion_tokens:,}",
        percent(tally.spared_tokens, tally.tokens),
        span(tally.device_s),
        money(tally.cost),
    ]


def _bar(tally: Tally, most: int) -> Text:
    cells = _BAR_CELLS * tally.tokens / most if most else 0.0
    spared = cells * tally.spared_tokens / tally.tokens if tally.tokens else 0.0
    generated = round(cells - spared)
    return Text("█" * generated, _GENERATED) + Text("░" * (round(cells) - generated), _SPARED)


def remarks(sums: Sums) -> Iterator[str]:
    if not sums.total.calls:
        yield "no calls"
    if sums.busy_s or sums.idle_s:
        yield (
            f"the devices worked for {span(sums.busy_s)} and stood idle for {span(sums.idle_s)}; "
            f"{span(sums.total.device_s)} are these calls'"
        )
    if sums.training:
        yield f"fine-tuning took {span(sum(sums.training.values()))} of device time"
    if sums.skipped_lines:
        yield f"{sums.skipped_lines} lines are not whole (torn by a crash, or being written), and not counted"


# --- `usage cost` --------------------------------------------------------------------------------


def costs(found: Costs, own: Prices) -> Iterator[RenderableType]:
    days = (found.last - found.first) / 86_400
    yield (
        f"{found.calls:,} calls, {found.tokens:,} tokens in {span(found.last - found.first)}"
        + (f", {found.tokens_per_day:,.0f} tokens a day" if days >= 1 else ", from which a day is reckoned")
    )
    if own == Prices():
        yield "no price is set, so money is 0: set REFRAIN_PRICE_DEVICE_HOUR, or REFRAIN_PRICE_*_PER_MILLION"
    yield ""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("what it cost")
    shown.add_column("device time", justify="right")
    shown.add_column("cost", justify="right")
    for model, device_s, cost in found.training:
        shown.add_row(f"training {model}", span(device_s), money(cost))
    shown.add_row("inference: answers", span(found.generation_s), money(found.generation_cost))
    shown.add_row("inference: other work of the engine", span(found.overhead_s), "")
    shown.add_row("inference: idle", span(found.idle_s), "")
    shown.add_row(
        "inference, all", span(found.generation_s + found.overhead_s + found.idle_s), money(found.device_cost)
    )
    shown.add_row("  per day", "", money(found.cost_per_day))
    shown.add_row("  per 1,000 tokens answered", "", money(found.cost_per_1000_tokens))
    yield shown
    yield ""
    yield _saved(found)
    yield (
        "  ~ is an estimate: cache and sharing as if these answers had been generated at the measured rate, batching "
        "as if each generation had had the devices alone for as long as it took"
    )
    yield ""
    yield _break_even(found.break_even, found)


def _saved(found: Costs) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("what was saved by")
    for name in ("calls", "tokens", "device time", "cost"):
        shown.add_column(name, justify="right")
    for saved in found.saved:
        seconds = f"~{span(saved.device_s)}" if saved.device_s else ""
        shown.add_row(
            saved.by,
            f"{saved.calls:,}",
            f"{saved.tokens:,}" if saved.tokens else "",
            seconds,
            f"~{money(saved.cost)}" if saved.cost else "",
        )
    return shown


def _break_even(even: BreakEven | None, found: Costs) -> str:
    if even is None:
        return (
            "against another API: set REFRAIN_COMPARE_PROMPT_PER_MILLION and REFRAIN_COMPARE_COMPLETION_PER_MILLION "
            "to its prices"
        )
    both = (
        f"the other API would cost {money(even.api_cost_per_day)} a day for these calls, this server costs "
        f"{money(even.own_cost_per_day)}"
    )
    if even.days is not None and even.tokens is not None:
        what = f"the training ({money(found.training_cost)})" if found.training_cost else "it, from the first day on"
        return f"{both}: pays for {what} after {span(even.days * 86_400)}, or {even.tokens:,.0f} tokens, at this rate"
    if even.needed_tokens_per_day is None:
        return f"{both}: it never pays, at any rate: each token costs more here"
    return (
        f"{both}: it never pays at this rate; it would from {even.needed_tokens_per_day:,.0f} tokens a day on "
        f"(now {found.tokens_per_day:,.0f}), if the devices can do that"
    )


# --- units ---------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """`12.3 s`, `4.5 min`, `6.7 h`, `8.9 days`."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.05 or not seconds else f"{seconds * 1000:.2g} ms"


def money(amount: float) -> str:
    """Without a currency, which is the reader's; small amounts keep their digits."""
    if not amount:
        return "0"
    return f"{amount:,.{2 if abs(amount) >= 1 else 3 - floor(log10(abs(amount)))}f}"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""
