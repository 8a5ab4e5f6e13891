"""`refrain cache explain`: what the server would make of a request, and what it has for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, REPOSITORY, Process, RedisServer, chat, start_process

FILES = {
    "one": chat(max_tokens=5, user="u"),
    "other": chat("hello!", max_tokens=5),
    "shorter": chat(max_tokens=3),
    "sampled": chat(temperature=1),
}


@pytest.fixture
def running(tmp_path: Path, shared_redis: RedisServer):
    for name, body in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(body))
    server = start_process(
        tmp_path, tmp_path / "log", "--engine", "scripted", REFRAIN_REDIS_URL=shared_redis.url, **_namespace(tmp_path)
    )
    yield server
    server.stop()


def _namespace(directory: Path) -> dict[str, str]:
    return {"REFRAIN_REDIS_NAMESPACE": f"explain-{directory.name}"}


def explain(directory: Path, redis: RedisServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {"REFRAIN_HOME": str(directory), "REFRAIN_ENGINE": "scripted", "REFRAIN_REDIS_URL": redis.url}
    environment["REFRAIN_REDIS_TIMEOUT_S"] = str(PATIENCE_S)
    command = [sys.executable, "-m", "app", "cache", "explain", *arguments, "--json"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        env=os.environ | environment | _namespace(directory),
    )


def test_it_says_what_the_server_does(running: Process, tmp_path: Path, shared_redis: RedisServer) -> None:
    def told(*names: str) -> dict:
        return json.loads(explain(tmp_path, shared_redis, *(str(tmp_path / f"{name}.json") for name in names)).stdout)

    before = told("one")
    assert before["now"].startswith("miss")
    assert before["left out of the key"] == {"max_tokens": 5, "user": "u"}
    with running.client() as client:
        reply = client.post("/v1/chat/completions", json=FILES["one"])
    assert reply.headers["x-cache-key"] == before["key"]
    assert told("one")["now"].startswith("hit (same)")
    assert told("shorter")["now"].startswith("hit (cut_shorter)")
    assert told("sampled") == {"bypass": "not_deterministic"}
    both = told("one", "other")
    assert both["same key"] is False
    assert [each["field"] for each in both["differs"]] == ["texts.messages"]


def test_what_is_no_request_is_one_line_and_a_failure(tmp_path: Path, shared_redis: RedisServer) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        done = explain(tmp_path, shared_redis, str(tmp_path / name))
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
