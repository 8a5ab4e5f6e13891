"""Training on real parts, a model of 12 million parameters: it publishes, it survives, it refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from app.errors import StartRefused
from app.train import job as jobs
from app.train.checkpoints import newest_whole, remove_broken, why_broken
from app.train.config import Job
from app.weights import Registry, Store, pull_weights
from tests.ledger.reading import records

from .conftest import command, environment, losses, make_job, rows, write

# Sums in another order (two processes, another start) move a loss of about 5 in its fourth digit.
NOISE = 0.02


def run(job: Job, home: Path, **options: Any) -> jobs.Outcome:
    outcome = jobs.run(job, home, lambda line: None, lambda step: None, **options)
    assert outcome is not None
    return outcome


def the_run(home: Path) -> Path:
    (folder,) = (home / "train" / "bot").iterdir()
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, jobs.Outcome]:
    """A job that nobody disturbed, for comparison: its home and its outcome."""
    home = tmp_path_factory.mktemp("whole")
    return home, run(make_job(home / "data", tiny), home, store=f"file://{home / 'store'}")


# --- what comes out


def test_a_job_publishes_weights_that_have_learned(whole: tuple[Path, jobs.Outcome], tiny: Path) -> None:
    home, outcome = whole
    registry = Registry(home / "weights")
    manifest = registry.find("bot")
    assert manifest == outcome.manifest
    assert registry.verify("bot", manifest.digest) == ()
    by_step = losses(outcome.folder)
    assert list(by_step) == list(range(1, 9))
    assert by_step[8] < by_step[1] - 0.3
    assert manifest.metrics["eval_loss"] < manifest.metrics["base_eval_loss"] - 0.3
    published = registry.path("bot", manifest.digest)
    changed = safetensors.torch.load_file(published / "model.safetensors")
    before = safetensors.torch.load_file(tiny / "model.safetensors")
    assert changed.keys() == before.keys()
    assert {tensor.dtype for tensor in changed.values()} == {torch.bfloat16}
    moved = {name for name in before if not torch.equal(before[name], changed[name])}
    assert moved == {name for name in before if "_proj" in name}, "LoRA on every linear layer, and nothing else"


def test_with_a_store_the_weights_are_current_there_too(whole: tuple[Path, jobs.Outcome], tmp_path: Path) -> None:
    home, outcome = whole
    elsewhere = Registry(tmp_path / "weights")
    assert pull_weights("bot", elsewhere, Store(f"file://{home / 'store'}"), print).digest == outcome.manifest.digest
    assert elsewhere.find("bot").metrics == outcome.manifest.metrics


def test_everything_but_the_weights_is_the_bases_byte_by_byte(whole: tuple[Path, jobs.Outcome], tiny: Path) -> None:
    home, outcome = whole
    published = Registry(home / "weights").path("bot", outcome.manifest.digest)
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            assert (published / path.name).read_bytes() == path.read_bytes()


def test_the_manifest_says_what_made_these_weights(whole: tuple[Path, jobs.Outcome]) -> None:
    _, outcome = whole
    manifest = outcome.manifest
    assert manifest.base
    assert manifest.source["kind"] == "finetune"
    assert len(manifest.source["data_sha256"]) == 64
    assert manifest.settings["learning_rate"] == 3e-3
    assert len(manifest.settings["template_sha256"]) == 64
    assert manifest.settings["gate"] == {"reasons": [], "forced": False}
    assert {"torch", "trl", "peft", "transformers", "refrain", "python"} <= manifest.software.keys()
    assert manifest.metrics["device_seconds"] > 0
    assert manifest.metrics["steps"] == 8
    assert "/" not in json.dumps({key: value for key, value in manifest.settings.items() if key != "base"})


def test_a_run_leaves_a_picture_and_a_page(whole: tuple[Path, jobs.Outcome]) -> None:
    _, outcome = whole
    assert (outcome.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss, before and after" in (outcome.folder / "report.html").read_text()


def test_the_merged_weights_say_what_the_adapter_on_the_base_says(whole: tuple[Path, jobs.Outcome], tiny: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    home, outcome = whole
    merged = AutoModelForCausalLM.from_pretrained(
        Registry(home / "weights").path("bot", outcome.manifest.digest), dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, outcome.folder / "final")
    ids = torch.arange(100, 130)[None]
    untuned = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    says = merged(ids).logits
    rounding, learning = ((says - other(ids).logits).abs().max() for other in (adapted, untuned))
    assert rounding < learning / 20


def test_an_adapter_is_published_as_one_and_names_its_base(tiny: Path, tmp_path: Path) -> None:
    outcome = run(make_job(tmp_path / "d", tiny, adapter=True, max_steps=2), tmp_path)
    folder = Registry(tmp_path / "weights").path("bot", outcome.manifest.digest)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "manifest.json",
    }
    assert (outcome.manifest.kind, len(outcome.manifest.base or "")) == ("adapter", 64)
    assert str(tiny) not in (folder / "adapter_config.json").read_text()


def test_a_full_fine_tune_changes_every_layer(tiny: Path, tmp_path: Path) -> None:
    outcome = run(make_job(tmp_path / "d", tiny, method="full", max_steps=2), tmp_path)
    published = Registry(tmp_path / "weights").path("bot", outcome.manifest.digest)
    changed = safetensors.torch.load_file(published / "model.safetensors")
    before = safetensors.torch.load_file(tiny / "model.safetensors")
    assert changed.keys() == before.keys()
    assert all(not torch.equal(before[name], changed[name]) for name in before if "proj" in name or "embed" in name)


def test_packed_rows_do_not_see_each_other(tiny: Path, tmp_path: Path) -> None:
    """All 8 rows in one sequence have the loss of 8 rows in one batch."""
    data = write(tmp_path / "rows.jsonl", rows(8))
    job = {"data": data, "max_steps": 1, "warmup_steps": 0, "dtype": "float32", "max_length": 512}
    batch = run(make_job(tmp_path / "d", tiny, batch_size=8, **job), tmp_path / "a")
    packed = run(make_job(tmp_path / "d", tiny, batch_size=1, packing=True, **job), tmp_path / "b")
    assert losses(packed.folder)[1] == pytest.approx(losses(batch.folder)[1], abs=1e-3)


def test_early_stopping_ends_where_the_held_out_loss_rises_and_keeps_the_best(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "d", tiny, early_stopping=1, learning_rate=3.0, max_steps=40, warmup_steps=2)
    outcome = run(job, tmp_path)
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(measured) < 20
    assert measured[-1] > min(measured)
    assert outcome.manifest.metrics["eval_loss"] == pytest.approx(min(measured))


# --- what is refused


def test_the_same_job_twice_at_once_is_refused(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "d", tiny, max_steps=2)

    def meanwhile(step: Any) -> None:
        with pytest.raises(StartRefused, match="another process is at work on this very job"):
            run(job, tmp_path)

    assert jobs.run(job, tmp_path, lambda line: None, meanwhile)


def test_below_the_gate_nothing_is_published_unless_forced_and_then_it_is_recorded(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "d", tiny, max_steps=2, max_loss_ratio=0.01)
    with pytest.raises(jobs.GateClosed, match="not published: held-out loss"):
        run(job, tmp_path)
    registry = Registry(tmp_path / "weights")
    assert registry.list() == ()
    assert (the_run(tmp_path) / "report.html").exists(), "the report is there to see why"
    forced = run(job, tmp_path, force=True).manifest
    assert forced.settings["gate"]["forced"] is True
    assert forced.settings["gate"]["reasons"][0].startswith("held-out loss")
    assert registry.current("bot") == forced.digest
    paid = sorted(records(tmp_path, kind="training"), key=lambda record: record.time)
    assert [(record.weights, record.endpoint) for record in paid] == [
        ("bot@", "train"),
        ("bot@", "evaluate"),
        ("bot@", "evaluate"),
    ], "trained once, evaluated twice"
    assert paid[0].device_s + paid[2].device_s == pytest.approx(forced.metrics["device_seconds"], abs=0.1)


def test_a_loss_that_is_no_number_ends_the_job_and_nothing_is_published(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "d", tiny, method="full", learning_rate=1e30, warmup_steps=0, dtype="float32")
    with pytest.raises(StartRefused, match=r"step \d: the loss is (nan|inf): training has diverged"):
        run(job, tmp_path)
    assert Registry(tmp_path / "weights").list() == ()


def test_a_full_disk_ends_the_job_in_one_line_and_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: both come from the kernel, at any write."""
    job = make_job(tmp_path / "d", tiny, max_steps=4)
    small = 100_000
    ended = subprocess.run(
        command(job),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)),
    )
    assert ended.returncode == 1
    assert "is full: free some space" in ended.stderr.splitlines()[-1], ended.stderr
    assert "Traceback" not in ended.stderr
    assert Registry(tmp_path / "weights").list() == ()
    assert run(job, tmp_path).manifest.metrics["steps"] == 4


# --- kill -9


def kill(job: Job, home: Path, event: str, suffix: str, count: int) -> None:
    told = home / "job.json"
    told.write_text(job.model_dump_json())
    ended = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(told), str(home), event, suffix, str(count)],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(
    ("event", "suffix", "count", "goes_on_from"),
    [
        ("step", "", 3, 2),  # between two checkpoints
        ("open", "checkpoint-6/trainer_state.json", 1, 4),  # in the middle of writing one
        ("open", "final/adapter_config.json", 1, 8),  # after the last step, while the result is saved
    ],
    ids=["between checkpoints", "while a checkpoint is written", "after the last step"],
)
def test_killed_in_training_the_same_command_goes_on_and_ends_with_the_same_loss(
    tiny: Path, tmp_path: Path, whole: tuple[Path, jobs.Outcome], event: str, suffix: str, count: int, goes_on_from: int
) -> None:
    job = make_job(tmp_path / "data", tiny)
    kill(job, tmp_path, event, suffix, count)
    registry = Registry(tmp_path / "weights")
    assert registry.list() == ()
    newest = newest_whole(the_run(tmp_path) / "checkpoints")
    assert newest is not None
    assert newest.name == f"checkpoint-{goes_on_from}"
    outcome = run(job, tmp_path)
    undisturbed = losses(whole[1].folder)
    after = losses(outcome.folder)
    assert list(after) == list(undisturbed), "each step is told once"
    assert after == pytest.approx(undisturbed, abs=NOISE)
    assert outcome.manifest.metrics["eval_loss"] == pytest.approx(whole[1].manifest.metrics["eval_loss"], abs=NOISE)
    assert registry.verify("bot", outcome.manifest.digest) == ()
    spent = [json.loads(line)["spent_s"] for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert spent == sorted(spent), "seconds are counted over both runs"
    assert outcome.manifest.metrics["device_seconds"] >= round(spent[-1], 1), "in tenths"


@pytest.fixture
def checkpoint(whole: tuple[Path, jobs.Outcome], tmp_path: Path) -> Path:
    """A copy of the newest one."""
    newest = newest_whole(whole[1].folder / "checkpoints")
    assert newest is not None
    return Path(shutil.copytree(newest, tmp_path / newest.name))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "was not finished"),
        (lambda folder: halve(folder / "trainer_state.json"), "was not finished"),
        (lambda folder: halve(folder / "adapter_model.safetensors"), "holds a torn adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda folder: halve(folder / "optimizer.pt"), "holds a torn optimizer.pt"),
        (lambda folder: halve(folder / "rng_state.pth"), "holds a torn rng_state.pth"),
    ],
)
def test_a_torn_checkpoint_is_seen_and_an_older_one_taken(
    checkpoint: Path, damage: Callable[[Path], None], told: str
) -> None:
    assert why_broken(checkpoint) == ""
    older = Path(shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-1")))
    state = json.loads((older / "trainer_state.json").read_text())
    (older / "trainer_state.json").write_text(json.dumps(state | {"global_step": 1}))
    damage(checkpoint)
    assert why_broken(checkpoint) == told
    assert newest_whole(checkpoint.parent) == older
    assert remove_broken(checkpoint.parent) == [f"{checkpoint.name} {told}"]
    assert not checkpoint.exists()


# --- several processes


def test_two_processes_learn_what_one_does(tiny: Path, tmp_path: Path) -> None:
    """torchrun, gloo: half the rows of each step in each process; one of them merges and publishes.

    A known gap: the first two steps agree to 0.002, then float32 losses of 10 drift apart by up to 0.03 within 8 steps,
    the same in every run, so more than the order of sums differs; what, is not known yet.
    """
    job = make_job(tmp_path / "data", tiny, dtype="float32")
    alone = run(job, tmp_path / "alone")
    home = tmp_path / "together"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        command(job, launcher=launcher), env=environment(home), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("published bot@") == 1
    manifest = Registry(home / "weights").find("bot")
    assert manifest.settings["processes"] == 2
    assert losses(the_run(home)) == pytest.approx(losses(alone.folder), abs=0.06)
    assert manifest.metrics["eval_loss"] == pytest.approx(alone.manifest.metrics["eval_loss"], abs=0.06)


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(StartRefused, match="batch_size 4 cannot be shared among 3 processes"):
        run(make_job(tmp_path / "d", tiny, data=write(tmp_path / "x.jsonl", rows(4))), tmp_path)
