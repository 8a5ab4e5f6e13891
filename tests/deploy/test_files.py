"""Makefile, CI script, Dockerfile and compose files: they lint, render, and name only what exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAKE = shutil.which("make") or "make"
COMPOSE = ["docker/compose.yaml", "docker/compose.gpu.yaml"]


def output(*command: str | Path) -> str:
    """What a tool prints, run in the project's folder; a failure shows all of it."""
    of_make = {"ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}  # which may have been given some for these tests
    environment = {name: value for name, value in os.environ.items() if name not in of_make} | {"NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Makefile and CI


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_alone_lists_every_target_with_a_line_of_help() -> None:
    listed = dict(re.findall(r"^  make (\w+) +(\S.*)$", output(MAKE), re.MULTILINE))
    assert set(listed) == targets() >= {"serve", "test", "check", "fix", "bench", "finetune", "clean", "lock"}


def test_every_target_is_phony() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == targets() | {"help"}


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ([], []),
        (["PORT=9000", "HOST=::1"], ["--host", "::1", "--port", "9000"]),
        (["MODEL=/my models/a"], ["--model", "/my models/a"]),
    ],
)
def test_make_serve_passes_on_what_was_given_and_nothing_else(given: list[str], flags: list[str]) -> None:
    said = subprocess.run(
        [MAKE, "-n", "serve", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOST": "x86_64-conda-linux-gnu"},  # exported by some toolchains
    ).stdout
    last = shlex.split(said.replace("\\\n", " ").splitlines()[-1])
    assert last == ["exec", ".venv/bin/refrain", "serve", *flags]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], ["python", "examples/support-bot/run.py"]),
        (["CONFIG=my job.toml", "ARGS=--force"], ["refrain", "finetune", "run", "my job.toml", "--force"]),
    ],
)
def test_make_finetune_runs_the_example_or_a_job_of_ones_own(given: list[str], wanted: list[str]) -> None:
    said = output(MAKE, "-n", "finetune", *given).replace("\\\n", " ").splitlines()
    assert "--for finetune" in said[0]
    assert shlex.split(said[-1]) == ["exec", f".venv/bin/{wanted[0]}", *wanted[1:]]


def test_ci_runs_the_commands_of_a_person_and_the_suite_last() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make check", "make test"]
    assert {command.removeprefix("make ") for command in commands} <= targets()
    assert os.access(script, os.X_OK)
    output(shutil.which("bash") or "bash", "-n", script)


# image and compose


def test_the_dockerfile_passes_hadolint() -> None:
    output(BIN / "hadolint", "Dockerfile")


def test_the_yaml_files_lint() -> None:
    output(BIN / "yamllint", "--strict", ".")


@pytest.mark.parametrize("files", [COMPOSE[:1], COMPOSE], ids=["cpu", "gpu"])
def test_the_compose_files_render_and_fit_the_schema(files: list[str]) -> None:
    output(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)
    flags = [word for file in files for word in ("-f", file)]
    rendered = json.loads(output(BIN / "docker-compose", *flags, "config", "--format", "json"))
    refrain = rendered["services"]["refrain"]
    assert refrain["build"]["context"] == str(ROOT)
    assert refrain["image"] == f"refrain:{refrain['build']['args']['DEVICE']}"
    for service in rendered["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_a_container_is_given_time_to_drain() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    grace, drain = re.search(r"stop_grace_period: (\d+)s", text), re.search(r'REFRAIN_DRAIN_S: "(\d+)"', text)
    assert grace
    assert drain
    assert int(grace[1]) >= int(drain[1]) + 10


def test_the_image_is_proved_under_the_conditions_of_the_compose_file() -> None:
    output("bash", "-n", "docker/prove")
    proved = (ROOT / "docker" / "prove").read_text()
    refrain = json.loads(output(BIN / "docker-compose", "-f", COMPOSE[0], "config", "--format", "json"))["services"][
        "refrain"
    ]
    assert refrain["read_only"]
    assert f"grace_s={refrain['stop_grace_period'].removesuffix('s')} " in proved
    assert [f'--tmpfs "{each},noexec"' in proved for each in refrain["tmpfs"]] == [True], "noexec: what Docker adds"
    for option in (
        "--read-only ",
        "--cap-drop all ",
        f"--security-opt {refrain['security_opt'][0].partition(':')[0]} ",
    ):
        assert option in proved


def test_every_setting_that_is_named_exists() -> None:
    known = {f"REFRAIN_{name.upper()}" for name in Settings.model_fields} | {"REFRAIN_CONFIG"}
    folders = (ROOT / "docker", ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "ray")
    files = [ROOT / "Dockerfile", *(file for folder in folders for file in folder.rglob("*.*") if file.is_file())]
    named = {name for file in files for name in re.findall(r"\bREFRAIN_[A-Z0-9_]+", file.read_text())}
    assert named >= {"REFRAIN_HOST", "REFRAIN_HOME", "REFRAIN_REDIS_URL"}
    assert named - known == set()


def test_the_image_starts_refrain_itself_and_not_as_root() -> None:
    final = (ROOT / "Dockerfile").read_text().rpartition("FROM ")[2]
    assert re.search(r"^USER \d+:\d+$", final, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["refrain"\]$', final, re.MULTILINE)
    assert re.search(r'^CMD \["serve"\]$', final, re.MULTILINE)


def test_the_package_that_goes_into_the_image_holds_every_file(tmp_path: Path) -> None:
    """An editable installation finds a file that nobody packaged; the image does not."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "app", source / "app", ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").touch()
    pip = [BIN / "python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    output(*pip, "--quiet", "--target", target, source)

    def files(root: Path) -> set[Path]:
        return {
            path.relative_to(root) for path in (root / "app").rglob("*") if path.is_file() and path.suffix != ".pyc"
        }

    assert files(target) == files(source)


def test_what_the_image_copies_is_let_through_by_dockerignore() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert any(name == source or name.startswith(f"{source}/") for name in allowed), source
