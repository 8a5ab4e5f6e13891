"""When a model is compiled on a CPU, and that one that cannot be is served all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.domain import Weights
from app.engine import cpu
from app.engine.vllm import arguments
from app.settings import Settings
from app.weights import Registry, compare, pull_default
from tests.conftest import REPOSITORY, TEST_HOME
from tests.engine.test_swap import ENVIRONMENT, make_model

WEIGHTS = Weights("m", "/weights", "0" * 64, "0" * 64, {}, max_model_len=512)


def is_eager(settings: Settings) -> bool:
    return "--enforce-eager" in arguments(settings, WEIGHTS)


@pytest.mark.skipif(not cpu.is_cpu(), reason="on a GPU vLLM's own defaults stand")
def test_it_is_compiled_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    monkeypatch.setattr(cpu, "has_compiler", lambda: True)
    assert not is_eager(settings)
    assert is_eager(settings.model_copy(update={"compile": False}))
    assert is_eager(settings.model_copy(update={"max_adapters": 1})), "vLLM compiles nothing beside adapters"
    monkeypatch.setattr(cpu, "has_compiler", lambda: False)
    assert is_eager(settings)


def test_a_compiler_is_one_that_is_there_with_the_headers_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(cpu.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    assert cpu.has_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not cpu.has_compiler()
    monkeypatch.setenv("CXX", sys.executable)
    (tmp_path / "Python.h").unlink()
    assert not cpu.has_compiler()


@pytest.mark.engine
@pytest.mark.skipif(not cpu.is_cpu(), reason="on a GPU vLLM's own defaults stand")
def test_a_model_that_does_not_compile_runs_eagerly_and_says_the_same(tmp_path: Path) -> None:
    source = Registry(TEST_HOME / "weights").check(pull_default(Registry(TEST_HOME / "weights"), print))
    model = make_model(tmp_path / "model", 1, source)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    broken.chmod(0o755)
    trials = {
        "eager": Trial(model, tmp_path, "eager", REFRAIN_COMPILE="false"),
        "broken": Trial(model, tmp_path, "broken", REFRAIN_COMPILE="true", CXX=str(broken)),
    }
    said = {}
    for name, trial in trials.items():
        fingerprint, printed = trial.ended()
        assert ("runs eagerly" in printed) == (name == "broken")
        said[name] = fingerprint
    compare(said["eager"], said["broken"])


class Trial:
    """A process of its own, so that two take little longer than one: most of it is Python's imports."""

    def __init__(self, model: Path, folder: Path, name: str, **environment: str) -> None:
        self.out = folder / f"{name}.json"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.engine.trial", str(model), "--out", str(self.out)],
            env=os.environ | ENVIRONMENT | {"REFRAIN_HOME": str(folder / "home")} | environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended(self) -> tuple[Any, str]:
        printed, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, printed
        return json.loads(self.out.read_text())["fingerprint"], printed


@pytest.mark.skipif(not cpu.is_cpu(), reason="on a GPU vLLM's own defaults stand")
def test_workers_of_a_spread_model_divide_a_small_machines_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    one = Settings(home=tmp_path)
    assert "uni" in arguments(one, WEIGHTS)
    assert cpu.environment(one)["OMP_NUM_THREADS"] == "4"
    for spread in ({"tensor_parallel_size": 2}, {"engine_args": {"tensor_parallel_size": 2}}):
        settings = Settings(home=tmp_path, **spread)
        assert "uni" not in arguments(settings, WEIGHTS)
        assert cpu.environment(settings)["VLLM_CPU_OMP_THREADS_BIND"] == "4,6|5,7"
    ranks = Settings(home=tmp_path, tensor_parallel_size=2, engine_args={"data_parallel_size": 3})
    assert (ranks.devices_per_rank, ranks.devices) == (2, 6)
