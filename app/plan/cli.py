"""`refrain plan`: what fits, how fast, at what cost."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.engine import compiles
from app.errors import StartRefused
from app.plan.arithmetic import Load, Plan, plan, point
from app.plan.machines import CARDS, GIB, Gpus, Machine
from app.plan.shape import Shape, shape_of
from app.settings import Settings
from app.settings import load as load_settings

if TYPE_CHECKING:
    from app.plan.against import Measured

out = Console()
err = Console(stderr=True, highlight=False)
BATCHES = (1, 16)


def command(
    model: Annotated[
        str | None, typer.Option(help="Registry name, local directory, or hub id; by default what is served.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help=f"this (the machine's processor, measured), or {', '.join(CARDS)}.")
    ] = "this",
    gpus: Annotated[int, typer.Option(min=1, help="Cards that one replica is split over (tensor parallel).")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of a typical call.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Answer of a typical call.")] = 128,
    price_hour: Annotated[
        float, typer.Option(min=0, help="Price of the replica's machine per hour, in any money.")
    ] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default the weights' own.")] = None,
    quantization: Annotated[str | None, typer.Option(help="fp8, int8, awq, gptq, mxfp4, nvfp4.")] = None,
    utilization: Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of a card's memory that is used.")] = 0.9,
    against: Annotated[str | None, typer.Option(help="URL of a running server: measure it, and compare.")] = None,
    key: Annotated[str | None, typer.Option(help="API key for it.", envvar="REFRAIN_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, tokens/s and cost of a model on a machine, from arithmetic; `--against` holds a running server to it."""
    from app.plan.against import measure
    from app.weights import DEFAULT_MODEL, Registry, config_folder, pull_default

    settings = load_settings()
    named, registry = model or settings.model, Registry(settings.weights_root)
    if named == DEFAULT_MODEL:
        pull_default(registry, err.print)
    folder, name = config_folder(named, registry, err.print)
    shape = shape_of(folder, name, dtype=dtype, quantization=quantization or settings.quantization)
    machine = _machine(gpu, gpus, utilization, shape, settings)
    load = Load(prompt_tokens, output_tokens)
    kv_bytes = (settings.kv_cache_gib or 2) * float(GIB) if gpu == "this" else None
    found = plan(shape, machine, load, kv_bytes=kv_bytes, price_hour=price_hour)
    measured = asyncio.run(measure(against, load, list(BATCHES), key=key)) if against else []
    if as_json:
        out.print_json(data=_told(found, measured, gpus))
        return
    _show(found, gpus)
    if measured:
        _compare(found, measured)


def _machine(gpu: str, count: int, utilization: float, shape: Shape, settings: Settings) -> Machine:
    if gpu == "this":
        from app.plan.processor import measured

        if shape.quantization:
            raise StartRefused("quantized weights on a processor are not in this arithmetic; name a card with --gpu")
        threads = settings.cpu_threads or len(os.sched_getaffinity(0))
        with err.status("measuring this machine's kernels at the model's sizes"):
            return measured(shape, threads=threads, is_compiled=compiles(settings))
    if gpu not in CARDS:
        raise StartRefused(f"there is no card {gpu!r}; known: this, {', '.join(CARDS)}")
    if shape.kv_heads % count:
        raise StartRefused(
            f"{shape.name} has {shape.kv_heads} key-value heads, which {count} cards cannot share evenly"
        )
    return Gpus(CARDS[gpu], gpu, count, utilization)


def _show(found: Plan, gpus: int) -> None:
    shape = found.shape
    facts = Table(box=None, show_header=False, pad_edge=False)
    moe = f", {shape.experts_per_token} of {shape.experts} experts a token" if shape.experts > 1 else ""
    facts.add_row("model", f"{shape.name}: {shape.parameters / 1e9:.2f}B parameters{moe}")
    facts.add_row("weights", f"{shape.weight_bytes / GIB:.2f} GiB ({shape.quantization or shape.dtype})")
    facts.add_row("machine", f"{found.machine.name}, {found.machine.memory_bytes / GIB:.1f} GiB for weights and cache")
    facts.add_row("cache per token", f"{shape.kv_bytes_per_token / 1024:.1f} KiB")
    facts.add_row("cache", f"{found.kv_room_bytes / GIB:.1f} GiB, {found.kv_tokens:,} tokens")
    facts.add_row(
        "at the same time",
        f"{found.concurrency:,} calls of {found.load.prompt_tokens} + {found.load.output_tokens} tokens",
    )
    out.print(facts)
    table = Table("batch", "tokens/s", "each", "first token", "per million tokens", box=None, pad_edge=False)
    for each in found.points:
        cost = "" if each.cost_per_million is None else f"{each.cost_per_million:.2f}"
        table.add_row(
            str(each.batch),
            f"{each.tokens_per_s:,.0f}",
            f"{each.tokens_per_s_each:.0f}",
            f"{each.first_token_s * 1000:.0f} ms",
            cost,
        )
    out.print(table)
    out.print(found.machine.assumptions(), style="dim")
    if gpus > 1:
        out.print(
            "Split over cards: tensor parallel within one machine; see deploy/SIZING.md for the others.", style="dim"
        )


def _compare(found: Plan, measured: list[Measured]) -> None:
    table = Table("batch", "planned tokens/s", "measured", "measured / planned", box=None, pad_edge=False)
    for each in measured:
        planned = point(found.shape, found.machine, found.load, each.batch).tokens_per_s
        table.add_row(
            str(each.batch), f"{planned:,.0f}", f"{each.tokens_per_s:,.0f}", f"{each.tokens_per_s / planned:.2f}"
        )
    out.print(table)


def _told(found: Plan, measured: list[Measured], gpus: int) -> dict[str, object]:
    shape = found.shape
    return {
        "model": shape.name,
        "machine": found.machine.name,
        "gpus": gpus,
        "parameters": shape.parameters,
        "weight_bytes": shape.weight_bytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "kv_tokens": found.kv_tokens,
        "concurrency": found.concurrency,
        "load": asdict(found.load),
        "points": [asdict(each) for each in found.points],
        "measured": [
            asdict(each) | {"planned": point(shape, found.machine, found.load, each.batch).tokens_per_s}
            for each in measured
        ],
        "assumptions": found.machine.assumptions(),
    }


def mount(cli: typer.Typer) -> None:
    cli.command("plan")(command)
