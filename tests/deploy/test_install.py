"""The installer's own promises: it sees what is there, repairs what was cut off, and says what failed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refrain_install", ROOT / "deploy" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """What the installer looks at in a virtual environment, and nothing else."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    return tmp_path / "venv"


@pytest.fixture
def no_gpu(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH of one empty folder and no device file; returns the folder."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(install, "GPU_NODE", tmp_path / "nvidia0")
    return folder


def fake_steps(install: ModuleType, setup: object, monkeypatch: pytest.MonkeyPatch, **commands: str) -> list[str]:
    """Replaces the real steps by shell commands; returns the list in which `interrupted` is noted."""
    noted: list[str] = []

    def steps(interrupted: str = "", *, clear: bool = False) -> list[object]:
        noted.append(interrupted)
        return [
            install.Step(name, name, [["sh", "-c", text]], "it broke.", "mend it.") for name, text in commands.items()
        ]

    monkeypatch.setattr(setup, "steps", steps)
    return noted


# what is there


def test_an_environment_without_a_stamp_is_not_done(install: ModuleType, venv: Path) -> None:
    assert not install.Setup(venv, "serve", "cpu").is_done()


def test_a_finished_set_up_is_not_done_again(
    install: ModuleType, venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = install.Setup(venv, "serve", "cpu")
    noted = fake_steps(install, setup, monkeypatch, packages="true")
    assert setup.run() is True
    capsys.readouterr()
    assert setup.run() is False
    assert len(noted) == 1
    assert capsys.readouterr().out == ""


def test_a_set_up_for_tests_covers_training_and_that_covers_serving_and_not_the_reverse(
    install: ModuleType, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups = [install.Setup(venv, purpose, "cpu") for purpose in ("serve", "finetune", "test")]
    for number, setup in enumerate(setups, 1):
        fake_steps(install, setup, monkeypatch, packages="true")
        setup.run()
        assert [each.is_done() for each in setups] == [True] * number + [False] * (3 - number)


@pytest.mark.parametrize("changed", ["cpu.txt", "uv.txt"])
def test_a_changed_lock_is_installed(
    install: ModuleType, venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(install, "LOCK", Path(shutil.copytree(install.LOCK, tmp_path / "lock")))
    setup = install.Setup(venv, "serve", "cpu")
    fake_steps(install, setup, monkeypatch, packages="true")
    setup.run()
    with (tmp_path / "lock" / "dev.txt").open("a") as lock:  # serving has no part in it
        lock.write("# changed\n")
    assert setup.is_done()
    with (tmp_path / "lock" / changed).open("a") as lock:
        lock.write("# changed\n")
    assert not setup.is_done()


def test_a_step_that_was_cut_off_is_known_to_the_next_run(
    install: ModuleType, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = install.Setup(venv, "serve", "cpu")
    fake_steps(install, setup, monkeypatch, torch="true", packages="false")
    with pytest.raises(install.Failed):
        setup.run()
    assert not setup.is_done()
    noted = fake_steps(install, setup, monkeypatch, packages="true")
    setup.run()
    assert noted == ["packages"]
    assert setup.is_done()


@pytest.mark.parametrize(("step", "flag"), [("torch", "--force-reinstall"), ("packages", "--reinstall")])
def test_a_step_that_was_cut_off_is_done_from_scratch(install: ModuleType, venv: Path, step: str, flag: str) -> None:
    setup = install.Setup(venv, "serve", "cpu")

    def flagged(interrupted: str) -> set[str]:
        return {each.name for each in setup.steps(interrupted) if flag in each.commands[0]}

    assert flagged(step) - flagged("") == {step}


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        ({"root": "/elsewhere", "device": "cpu"}, "belongs to another place"),
        ({"root": str(ROOT), "device": "gpu"}, "was made for a GPU, this is a CPU"),
        ({"doing": "environment"}, "was left half made"),
    ],
)
def test_an_environment_that_cannot_be_kept_is_made_anew(
    install: ModuleType,
    venv: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stamp: dict[str, str],
    reason: str,
) -> None:
    install.Stamp.path(venv).write_text(json.dumps(stamp))
    setup = install.Setup(venv, "serve", "cpu")
    assert "--clear" in setup.steps(clear=True)[0].commands[0]
    fake_steps(install, setup, monkeypatch, packages="true")
    setup.run()
    assert reason in capsys.readouterr().out


def test_a_folder_that_is_no_environment_is_left_alone(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(install.Failed, match="no virtual environment"):
        install.Setup(tmp_path, "serve", "cpu").run()
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_garbled_stamp_reads_as_none(install: ModuleType, venv: Path) -> None:
    install.Stamp.path(venv).write_text('{"root": 1, "unheard_of": ')
    assert install.Stamp.read(venv) == install.Stamp()


# the device


def test_without_a_driver_there_is_no_gpu(install: ModuleType, no_gpu: Path) -> None:
    assert install.has_gpu() is False


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_nvidia_smi_is_believed_when_it_names_a_gpu(
    install: ModuleType, no_gpu: Path, script: str, found: bool
) -> None:
    smi = no_gpu / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    assert install.has_gpu() is found


def test_a_device_file_is_enough(install: ModuleType, no_gpu: Path) -> None:
    install.GPU_NODE.touch()
    assert install.has_gpu() is True


def test_cpu_and_gpu_take_their_own_lock(install: ModuleType, venv: Path) -> None:
    for device, names in {"cpu": ["environment", "uv", "torch"], "gpu": ["environment", "uv", "packages"]}.items():
        steps = install.Setup(venv, "test", device).steps()
        assert [step.name for step in steps[:3]] == names
        packages = next(step for step in steps if step.name == "packages").commands[0]
        assert [Path(word).name for word in packages if word.startswith("-r")] == [
            f"{device}.txt",
            "train.txt",
            "dev.txt",
        ]


def test_no_step_lets_a_tool_choose_dependencies(install: ModuleType, venv: Path) -> None:
    """One `pip install` without --no-deps, and several GB of CUDA packages come in."""
    for step in install.Setup(venv, "test", "cpu").steps():
        for command in step.commands:
            assert "install" not in command or "--no-deps" in command, step.name


def test_what_breaks_vllm_on_a_cpu_is_removed(install: ModuleType, venv: Path) -> None:
    setup = install.Setup(venv, "serve", "cpu")
    assert "strays" not in {step.name for step in setup.steps()}
    (venv / "lib" / "python3.11" / "site-packages" / "torchvision").mkdir(parents=True)
    assert "strays" in {step.name for step in setup.steps()}
    assert "strays" not in {step.name for step in install.Setup(venv, "serve", "gpu").steps()}


# what a person sees


def test_a_failed_step_shows_the_last_words_and_what_to_do(
    install: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    step = install.Step(
        "x", "x", [["sh", "-c", "seq -f 'line %g' 1 30; exit 3"]], "the thing broke.", "Mend the thing."
    )
    with pytest.raises(install.Failed) as failed:
        install.perform(step, "[3/6] the thing")
    *words, what, to_do = str(failed.value).splitlines()
    assert [word.strip() for word in words] == [f"| line {number}" for number in range(11, 31)]
    assert what == "Failed: the thing broke."
    assert to_do == "To do:  Mend the thing."
    assert capsys.readouterr().out.startswith("[3/6] the thing ... failed after ")


def test_a_full_disk_is_called_by_its_name(install: ModuleType) -> None:
    step = install.Step("x", "x", [["sh", "-c", "echo 'No space left on device (os error 28)'; exit 2"]], "a", "b")
    with pytest.raises(install.Failed, match="the disk is full"):
        install.perform(step, "x")


def test_a_tool_that_is_missing_is_a_failed_step(install: ModuleType) -> None:
    with pytest.raises(install.Failed, match="/nowhere/uv: No such file"):
        install.perform(install.Step("x", "x", [["/nowhere/uv"]], "a", "b"), "x")


def test_the_second_way_is_tried_when_the_first_fails(install: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    install.perform(install.Step("x", "x", [["false"], ["touch", str(mark)]], "a", "b"), "x")
    assert mark.exists()


def test_an_unsupported_python_is_refused_in_a_clear_line(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PYTHONS", ((3, 98), (3, 99)))
    with pytest.raises(install.Failed, match=r"needs CPython 3\.98 to 3\.99; .* is cpython 3\."):
        install.refuse_unsupported_python()


def test_uv_trusts_the_certificates_that_pip_trusts(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "UV_SYSTEM_CERTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CERT", "/etc/corporate.pem")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    seen = install.environment()
    assert (seen["SSL_CERT_FILE"], seen["UV_SYSTEM_CERTS"]) == ("/etc/corporate.pem", "1")
    assert "PYTHONPATH" not in seen


def test_byte_code_is_written_once_whatever_the_shell_says(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without it each start of the server compiles vLLM's modules again, in two processes, for seconds."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "module.py").write_text("")
    subprocess.run([sys.executable, "-c", "import module"], cwd=tmp_path, env=install.environment(), check=True)
    assert list(tmp_path.glob("__pycache__/module.*.pyc"))
    echo = "include Makefile\nsays:\n\t@echo [$$PYTHONDONTWRITEBYTECODE]\n"
    make = [str(shutil.which("make")), "-f-", "says"]
    said = subprocess.run(make, cwd=ROOT, input=echo, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
