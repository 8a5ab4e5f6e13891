"""The server as a process: how it starts, stops, is killed, comes back; and the commands beside it.

The engine is the scripted one throughout; what vLLM's processes do is a matter of tests/engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from app.cache.embedded import running as embedded_servers
from tests.conftest import PATIENCE_S, REPOSITORY, Process, chat, start_process, until

CHAT = "/v1/chat/completions"
Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`refrain serve` with the scripted engine and the embedded Redis, on this test's home."""
    started: list[Process] = []

    def run(*arguments: str, home: Path = tmp_path / "home", **environment: str) -> Process:
        log = tmp_path / f"log{len(started)}"
        running = start_process(home, log, *arguments, REFRAIN_ENGINE="scripted", **environment)
        started.append(running)
        return running

    yield run
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def refrain(home: Path, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    defaults = {
        "REFRAIN_HOME": str(home),
        "REFRAIN_ENGINE": "scripted",
        "REFRAIN_REDIS_TIMEOUT_S": str(PATIENCE_S),
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=REPOSITORY,
        env=os.environ | defaults | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def ask(running: Process, content: str = "hello", **fields: Any) -> httpx.Response:
    with running.client() as client:
        response = client.post(CHAT, json=chat(content, **fields))
    assert response.status_code == 200, response.text
    return response


def cache_of(running: Process, content: str = "hello") -> str:
    return ask(running, content).headers["x-cache"]


def redis_of(running: Process) -> psutil.Process:
    """The embedded server: the only child that a scripted server has. While it writes its snapshot it has one too."""
    (child,) = psutil.Process(running.process.pid).children()
    return child


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def redis_is(running: Process, status: str) -> bool:
    return httpx.get(f"{running.url}/readyz", timeout=30).json()["redis"] == status


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_finishes_before_the_server_ends(start: Start, number: int) -> None:
    running = start(REFRAIN_SCRIPTED_TOKENS_PER_S="20")
    redis = redis_of(running)
    with (
        running.client() as idle,
        running.client() as client,
        client.stream("POST", CHAT, json=chat(stream=True, max_tokens=40)) as response,
    ):
        assert idle.get("/healthz").status_code == 200
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(number)
        until(lambda: refuses_new_calls(running))
        with pytest.raises(httpx.TransportError):
            idle.get("/healthz")  # on its kept connection, which was closed, and no new one is to be had
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert running.process.wait(timeout=30) == 0
    until(lambda: is_gone(redis))
    assert "Traceback" not in running.log.read_text()


def refuses_new_calls(running: Process) -> bool:
    try:
        return httpx.get(f"{running.url}/healthz", timeout=30).status_code == 503
    except httpx.TransportError:
        return True


def test_what_does_not_finish_within_the_budget_is_told_so(start: Start) -> None:
    """A stream gets an error event, a call that waits for its body a 503; the exit is a clean one all the same."""
    running = start(REFRAIN_SCRIPTED_TOKENS_PER_S="1", REFRAIN_DRAIN_S="1")
    waiting: list[httpx.Response] = []

    def wait() -> None:
        with running.client() as client:
            waiting.append(client.post(CHAT, json=chat("wait", max_tokens=500)))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: "refrain_generations_in_flight 1.0" in httpx.get(f"{running.url}/metrics").text)
    with running.client() as client, client.stream("POST", CHAT, json=chat(stream=True, max_tokens=500)) as response:
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    thread.join()
    told = json.loads(events[-1])
    assert told["error"]["code"] == "draining"
    assert told["request_id"] == response.headers["x-request-id"]
    assert "[DONE]" not in events
    (refused,) = waiting
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert running.process.wait(timeout=30) == 0
    assert "Traceback" not in running.log.read_text()


def test_an_idle_server_stops_at_once_and_leaves_nothing_behind(start: Start, home: Path) -> None:
    running = start()
    redis = redis_of(running)
    assert running.stop() == 0
    assert is_gone(redis)
    assert list((home / "run").iterdir()) == []


def test_recordings_outlive_a_restart(start: Start) -> None:
    running = start()
    assert [cache_of(running) for _ in range(2)] == ["miss", "hit"]
    assert running.stop() == 0
    assert cache_of(start()) == "hit"


# --- being killed ---------------------------------------------------------------------------------


def test_a_killed_server_leaves_no_redis_and_no_recording_is_lost(start: Start, home: Path) -> None:
    """Bar 7: nothing is left after 10 s, and a start right after works."""
    running = start()
    redis = redis_of(running)
    assert cache_of(running) == "miss"
    running.process.kill()
    running.process.wait()
    again = start()
    assert cache_of(again) == "hit"
    until(lambda: is_gone(redis), 10)
    (named,) = {each.stem for each in (home / "run").iterdir()}
    assert named.startswith(f"{again.process.pid}-")


def test_a_server_killed_again_and_again_comes_back(start: Start) -> None:
    for expected in ("miss", "hit", "hit", "hit"):
        running = start()
        assert cache_of(running) == expected
        running.process.kill()
        running.process.wait()


def test_a_killed_redis_is_started_again_and_no_call_fails_meanwhile(start: Start) -> None:
    running = start()
    assert [cache_of(running) for _ in range(2)] == ["miss", "hit"]
    killed = redis_of(running)
    killed.kill()
    for number in range(20):
        ask(running, f"meanwhile {number}")
    until(lambda: redis_is(running, "up") and is_gone(killed) and redis_of(running).pid != killed.pid)
    assert until(lambda: cache_of(running, "after") == "hit")
    assert running.log.read_text().count("redis is down") <= 1


def test_a_broken_snapshot_costs_the_recordings_and_nothing_else(start: Start, home: Path) -> None:
    """Redis ends at once over a snapshot that it cannot read; it used to be started again for ever."""
    running = start()
    cache_of(running)
    assert running.stop() == 0
    snapshot = home / "redis" / "dump.rdb"
    snapshot.write_bytes(snapshot.read_bytes()[:-9])
    again = start()
    until(lambda: (home / "redis" / "dump.rdb.broken").exists())
    assert until(lambda: cache_of(again) == "hit")
    assert redis_of(again).is_running()


def test_a_second_server_on_the_same_home_has_a_cache_of_its_own(start: Start, home: Path) -> None:
    first, second = start(), start()
    assert "another server holds the snapshot" in second.log.read_text()
    for running in (first, second):
        assert [cache_of(running) for _ in range(2)] == ["miss", "hit"]
    assert len(list(embedded_servers(home))) == 2
    assert second.stop() == 0
    assert cache_of(first) == "hit"
    assert first.stop() == 0


# --- in a container -------------------------------------------------------------------------------

# In a PID namespace of its own a process is number 1, as in a container.
AS_FIRST = ["unshare", *([] if os.getuid() == 0 else ["--user", "--map-root-user"]), "--pid", "--fork", "--kill-child"]


def can_be_first() -> bool:
    try:
        return subprocess.run([*AS_FIRST, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_be_first(), reason="needs PID namespaces")
def test_sigterm_ends_the_first_process_of_a_container_before_it_serves(home: Path) -> None:
    """Whatever it waits for: number 1 gets no signal that it does not handle, and `docker stop` would wait and kill."""
    home.mkdir()
    with FileLock(home / "keys.json.lock"):
        command = [*AS_FIRST, sys.executable, "-m", "app", "keys", "create", "--tenant", "shop"]
        waiting = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"REFRAIN_HOME": str(home)})
        try:
            (first,) = until(lambda: psutil.Process(waiting.pid).children())

            def ends() -> bool:  # once is not enough: it may still be importing
                with contextlib.suppress(psutil.NoSuchProcess):
                    first.send_signal(signal.SIGTERM)
                return waiting.poll() is not None

            until(ends, 30)
        finally:
            waiting.kill()
            waiting.wait()
    assert waiting.returncode == 128 + signal.SIGTERM


# --- refusing to start ----------------------------------------------------------------------------


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused start says: exit code 1, one line, no traceback."""
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_an_open_address_without_keys_is_refused(home: Path) -> None:
    for host in ("0.0.0.0", "::"):  # noqa: S104
        line = one_line(refrain(home, "serve", "--host", host, "--port", "0"))
        assert line.startswith(f"refrain: refusing to serve on {host} without API keys")
        assert "refrain keys create" in line


def test_an_open_address_with_keys_is_served_to_who_has_one(start: Start, home: Path) -> None:
    secret = refrain(home, "keys", "create", "--tenant", "shop").stdout.strip()
    running = start("--host", "0.0.0.0")  # noqa: S104
    url = running.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code == 200


def test_a_port_in_use_is_one_clear_line(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line(refrain(home, "serve", "--port", str(port)))
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


def test_an_address_that_is_not_ours_is_one_clear_line(home: Path) -> None:
    refrain(home, "keys", "create", "--tenant", "shop")
    line = one_line(refrain(home, "serve", "--host", "203.0.113.7", "--port", "0"))
    assert "203.0.113.7" in line


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"REFRAIN_PROT": "1"}, "did you mean REFRAIN_PORT?"),
        ({"REFRAIN_PORT": "http"}, "REFRAIN_PORT: "),
        ({"REFRAIN_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
        ({"REFRAIN_REDIS_URL": "http://u:hunter2@h"}, "REFRAIN_REDIS_URL: "),
        ({"REFRAIN_REDIS_URL": "redis://u:hunter2@h:port"}, "REFRAIN_REDIS_URL"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(home: Path, environment: dict[str, str], part: str) -> None:
    line = one_line(refrain(home, "serve", **({"REFRAIN_PORT": "0"} | environment)))
    assert part in line
    assert "hunter2" not in line


def test_keys_that_cannot_be_read_are_one_line(home: Path) -> None:
    home.mkdir()
    (home / "keys.json").write_text("[{")
    assert "keys.json cannot be read" in one_line(refrain(home, "serve", "--port", "0"))


# --- the commands beside it -----------------------------------------------------------------------


def test_a_key_made_or_revoked_counts_while_the_server_runs(start: Start, home: Path) -> None:
    running = start()
    assert httpx.get(f"{running.url}/v1/models").status_code == 200
    made = refrain(home, "keys", "create", "--tenant", "shop", "--admin")
    secret, key_id = made.stdout.strip(), made.stderr.split()[0]
    assert made.stdout == f"{secret}\n", "nothing but the key, so that a script can take it"
    headers = {"authorization": f"Bearer {secret}"}

    def status(**given: Any) -> int:
        return httpx.get(f"{running.url}/admin/cache", timeout=30, **given).status_code

    until(lambda: status(headers=headers) == 200)
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert secret not in (home / "keys.json").read_text()

    listed = json.loads(refrain(home, "keys", "list", "--json").stdout)
    assert [(row["id"], row["tenant"], row["admin"]) for row in listed] == [(key_id, "shop", True)]
    table = refrain(home, "keys", "list").stdout
    assert key_id in table
    assert secret not in table

    assert refrain(home, "keys", "revoke", key_id).returncode == 0
    until(lambda: status(headers=headers) == 401, 10)
    assert status() == 401, "revoking the last key opens no door"
    assert "there is no key" in one_line(refrain(home, "keys", "revoke", key_id))
    assert secret not in running.log.read_text()


def test_the_cache_of_the_running_server_is_counted_and_emptied(start: Start, home: Path) -> None:
    assert "no server runs" in one_line(refrain(home, "cache", "stats"))
    running = start()
    for number in range(3):
        cache_of(running, f"q{number}")
    stats = json.loads(refrain(home, "cache", "stats", "--json").stdout)
    assert stats["by_model"] == [{"tenant": "default", "model": "scripted", "entries": 3}]
    assert stats["redis"]["maxmemory"] == 256 * 2**20
    table = refrain(home, "cache", "stats").stdout
    assert "scripted" in table
    assert "MiB in use" in table
    assert "say what to purge" in one_line(refrain(home, "cache", "purge"))
    for arguments, purged in [
        (("--tenant", "x"), 0),
        (("--model", "other"), 0),
        (("--model", "scripted"), 3),
        (("--all",), 0),
    ]:
        assert refrain(home, "cache", "purge", *arguments).stdout.strip() == f"purged {purged}"
    assert cache_of(running, "q0") == "miss"


def test_the_cache_is_found_where_the_home_is_too_long_for_a_socket(start: Start, tmp_path: Path) -> None:
    """The socket then lies under the temporary directory, where `refrain cache` did not look."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    temporary = tmp_path.parent / "t"
    temporary.mkdir(exist_ok=True)
    running = start(home=deep, TMPDIR=str(temporary))
    assert [cache_of(running) for _ in range(2)] == ["miss", "hit"]
    assert json.loads(refrain(deep, "cache", "stats", "--json").stdout)["entries"] == 1
    running.process.kill()
    running.process.wait()
    again = start(home=deep, TMPDIR=str(temporary))
    assert cache_of(again) == "hit"
    assert again.stop() == 0
    assert list(temporary.iterdir()) == [], "neither the killed server nor the stopped one leaves its socket there"


def test_a_redis_that_is_not_there_is_one_line_for_the_cache_commands(home: Path) -> None:
    line = one_line(refrain(home, "cache", "stats", REFRAIN_REDIS_URL="redis://u:hunter2@127.0.0.1:1/0"))
    assert "127.0.0.1:1" in line
    assert "hunter2" not in line


def test_config_says_where_each_value_comes_from(home: Path) -> None:
    done = refrain(home, "config")
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REFRAIN_ENGINE ")]
    assert "scripted" in line
    assert "environment" in line


def test_json_log_lines_are_json_one_by_one(start: Start) -> None:
    running = start("--log-format", "json")
    ask(running)
    httpx.get(f"{running.url}/nothing\n".strip() + "%0a", headers={"x-request-id": "mine"})
    assert running.stop() == 0
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert all(line["level"] and line["message"] for line in lines)
    assert "mine" in {line.get("request_id") for line in lines}
    assert "hello" not in running.log.read_text(), "a prompt is never logged"


COMMANDS = [
    (),
    ("serve",),
    ("config",),
    ("models",),
    ("models", "pull"),
    ("models", "push"),
    ("models", "list"),
    ("models", "show"),
    ("models", "publish"),
    ("models", "rollback"),
    ("models", "verify"),
    ("models", "gc"),
    ("cache",),
    ("cache", "stats"),
    ("cache", "purge"),
    ("cache", "explain"),
    ("keys",),
    ("keys", "create"),
    ("keys", "list"),
    ("keys", "revoke"),
    ("keys", "limit"),
    ("finetune",),
    ("finetune", "run"),
    ("finetune", "check"),
    ("usage",),
    ("usage", "cost"),
    ("usage", "export"),
    ("plan",),
]


def test_the_list_of_commands_is_whole() -> None:
    import typer

    from app.__main__ import cli

    def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        yield path
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))

    assert set(walk(typer.main.get_command(cli))) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "refrain " + " ".join(command))
def test_help_is_there_for_every_command(command: tuple[str, ...]) -> None:
    from app.__main__ import cli

    for option in ("--help", "-h"):
        shown = CliRunner().invoke(cli, [*command, option])
        assert shown.exit_code == 0
        assert "Usage" in shown.output


def test_help_imports_nothing_heavy() -> None:
    """All of them in one process: none may load what takes seconds."""
    program = f"""
import contextlib, io, sys
from app.__main__ import cli
for command in {COMMANDS!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli([*command, "--help"])
        except SystemExit as end:
            assert end.code == 0, (command, end.code)
heavy = ("vllm", "torch", "transformers", "fastapi", "redis", "uvicorn", "huggingface_hub", "numpy")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_a_command_that_is_not_there_is_a_usage_error(home: Path) -> None:
    done = refrain(home, "sing")
    assert done.returncode == 2
    assert "sing" in done.stderr
    assert "Traceback" not in done.stderr
