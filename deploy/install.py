"""Sets up a virtual environment that can serve or test Refrain: the one way in for make, CI and the image.

The order matters. PyTorch comes first and alone, because a CPU build has to come from elsewhere than
everything else; the locked packages follow without their dependencies, so that nothing can bring in
CUDA libraries, or the torchvision, torchaudio and torchcodec that break `import vllm` beside a CPU
PyTorch. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "lock"
TORCH = "2.13.0"  # what gpu.txt locks; on a CPU it is in no lock, since its wheels are on another index
PYTHONS = ((3, 11), (3, 14))
GPU_NODE = Path("/dev/nvidia0")
STRAYS = ("torchvision", "torchaudio", "torchcodec")
# Who can test can train, and who can train can serve.
COVERS = {"serve": ("serve",), "finetune": ("serve", "finetune"), "test": ("serve", "finetune", "test")}

CHECK = """\
import ctypes, sys
wanted = sys.argv[1]
if wanted == "cpu":
    ctypes.CDLL("libnuma.so.1")  # without it vLLM starts, warns, and has no kernels
import torch, vllm
from vllm.platforms import current_platform
found = current_platform.device_type  # empty where an image for a GPU is built on a machine without one
if found and found != {"cpu": "cpu", "gpu": "cuda"}[wanted]:
    sys.exit(f"this is the vLLM build for {found}, not for {wanted}")
if wanted == "cpu":
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "rms_norm"):
        sys.exit("vLLM's kernels for this CPU did not load")
    # Byte code is written here once; the server and its engine would otherwise both compile it at the first start.
    import vllm.entrypoints.generate.api_router, vllm.entrypoints.launchers.api_server.app_state
    import vllm.entrypoints.launchers.cli_args, vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker
print(f"vLLM {vllm.__version__}, PyTorch {torch.__version__}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--for", dest="purpose", choices=("serve", "finetune", "test", "lock"), default="serve")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto looks for an NVIDIA GPU")
    parser.add_argument("--without-project", action="store_true", help="only what Refrain needs, for an image layer")
    parser.add_argument("--quiet", action="store_true", help="say nothing when there is nothing to do")
    options = parser.parse_args()
    try:
        refuse_unsupported_python()
        device = options.device
        if device == "auto":
            device = "gpu" if has_gpu() else "cpu"
        setup = Setup(options.venv.absolute(), options.purpose, device, with_project=not options.without_project)
        did_something = setup.run()
    except Failed as failed:
        sys.exit(str(failed))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
    if not did_something and not options.quiet:
        print(f"{shown(options.venv)} is up to date.")


class Failed(Exception):
    """A set-up that cannot go on; the text says what failed and what to do."""


def refuse_unsupported_python() -> None:
    if not sys.platform.startswith("linux"):
        raise Failed("Refrain needs Linux: vLLM is published for nothing else. Use the Dockerfile, or WSL on Windows.")
    low, high = PYTHONS
    named = f"CPython {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if not low <= sys.version_info[:2] <= high or sys.implementation.name != "cpython" or threaded:
        kind = "free-threaded " if threaded else ""
        this = f"{kind}{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
        raise Failed(
            f"Refrain needs {named}; {sys.executable} is {this}.\n"
            "Name another interpreter: make serve PYTHON=/path/to/python3.12"
        )


def has_gpu() -> bool:
    """An NVIDIA GPU with a driver. The device file first: asking the driver can take seconds."""
    if GPU_NODE.exists():
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        answer = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU 0" in answer.stdout


@dataclass(frozen=True)
class Step:
    """One line of progress. `commands` are alternatives: the next is tried where one fails."""

    name: str
    title: str
    commands: list[list[str]]
    failed: str
    to_do: str
    says_result: bool = False


@dataclass
class Stamp:
    """What a virtual environment was made for and how far that got: a file inside it.

    `doing` names the step under way, so a step that was killed is seen and done again from scratch;
    `done` maps a purpose to the digest of everything it was installed from.
    """

    root: str = ""
    device: str = ""
    doing: str = ""
    done: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def path(venv: Path) -> Path:
        return venv / "refrain-setup.json"

    @classmethod
    def read(cls, venv: Path) -> Stamp:
        try:
            return cls(**json.loads(cls.path(venv).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, venv: Path) -> None:
        if venv.is_dir():
            beside = self.path(venv).with_suffix(".new")
            beside.write_text(json.dumps(self.__dict__, indent=1) + "\n")
            beside.replace(self.path(venv))


class Setup:
    def __init__(self, venv: Path, purpose: str, device: str, *, with_project: bool = True) -> None:
        self.venv, self.purpose, self.device, self.with_project = venv, purpose, device, with_project
        self.python = venv / "bin" / "python"
        self._lock_fd = -1

    def run(self) -> bool:
        """Installs what is missing. False if there was nothing to do."""
        if self.is_done():
            return False
        with self._only_one():
            if self.is_done():  # by the one we waited for
                return False
            started = time.monotonic()
            self._install()
            print(f"Set up in {time.monotonic() - started:.0f} s.", flush=True)
            return True

    def is_done(self) -> bool:
        stamp = Stamp.read(self.venv)
        return (
            self.with_project
            and stamp.done.get(self.purpose) == digest(self.purpose, self.device)
            and (stamp.root, stamp.device, stamp.doing) == (str(ROOT), self.device, "")
            and self.python.exists()
        )

    def _install(self) -> None:
        stamp, reason = self._what_is_there()
        if reason:
            print(f"{shown(self.venv)} {reason}: making it anew.", flush=True)
        interrupted = stamp.doing
        if self.purpose != "lock":
            stamp.done = {}
        steps = self.steps(interrupted, clear=bool(reason))
        for number, step in enumerate(steps, 1):
            stamp.doing = step.name
            stamp.write(self.venv)
            perform(step, f"[{number}/{len(steps)}] {step.title}", self._lock_fd)
            stamp.root, stamp.device, stamp.doing = str(ROOT), self.device, ""
            stamp.write(self.venv)
        if self.with_project and self.purpose != "lock":
            stamp.done = {purpose: digest(purpose, self.device) for purpose in COVERS[self.purpose]}
            stamp.write(self.venv)

    def _what_is_there(self) -> tuple[Stamp, str]:
        """The stamp to go on from, and, if the environment cannot be kept, why."""
        stamp = Stamp.read(self.venv)
        if not self.venv.exists() or not any(self.venv.iterdir()):
            return Stamp(), ""
        if not (self.venv / "pyvenv.cfg").exists() and not Stamp.path(self.venv).exists():
            raise Failed(
                f"{self.venv} exists and is no virtual environment. Move it away, or give --venv another path."
            )
        if not self.python.exists():
            return Stamp(), "has lost its interpreter"
        if stamp.doing == "environment":
            return Stamp(), "was left half made"
        if stamp.root and stamp.root != str(ROOT):
            return Stamp(), "belongs to another place"
        if stamp.device and stamp.device != self.device and self.purpose != "lock":
            return Stamp(), f"was made for a {stamp.device.upper()}, this is a {self.device.upper()}"
        return stamp, ""

    def steps(self, interrupted: str = "", *, clear: bool = False) -> list[Step]:
        """All steps in order; the one named `interrupted` is done again even where its result looks complete."""

        def again(name: str, flag: str) -> list[str]:
            return [flag] if name == interrupted else []

        pip = [str(self.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-deps"]
        uv = [str(self.venv / "bin" / "uv"), "pip", "install", "--python", str(self.python), "--no-deps"]
        version = f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
        download = "See that a package index can be reached and the disk is not full, then run the same command again."
        mirror = " (uv does not read pip's configuration: behind a mirror, set UV_DEFAULT_INDEX.)"

        make = [sys.executable, "-m", "venv", *(["--clear"] if clear else []), str(self.venv)]
        if self.python.exists() and not clear:
            make = [str(self.python), "-c", "import pip"]
        environment = Step(
            "environment",
            f"virtual environment {shown(self.venv)} (Python {version})",
            [make],
            "the virtual environment could not be made.",
            "On Debian or Ubuntu: apt-get install python3-venv. Or delete it and run the same command again.",
        )
        installer = Step(
            "uv",
            "the installer, uv",
            [[*pip, *again("uv", "--force-reinstall"), "--require-hashes", "-r", str(LOCK / "uv.txt")]],
            "pip could not install uv.",
            download,
        )
        if self.purpose == "lock":
            return [environment, installer]

        wheels = ["--only-binary", ":all:"]
        torch = Step(
            "torch",
            f"PyTorch {TORCH} for the CPU (about 200 MB)",
            [
                [*pip, *again("torch", "--force-reinstall"), *wheels, f"torch=={TORCH}+cpu"],
                [*uv, *again("torch", "--reinstall"), *wheels, "--torch-backend", "cpu", f"torch=={TORCH}"],
            ],
            f"there is no CPU build of PyTorch {TORCH} where pip looks, and PyTorch's own index did not answer.",
            "See that one of them can be reached (the wheel in a folder and PIP_FIND_LINKS=/that/folder will do), "
            "then run the same command again.",
        )
        locks = [LOCK / name for name in lock_names(self.purpose, self.device)]
        lines = [line for path in locks for line in path.read_text().splitlines()]
        count = len({line.split("==")[0] for line in lines if line[:1].isalnum()})
        packages = Step(
            "packages",
            f"vLLM and everything else (about {count} packages{', several GB' if self.device == 'gpu' else ''})",
            [[*uv, *again("packages", "--reinstall"), "--require-hashes", *(f"-r{path}" for path in locks)]],
            "uv could not install the locked packages.",
            download + mirror,
        )
        strays = Step(
            "strays",
            "removing CUDA builds that break vLLM on a CPU",
            [[str(self.venv / "bin" / "uv"), "pip", "uninstall", "--python", str(self.python), *STRAYS]],
            "uv could not remove torchvision, torchaudio and torchcodec.",
            f"Delete {shown(self.venv)} and run the same command again.",
        )
        project = Step(
            "project",
            "Refrain itself",
            [[*uv, "--reinstall", "--no-build-isolation", "--editable", str(ROOT)]],
            "Refrain itself could not be installed.",
            "Look at the lines above: most likely pyproject.toml does not fit the tree.",
        )
        check = Step(
            "check",
            "a look at vLLM",
            [[str(self.python), "-c", CHECK, self.device]],
            "everything is installed, and vLLM does not load.",
            "If a library such as libnuma.so.1 is missing: apt-get install libnuma1. "
            f"Otherwise delete {shown(self.venv)} and run the same command again.",
            says_result=True,
        )
        has_strays = self.device == "cpu" and any(any(self.venv.glob(f"lib/*/site-packages/{name}")) for name in STRAYS)
        return [
            environment,
            installer,
            *([torch] if self.device == "cpu" else []),
            packages,
            *([strays] if has_strays and not clear else []),
            *([project] if self.with_project else []),
            check,
        ]

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Two set-ups of one environment take turns.

        The tools inherit the lock: if this process is killed, the next one waits until a pip or uv
        left behind has ended, and only then repairs what it left.
        """
        import fcntl  # not on Windows, where main has refused by now

        self.venv.parent.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.venv.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another set-up is at work here; waiting for it ...", flush=True)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(self._lock_fd)


def digest(purpose: str, device: str) -> str:
    """Changes whenever an installation made from the same files would come out different."""
    import tomllib  # not in the Pythons that main refuses with a clear line

    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locks = ["uv.txt", *lock_names(purpose, device)]
    parts = [
        json.dumps([purpose, device, {name: described.get(name) for name in ("project", "build-system")}]).encode(),
        Path(__file__).read_bytes(),
        *((LOCK / name).read_bytes() for name in locks),
    ]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def lock_names(purpose: str, device: str) -> list[str]:
    return [f"{device}.txt", *{"finetune": ["train.txt"], "test": ["train.txt", "dev.txt"]}.get(purpose, [])]


def perform(step: Step, line: str, lock_fd: int = -1) -> None:
    """Runs one step under its line of progress. Raises Failed with the tool's last words."""
    progress = Progress(line)
    for command in step.commands:
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            code = run(command, log, lock_fd, progress.tick)
            log.seek(0)
            said = log.read().rstrip().splitlines()
        if code == 0:
            progress.end(f"{said[-1]}, " if step.says_result and said else "")
            return
    progress.end("failed after ")
    words = "".join(f"    | {word}\n" for word in said[-20:])
    if any("No space left" in word for word in said):
        raise Failed(f"{words}Failed: the disk is full.\nTo do:  free some space and run the same command again.")
    raise Failed(f"{words}Failed: {step.failed}\nTo do:  {step.to_do}")


def run(command: list[str], log: TextIO, lock_fd: int, tick: Callable[[], None]) -> int:
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock_fd] if lock_fd >= 0 else [],
        )
    except OSError as error:
        log.write(f"{command[0]}: {error.strerror}\n")
        return 127
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def environment() -> dict[str, str]:
    """Ours, less what would point the tools at another Python, plus uv's habits made to match pip's.

    One of pip's is to write byte code into what it installs, whatever PYTHONDONTWRITEBYTECODE says of everything else.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    if "PIP_CERT" in env:
        env.setdefault("SSL_CERT_FILE", env["PIP_CERT"])
    env.setdefault("UV_SYSTEM_CERTS", "1")  # pip trusts the system's certificates; uv by itself does not
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    return env | {"UV_NO_PROGRESS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


class Progress:
    """`[3/6] PyTorch ... 12 s`: on a terminal the seconds count up, elsewhere they come at the end."""

    def __init__(self, line: str) -> None:
        self._line, self._started, self._live = line, time.monotonic(), sys.stdout.isatty()
        sys.stdout.write(f"{line} ... ")
        sys.stdout.flush()

    def tick(self) -> None:
        if self._live:
            sys.stdout.write(f"\r{self._line} ... {self._seconds} s ")
            sys.stdout.flush()

    def end(self, result: str) -> None:
        start = f"\r{self._line} ... " if self._live else ""
        sys.stdout.write(f"{start}{result}{self._seconds} s\n")
        sys.stdout.flush()

    @property
    def _seconds(self) -> str:
        seconds = time.monotonic() - self._started
        return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def shown(path: Path) -> str:
    """A path as a person in the project's folder would write it."""
    try:
        return str(path.absolute().relative_to(ROOT))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    main()
