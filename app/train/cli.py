"""`refrain finetune`: the job, and a look at its data. Every setting of `config.Job` is a flag."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app import settings
from app.errors import StartRefused
from app.train import config
from app.train.config import Job

finetune = typer.Typer(
    help="Make weights of your own: train, evaluate, try, publish.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

out = Console()
err = Console(stderr=True, highlight=False)


def _as_option(name: str) -> inspect.Parameter:
    """A field of the job as typer wants it: not given is None."""
    field = Job.model_fields[name]
    kind = field.annotation
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not types.NoneType)
    help_text = field.description or ""
    if get_origin(kind) is Literal:
        help_text, kind = f"{help_text} [{', '.join(get_args(kind))}]", str
    elif get_origin(kind) is dict:
        kind = str
    if not field.is_required() and field.get_default(call_default_factory=True, validated_data={}) not in (None, {}):
        help_text += f" [default: {field.default}]"
    annotation = Annotated[kind | None, typer.Option(help=help_text)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command(..., **flags)` gets one option for each setting of the job."""
    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "flags"]
    parameters = [*own, *(_as_option(name) for name in Job.model_fields)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


@finetune.command("run")
@_with_settings_as_options
def run(
    file: Annotated[Path | None, typer.Argument(help="A TOML file with the job's settings; flags win over it.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish although the gate is closed; it is recorded.")
    ] = False,
    **flags: Any,
) -> None:
    """Train and publish, in REFRAIN_WEIGHTS_STORE too. Killed, it goes on from the last whole checkpoint."""
    job, origins = config.load(file, **_decoded(flags))
    ours = settings.load()
    _require_the_packages()
    from app.train import job as jobs
    from app.train.training import world

    is_first = world().is_first
    if is_first:
        _show(job, origins)
    with _progress(is_shown=is_first) as (say, tell):
        outcome = jobs.run(job, ours.home, say, tell, force=force, store=ours.weights_store)
    if outcome is None:
        return
    reasons = outcome.evaluation.reasons
    err.print(f"report: {outcome.folder / 'report.html'}", soft_wrap=True)
    if reasons:
        err.print(f"the gate was closed and forced: {'; '.join(reasons)}", soft_wrap=True)
    out.print(f"published {outcome.manifest.name}@{outcome.manifest.digest[:12]}", soft_wrap=True, highlight=False)


@finetune.command("check")
@_with_settings_as_options
def check(
    file: Annotated[Path, typer.Argument(help="The rows (JSONL), or a job's TOML file.")],
    **flags: Any,
) -> None:
    """Validate every line, count, find repeats and leaks, estimate, and show two rows as the engine will see them."""
    given = _decoded(flags)
    if file.suffix == ".toml":
        job, _ = config.load(file, **given)
    else:
        job, _ = config.load(None, **({"name": "check", "data": file} | given))
    _require_the_packages()
    from app.train import look

    for line in look.look(job, settings.load().home, lambda line: err.print(line, soft_wrap=True)):
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def _decoded(flags: dict[str, Any]) -> dict[str, Any]:
    """A mapping comes as JSON."""
    import json

    given = {name: value for name, value in flags.items() if value is not None}
    if isinstance(given.get("min_pass"), str):
        try:
            given["min_pass"] = json.loads(given["min_pass"])
        except ValueError as error:
            raise StartRefused(f'--min-pass: JSON is needed, like {{"task": 0.9}} ({error})') from error
    return given


def _require_the_packages() -> None:
    from importlib.util import find_spec

    missing = [
        name for name in ("torch", "transformers", "trl", "peft", "datasets", "matplotlib") if not find_spec(name)
    ]
    if missing:
        raise StartRefused(
            f"{', '.join(missing)} is not installed: run `python3 deploy/install.py --for finetune`, "
            "or install refrain[train]"
        )


def _show(job: Job, origins: dict[str, str]) -> None:
    """Every setting with its origin. Without a terminal each is a whole line, however long."""
    values = {name: "" if (value := getattr(job, name)) is None else str(value) for name in Job.model_fields}
    if not err.is_terminal:
        for name, value in values.items():
            err.print(f"{name} = {value}  ({origins[name]})", soft_wrap=True, markup=False)
        return
    table = Table("setting", "value", "origin", box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(name, value, origins[name])
    err.print(table)


@contextmanager
def _progress(*, is_shown: bool) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """A bar with loss, rate and time left on a terminal, plain lines elsewhere, nothing in the other processes."""
    if not is_shown:
        yield lambda line: None, lambda step: None
    elif not err.is_terminal:
        yield lambda line: err.print(line, soft_wrap=True), _plain_lines()
    else:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, TextColumn("{task.fields[told]}"), console=err) as bar:
            yield lambda line: bar.console.print(line, soft_wrap=True), _on_a_bar(bar)


def _plain_lines() -> Callable[[Any], None]:
    import time

    first: list[tuple[float, int]] = []  # when the first step had been done, and which it was

    def tell(step: Any) -> None:
        if not first:
            first.append((time.monotonic(), step.number))
        each_s = (time.monotonic() - first[0][0]) / max(1, step.number - first[0][1])
        left = f", {each_s:.1f} s/step, {each_s * (step.total - step.number):.0f} s left" if each_s > 0.001 else ""
        if step.eval_loss is not None:
            err.print(f"step {step.number}/{step.total}: held-out loss {step.eval_loss:.3f}")
        elif step.loss is not None and (step.number == 1 or step.number % 5 == 0 or step.number == step.total):
            err.print(f"step {step.number}/{step.total}: loss {step.loss:.3f}{left}")

    return tell


def _on_a_bar(bar: Progress) -> Callable[[Any], None]:
    task = bar.add_task("training", total=None, told="", visible=False)
    seen = {"loss": "", "held out": ""}

    def tell(step: Any) -> None:
        if step.loss is not None:
            seen["loss"] = f"loss {step.loss:.3f}"
        if step.eval_loss is not None:
            seen["held out"] = f"held out {step.eval_loss:.3f}"
        speed = bar.tasks[0].speed
        rate = f"{1 / speed:.1f} s/step" if speed else ""
        told = "  ".join(filter(None, [*seen.values(), rate]))
        bar.update(task, total=step.total, completed=step.number, told=told, visible=True)

    return tell
