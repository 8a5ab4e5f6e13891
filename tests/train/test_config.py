"""One table of settings, from flags and a file, each with its origin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.train.config import Job, load
from tests.conftest import REPOSITORY


def toml(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, 'name = "bot"\ndata = "rows.jsonl"\nepochs = 5\nseed = 1\n')
    job, origins = load(file, seed=2)
    assert (job.epochs, job.seed, job.lora_rank) == (5.0, 2, 16)
    assert (origins["epochs"], origins["seed"], origins["lora_rank"]) == (f"file {file}", "flag", "default")


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    assert load(toml(tmp_path, 'name = "bot"\ndata = "rows.jsonl"'))[0].data == tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        (
            'name = "bot"\ndata = "d"\nlearning_rat = 1',
            {},
            "learning_rat in .* is no setting; did you mean learning_rate?",
        ),
        ('name = "bot"\ndata = "d"\nepochs = 0', {}, "^epochs: Input should be greater than 0"),
        ('name = "bot"\ndata = "d"', {"epochs": -1.0}, "^--epochs: Input should be greater than 0"),
        ('data = "d"', {}, "^name: Field required"),
        ('name = "../up"\ndata = "d"', {}, "^name: String should match pattern"),
        ('name = "bot"\ndata = "d"\nmethod = "full"\nadapter = true', {}, "adapter needs method = lora"),
        ('name = "bot"\ndata = "d"\nchecks = "c"\ntrial = false', {}, "they need trial = true"),
        (
            'name = "bot"\ndata = "d"\nbatch_size = 8\nmicro_batch_size = 3',
            {},
            "must be a multiple of micro_batch_size",
        ),
        ('name = "bot"\ndata = "d"\nmin_pass = { task = 0.9 }', {}, "min_pass needs checks"),
        ("name = ", {}, "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(tmp_path: Path, text: str, flags: dict, told: str) -> None:
    with pytest.raises(StartRefused, match=told):
        load(toml(tmp_path, text), **flags)


def test_the_same_training_is_the_same_run_whatever_is_published_of_it(tmp_path: Path) -> None:
    job, _ = load(toml(tmp_path, 'name = "bot"\ndata = "d"'))
    run = job.run_id("base", "data")
    assert job.model_copy(update={"min_pass": {"task": 0.5}, "adapter": True}).run_id("base", "data") == run
    assert job.model_copy(update={"learning_rate": 1e-3}).run_id("base", "data") != run
    assert run != job.run_id("other base", "data") != job.run_id("base", "other data")


def test_every_setting_is_a_flag_with_its_help_and_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from app.__main__ import cli\n"
        "try: cli(['finetune', 'run', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'vllm') if name in sys.modules])"
    )
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=wide, capture_output=True, text=True, check=True
    ).stdout
    for name in Job.model_fields:
        assert f"--{name.replace('_', '-')}" in said
    assert said.strip().endswith("[]")


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    command = [sys.executable, "-m", "app", "finetune", "run", "--name", "bot", "--data", str(tmp_path / "none.jsonl")]
    environment = os.environ | {"REFRAIN_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    flawed = subprocess.run([*command, "--min-pass", "x"], capture_output=True, text=True, env=environment, check=False)
    assert flawed.returncode == 1
    assert flawed.stderr.startswith("refrain: --min-pass: JSON is needed")
    assert "Traceback" not in flawed.stderr


def test_the_support_bots_file_is_a_job() -> None:
    job, _ = load(REPOSITORY / "examples" / "support-bot" / "finetune.toml")
    assert job.checks
    assert job.checks.is_file()
    assert json.dumps(job.model_dump(mode="json"))
