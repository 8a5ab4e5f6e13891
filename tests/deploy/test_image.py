"""What the Dockerfile promises, read as instructions; its commands run where they can be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from tests.conftest import Running

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = {"gcc", "g++", "clang", "build-essential", "make", "cmake", "rustc", "cargo", "python3-dev"}
Instruction = dict[str, Any]


@pytest.fixture(scope="module")
def stages() -> dict[str, list[Instruction]]:
    """The instructions of each stage, by its name, in order; ARGs before the first stage are under ''."""
    found: dict[str, list[Instruction]] = {"": []}
    for each in DockerfileParser(str(ROOT / "Dockerfile"), cache_content=True).structure:
        if each["instruction"] == "FROM":
            found[each["value"].split(" AS ")[1]] = []
        if each["instruction"] != "COMMENT":
            found[list(found)[-1]].append(each)
    return found


def values(stage: list[Instruction], instruction: str) -> list[str]:
    return [each["value"] for each in stage if each["instruction"] == instruction]


def exec_form(value: str) -> list[str]:
    command = json.loads(value)
    assert isinstance(command, list)
    return command


def test_stages_copy_from_stages_and_the_one_base_is_pinned_to_a_release(stages: dict[str, list[Instruction]]) -> None:
    names = [name for name in stages if name]
    for number, name in enumerate(names):
        base = values(stages[name], "FROM")[0].split()[0]
        assert base in names[:number] or re.fullmatch(r"python:3\.\d+-slim-\w+", base), base
        for copied in values(stages[name], "COPY"):
            source = re.search(r"--from=(\S+)", copied)
            assert source is None or source[1] in names[:number]
    assert len(names) >= 3
    assert names[-1] == "final"


def test_one_file_makes_the_image_for_a_processor_and_the_one_for_a_gpu(stages: dict[str, list[Instruction]]) -> None:
    assert values(stages[""], "ARG") == ["DEVICE=cpu"]
    users = {name for name, stage in stages.items() for run in values(stage, "RUN") if "$DEVICE" in run}
    assert users == {"dependencies", "final"}
    assert all("DEVICE" in values(stages[name], "ARG") for name in users), "an ARG ends with its stage"


def test_no_compiler_is_installed_but_for_a_gpu_and_nothing_is_built_last(stages: dict[str, list[Instruction]]) -> None:
    for name, stage in stages.items():
        for run in values(stage, "RUN"):
            if COMPILERS & set(re.findall(r"[\w+-]+", run)):
                assert (name, run.startswith('if [ "$DEVICE" = gpu ]; then')) == ("final", True)
    assert not re.search(r"\b(pip|uv|install\.py)\b", " ".join(values(stages["final"], "RUN")))


def test_layers_go_from_what_seldom_changes_to_what_often_does(stages: dict[str, list[Instruction]]) -> None:
    assert not any(re.match(r"app\b|\.", copied) for copied in values(stages["dependencies"], "COPY"))
    assert "app app" in values(stages["project"], "COPY")
    sources = [copied.split()[0] for copied in values(stages["final"], "COPY")]
    assert sources == ["--from=dependencies", "--from=project"]


def test_every_list_of_packages_is_removed_in_the_layer_that_fetched_it(stages: dict[str, list[Instruction]]) -> None:
    for run in (run for stage in stages.values() for run in values(stage, "RUN")):
        assert ("apt-get update" in run) == ("rm -rf /var/lib/apt/lists/*" in run)
        assert ("apt-get install" in run) == ("--no-install-recommends" in run)


def test_the_image_runs_as_a_number_that_is_not_root_and_writes_where_a_volume_is(
    stages: dict[str, list[Instruction]],
) -> None:
    final = stages["final"]
    user, group = values(final, "USER")[-1].split(":")
    assert int(user) >= 1000 <= int(group)
    assert f"--uid {user} " in " ".join(values(stages["base"], "RUN"))
    home = re.search(r"\bREFRAIN_HOME=(\S+)", " ".join(values(final, "ENV")))
    assert home
    assert exec_form(values(final, "VOLUME")[0]) == [home[1]]
    order = [each["instruction"] for each in final]
    assert "RUN" not in order[order.index("USER") :], "nothing is installed as the user that serves"


def test_signals_reach_the_server_since_no_shell_is_between(stages: dict[str, list[Instruction]]) -> None:
    final = stages["final"]
    assert exec_form(values(final, "ENTRYPOINT")[0]) == ["refrain"]
    assert exec_form(values(final, "CMD")[0]) == ["serve"]
    assert values(final, "SHELL") == values(final, "STOPSIGNAL") == []


def test_the_health_check_says_alive_of_a_server_that_is_and_not_of_one_that_is_not(
    stages: dict[str, list[Instruction]], serve: Callable[..., Running]
) -> None:
    told = values(stages["final"], "HEALTHCHECK")[0]
    command = exec_form(told[told.index("CMD ") + 4 :])
    assert command[0] == "python"
    command[0] = sys.executable

    def check(port: str) -> int:
        environment = os.environ | {"REFRAIN_PORT": port}
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30).returncode

    assert check(serve().url.rpartition(":")[2]) == 0
    assert check("9") != 0
