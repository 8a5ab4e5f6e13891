"""Rewrites the lock files from pyproject.toml: `make lock`, or `make lock UPGRADE=1` for newer releases.

uv resolves; what this adds is what makes the files readable and safe: the marker that every line
would carry is dropped, and only the digests of wheels that an installation can choose are kept
(glibc Linux, CPython 3.11 to 3.14). Source archives are left out on purpose: with digests required,
nothing outside these wheels runs, not even a build script.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent
ROOT = LOCK.parent.parent
HEADER = """\
# Written by `make lock` from pyproject.toml; not edited by hand.
# Digests are those of the wheels for CPython 3.11 to 3.14 on glibc Linux, x86_64 and aarch64.
"""
CPU = ["--extra", "cpu", "--extra", "s3", "--group", "torch-needs", "--excludes", str(LOCK / "cpu-excludes.txt")]
GPU = ["--extra", "gpu", "--extra", "s3"]
DEV = ["--group", "dev", "--excludes", str(LOCK / "dev-excludes.txt")]
TRAIN = ["--extra", "train", "--excludes", str(LOCK / "cpu-excludes.txt")]
# What pyproject's [tool.uv] environments say already, as uv prints it.
ALWAYS = (
    "implementation_name == 'cpython'",
    "platform_python_implementation == 'CPython'",
    "python_full_version < '3.15'",
    "sys_platform == 'linux'",
)
EITHER = re.compile(
    r"( and )?implementation_name == 'cpython' and \(\("
    r"platform_machine == 'aarch64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'\) or \("
    r"platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'\)\)$"
)

Package = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take newer releases where pyproject.toml allows them")
    upgrade = parser.parse_args().upgrade

    with tempfile.TemporaryDirectory() as scratch:
        cpu = resolve("cpu", CPU, Path(scratch), upgrade)
        gpu = resolve("gpu", GPU, Path(scratch), upgrade)
        # What trains goes on top of either lock, and the development tools on top of all: each is resolved against
        # what is agreed on before it, and only what is new is written down. PyTorch comes from below.
        both = [package for package in cpu if pin(package) in {pin(other) for other in gpu}]
        agreed = Path(scratch) / "agreed.txt"
        agreed.write_text("".join(f"{line(package)}\n" for package in both))
        train = new_in(resolve("train", [*TRAIN, "-c", str(agreed)], Path(scratch), upgrade), both)
        agreed.write_text("".join(f"{line(package)}\n" for package in (*both, *train)))
        tools = new_in(resolve("dev", [*DEV, "-c", str(agreed)], Path(scratch), upgrade), [*both, *train])
        itself = resolve("uv", [], Path(scratch), upgrade=False)

    locks = {"cpu": cpu, "gpu": gpu, "train": train, "dev": tools, "uv": itself}
    files = {name: lock(packages) for name, packages in locks.items()}
    for name, text in files.items():  # all of them or none
        (LOCK / f"{name}.txt").write_text(text)


def resolve(name: str, what: list[str], scratch: Path, upgrade: bool) -> list[Package]:
    """The packages of one lock. Versions already locked are kept unless `upgrade`."""
    locked, pins, toml = LOCK / f"{name}.txt", scratch / f"{name}.txt", scratch / f"pylock.{name}.toml"
    source = str(ROOT / "pyproject.toml")
    if name == "uv":  # the one tool that is no dependency: its version is edited in uv.txt itself
        source = str(scratch / "uv.in")
        Path(source).write_text("".join(pins_of(locked)))
    elif not upgrade and locked.exists():
        pins.write_text("".join(pins_of(locked)))  # uv prefers the versions it finds in its output file
    resolving = [source, "--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "-q", *what]
    uv(*resolving, "-o", str(pins))
    uv(*resolving, "-c", str(pins), "--format", "pylock.toml", "-o", str(toml))
    return list(tomllib.loads(toml.read_text())["packages"])


def new_in(packages: list[Package], below: list[Package]) -> list[Package]:
    known = {pin(package) for package in below}
    return [package for package in packages if pin(package) not in known]


def uv(*arguments: str) -> None:
    binary = Path(sys.prefix) / "bin" / "uv"
    if subprocess.run([binary, "pip", "compile", *arguments], cwd=ROOT, check=False).returncode:
        sys.exit("uv could not resolve pyproject.toml; the reason is above, and no lock file was changed")


def pins_of(locked: Path) -> Iterable[str]:
    return (f"{entry.split(' --hash=')[0]}\n" for entry in entries(locked.read_text()))


def entries(text: str) -> list[str]:
    """The logical lines of a requirements file: continuations joined, comments and blank lines gone."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [row.strip() for row in joined.splitlines() if row.strip() and not row.startswith("#")]


def pin(package: Package) -> str:
    return f"{package['name']}=={package['version']}"


def line(package: Package) -> str:
    condition = marker(package.get("marker", ""))
    return f"{pin(package)} ; {condition}" if condition else pin(package)


def marker(text: str) -> str:
    """The part of a marker that tells one supported machine from another."""
    rest = EITHER.sub("", text)
    if " or " in rest:
        return rest
    return " and ".join(atom for atom in rest.split(" and ") if atom not in ALWAYS)


def lock(packages: list[Package]) -> str:
    rows = [HEADER]
    for package in packages:
        digests = sorted(
            {wheel["hashes"]["sha256"] for wheel in package.get("wheels", []) if is_for_us(filename(wheel))}
        )
        if not digests:
            sys.exit(f"{pin(package)} has no wheel for Linux and CPython 3.11 to 3.14: hold it back in pyproject.toml")
        rows.append(" \\\n    ".join([line(package), *(f"--hash=sha256:{digest}" for digest in digests)]) + "\n")
    return "".join(rows)


def filename(wheel: Package) -> str:
    return str(wheel.get("name") or wheel["url"].rsplit("/", 1)[1])


def is_for_us(wheel: str) -> bool:
    """True for a wheel that pip or uv may choose on a supported machine."""
    python, abi, platform = wheel.removesuffix(".whl").split("-")[-3:]
    machine = any(re.fullmatch(r"any|(many)?linux.*_(x86_64|aarch64)", tag) for tag in platform.split("."))
    versions = python.split(".")
    exact = abi in versions and any(re.fullmatch(r"cp31[1-4]", version) for version in versions)
    pure = any(version.startswith("py3") for version in versions) and abi == "none"
    stable = abi == "abi3" and any(re.fullmatch(r"cp3\d+", v) and int(v[3:]) <= 14 for v in versions)
    loose = abi == "none" and any(re.fullmatch(r"cp3\d*", version) for version in versions)
    return machine and (exact or pure or stable or loose)


if __name__ == "__main__":
    main()
