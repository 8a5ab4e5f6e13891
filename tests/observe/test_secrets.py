"""No secret in logs, errors, metrics, spans or `refrain config`; no label and no log line of a client's making."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.domain import Endpoint
from app.errors import EngineFailed
from app.gate.keys import KeyFile
from app.observe import logs
from tests.conftest import REPOSITORY, Running, chat, start_process, until

PATH = Endpoint.CHAT.value
# In every place where a secret can be; none holds another, so that each can be named.
PROMPT, WRONG_KEY, QUERY, REDIS, SIGNING, HEADER = (
    f"planted-{name}-0f3c" for name in "prompt key query redis sign head".split()
)
EVERY = (PROMPT, WRONG_KEY, QUERY, REDIS, SIGNING, HEADER)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_planted_secret_comes_out_nowhere(tmp_path: Path, log_format: str) -> None:
    key, _ = KeyFile(tmp_path / "keys.json").create("acme")
    admin, _ = KeyFile(tmp_path / "keys.json").create("ops", admin=True)
    environment = {
        "REFRAIN_ENGINE": "scripted",
        "REFRAIN_LOG_FORMAT": log_format,
        "REFRAIN_LOG_LEVEL": "debug",
        "REFRAIN_REDIS_URL": f"redis://user:{REDIS}@127.0.0.1:1/0",
        "REFRAIN_CACHE_SECRET": SIGNING,
    }
    server = start_process(tmp_path, tmp_path / "log", **environment)
    said = ""
    try:
        server.wait_ready()
        with server.client() as client:
            for given in (key, WRONG_KEY, admin):
                headers = {"authorization": f"Bearer {given}", "cookie": HEADER, "x-custom": HEADER}
                for body in (
                    chat(PROMPT),
                    chat(PROMPT, stream=True),
                    chat(PROMPT, temperature="x"),
                    {"prompt": PROMPT},
                ):
                    response = client.post(f"{PATH}?api_key={QUERY}", json=body, headers=headers)
                    said += response.text.replace(PROMPT, "") if response.status_code == 200 else response.text
                    said += str(response.headers)
                for path in ("/v1/models", "/admin/cache", "/metrics", "/readyz", "/version", "/admin/models"):
                    response = client.get(f"{path}?api_key={QUERY}", headers=headers)
                    said += response.text + str(response.headers)
            client.post(PATH, content=PROMPT.encode(), headers={"content-type": "application/json"})
    finally:
        server.stop()
    command = [sys.executable, "-m", "app", "config"]
    config = subprocess.run(
        command,
        env={"PATH": "", "REFRAIN_HOME": str(tmp_path), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "REDIS_URL" in config.stdout
    said += (tmp_path / "log").read_text() + config.stdout + config.stderr
    assert [secret for secret in (*EVERY, key, admin) if secret in said] == []


def test_labels_are_not_of_a_clients_making(serve: Callable[..., Running]) -> None:
    server = serve()

    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        text = httpx.get(server.url + "/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def ask(number: int) -> None:
        with server.client() as client:
            name = f"made-up-{number}"
            client.post(PATH, json=chat(model=name))
            client.post(PATH, json=chat(name, user=name, cache={name: 1}))
            client.post(
                PATH, json=chat(**{name: name}), headers={"cache-control": name, "x-request-id": name, name: name}
            )
            client.post(f"/{name}", json=chat())
            client.request(f"M{number}", PATH)
            client.get(f"/v1/streams/{name}")

    ask(0)
    before = series()
    for number in range(1, 12):
        ask(number)
    assert {label for _, label in series() - before if "made-up" in str(label)} == set()
    assert series() - before == set()


@pytest.mark.parametrize(
    "path", ["/x%0a12:00:00 INFO GET /forged 200", "/%1b[2J", "/x%0d%0aforged", "/%e2%80%a8forged"]
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_path_makes_no_line_of_its_own(
    serve: Callable[..., Running], capfd: pytest.CaptureFixture[str], path: str, log_format: str
) -> None:
    server = serve(log_format=log_format)
    httpx.get(server.url + path.replace(" ", "%20"))
    server.stop()
    lines = [line for line in capfd.readouterr().err.split("\n") if "404" in line]
    assert len(lines) == 1
    controls = r"[\x00-\x1f]" if log_format == "json" else r"[\x00-\x1f\u2028]"  # which JSON may hold
    assert not re.search(controls, lines[0])


def test_a_message_that_quotes_a_client_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        logs.configure(format="text", level="info")
        logging.getLogger("app.x").warning("the client said %s", "hello\n12:00:00 INFO forged\x1b[2J")
        said = capsys.readouterr().err
    finally:
        logging.getLogger().handlers[:] = before
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_every_line_of_a_call_has_its_id(serve: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    """Also those that its flight's own task writes, for as long as it is this call's."""
    server = serve(is_driven=True, cache="all", keep_alive_s=0.2)
    seen: list[tuple[str, str | None]] = []

    class Seeing(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            seen.append((record.getMessage(), logs.request_id.get()))
            return True

    watch, watched = Seeing(), [logging.getLogger(name) for name in ("app.api.answers", "app.flight.flights")]
    for logger in watched:
        logger.addFilter(watch)
    try:
        with (
            server.client() as client,
            client.stream("POST", PATH, json=chat(stream=True), headers={"x-request-id": "mine-1"}) as response,
        ):
            until(lambda: not server.engine.asked.empty())
            script = server.engine.asked.get_nowait()
            server.engine.loop.call_soon_threadsafe(script.say, "word ")
            server.engine.loop.call_soon_threadsafe(script.fail, EngineFailed("broke"))
            assert '"error"' in "".join(response.iter_text())
            assert script.call.request_id == "mine-1"
    finally:
        for logger in watched:
            logger.removeFilter(watch)
    assert seen
    assert {ident for _, ident in seen} == {"mine-1"}
