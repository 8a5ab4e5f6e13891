"""`refrain usage`: what was used, by whom, and what it cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from app.errors import StartRefused
from app.settings import Settings, load

usage = typer.Typer(
    help="What was used, by whom, and what it cost: sums over the ledger of this home.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Without a terminal nothing is cut to its width.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)

Since = Annotated[str | None, typer.Option(help="From when on: 7d, 12h, 2026-11-25, or a date with a time (UTC).")]
Until = Annotated[str | None, typer.Option(help="Until before when, given like --since.")]
Model = Annotated[str | None, typer.Option(help="Only this model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _failing_in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartRefused(f"{error.filename or 'the ledger'}: {error.strerror or error}") from error


@usage.callback()
@_failing_in_one_line()
def show(
    context: typer.Context,
    by: Annotated[str, typer.Option(help="tenant, key, model, weights, day, cache, endpoint, status, finish.")] = "day",
    since: Since = None,
    until: Until = None,
    model: Model = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that stands alone, with a picture.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the picture alone.")] = None,
    as_json: Json = False,
) -> None:
    """Calls, tokens, device-seconds and cost; several names for --by are set apart by commas."""
    if context.invoked_subcommand is not None:
        return
    from app.ledger import picture, shown
    from app.ledger.sums import Question, dimensions, moment, summed

    settings = load()
    question = Question(dimensions(by), moment(since), moment(until), model)
    sums = summed(_folder(settings), question)
    if as_json:
        out.print_json(data=sums.told())
        return
    if html or svg:
        days = summed(settings.ledger_root, Question(("day", "cache"), question.since, question.until, model))
        drawn = picture.by_day(days)
        if svg:
            svg.write_text(drawn, encoding="utf-8")
        if html:
            html.write_text(picture.page(drawn, sums), encoding="utf-8")
        err.print(f"written: {', '.join(str(path) for path in (html, svg) if path)}", soft_wrap=True)
        return
    out.print(shown.table(sums))
    for line in shown.remarks(sums):
        out.print(line, soft_wrap=True)


@usage.command("cost")
@_failing_in_one_line()
def cost(
    since: Since = None,
    until: Until = None,
    model: Model = None,
    idle_is_free: Annotated[
        bool, typer.Option("--idle-is-free", help="Count the devices only while they work, as where others share them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What training and inference cost, what was saved, and when weights of your own pay for themselves."""
    from app.ledger import shown
    from app.ledger.cost import costs
    from app.ledger.record import Prices
    from app.ledger.sums import Question, moment

    settings = load()
    found = costs(
        _folder(settings),
        Question((), moment(since), moment(until), model),
        Prices.own(settings),
        Prices.compared(settings),
        devices=settings.devices,
        idle_is_free=idle_is_free,
    )
    if found is None:
        raise StartRefused("the ledger has no call of that time and model")
    if as_json:
        out.print_json(data=found.told())
        return
    for part in shown.costs(found, Prices.own(settings)):
        out.print(part, soft_wrap=isinstance(part, str))


@usage.command("export")
@_failing_in_one_line()
def export(
    parquet: Annotated[Path | None, typer.Option(help="Write one Parquet file (needs pyarrow).")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write one file of JSON lines.")] = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Every record, in one file."""
    from app.ledger import exports
    from app.ledger.sums import moment

    if (parquet is None) == (jsonl is None):
        raise StartRefused("say where to: --parquet FILE or --jsonl FILE")
    records = exports.records(_folder(load()), moment(since), moment(until))
    if parquet is not None:
        count = exports.to_parquet(parquet, records)
    elif jsonl is not None:
        count = exports.to_jsonl(jsonl, records)
    err.print(f"{count} records in {parquet or jsonl}", soft_wrap=True)


def _folder(settings: Settings) -> Path:
    if not settings.ledger_root.is_dir():
        raise StartRefused(f"there is no ledger in {settings.home}: nothing was ever served from it")
    return settings.ledger_root
