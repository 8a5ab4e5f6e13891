"""The ledger of a running server: it says what its clients saw, whatever happens."""

from __future__ import annotations

import json
import logging
import resource
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.errors import EngineFailed
from app.gate.keys import KeyFile
from app.ledger import files
from app.ledger import ledger as ledgers
from app.ledger.ledger import Ledger
from app.ledger.record import Record
from tests.conftest import MODEL, Process, Running, chat, until
from tests.journeys.test_process import Start, start  # noqa: F401 - a fixture
from tests.ledger.reading import calls, records

CHAT = "/v1/chat/completions"
ABORTED = "aborted"


@dataclass(frozen=True)
class Seen:
    """What a client knows of its call."""

    tenant: str
    status: int
    cache: str
    stream: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = "whole"


def of(record: Record) -> Seen:
    tokens = (record.prompt_tokens, record.completion_tokens) if record.finish == "whole" else (0, 0)
    return Seen(record.tenant, record.status, record.cache, record.stream, *tokens, record.finish)


class Client:
    """Counts what it is answered, by the id of each call."""

    def __init__(self, url: str, tenant: str, key: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"})
        self._tenant = tenant
        self.seen: dict[str, Seen] = {}

    def ask(self, content: str, **fields: object) -> None:
        if fields.get("stream"):
            self._stream(chat(content, stream_options={"include_usage": True}, **fields))
            return
        ident = secrets.token_hex(8)
        answer = self._http.post(CHAT, json=chat(content, **fields), headers={"x-request-id": ident})
        used = answer.json().get("usage") or {}
        tokens = (used.get("prompt_tokens", 0), used.get("completion_tokens", 0))
        finish = "whole" if answer.is_success else "refused" if answer.status_code < 500 else "broken"
        cache = answer.headers.get("x-cache", "")
        self.seen[ident] = Seen(self._tenant, answer.status_code, cache, False, *tokens, finish)

    def _stream(self, body: dict[str, object]) -> None:
        ident = secrets.token_hex(8)
        with self._http.stream("POST", CHAT, json=body, headers={"x-request-id": ident}) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        used = events[-1]["usage"]
        cache = answer.headers["x-cache"]
        self.seen[ident] = Seen(self._tenant, 200, cache, True, used["prompt_tokens"], used["completion_tokens"])

    def leave(self, content: str) -> None:
        """Go away after the first word."""
        ident = secrets.token_hex(8)
        body = chat(content, stream=True, max_tokens=512)  # the longest that there is: it must not end before
        with self._http.stream("POST", CHAT, json=body, headers={"x-request-id": ident}) as answer:
            next(answer.iter_bytes())
            self.seen[ident] = Seen(self._tenant, 200, answer.headers["x-cache"], True, 0, 0, "left")


def busy(client: Client, number: int, together: threading.Barrier) -> None:
    """Some of everything."""
    together.wait(60)
    client.ask("everybody's", max_tokens=100)
    for turn in range(12):
        client.ask(f"question {turn % 4}", stream=turn % 3 == 0)
        client.ask(f"own {number} {turn}", max_tokens=4)
        client.ask("hello", temperature=7 if turn % 2 else 1)
        if turn % 4 == 0:
            client.leave(f"long {number} {turn}")
            client.ask("hello", model="nobody")


def test_the_ledger_is_what_clients_counted_and_what_the_engine_did(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secrets_of = {tenant: keys.create(tenant) for tenant in ("acme", "globex")}
    server = serve(scripted_tokens_per_s=100.0)
    clients = [Client(server.url, tenant, secret) for tenant, (secret, _) in secrets_of.items() for _ in range(4)]
    together = threading.Barrier(len(clients))
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(busy, clients, range(len(clients)), [together] * len(clients)))
    with server.client() as nobody:
        assert nobody.post(CHAT, json=chat()).status_code == 401
    server.stop()

    seen = {ident: each for client in clients for ident, each in client.seen.items()}
    found = calls(tmp_path)
    assert {ident: of(record) for ident, record in found.items()} == seen
    assert {each.cache for each in seen.values()} >= {"hit", "shared", "miss", "bypass"}
    assert {record.key for record in found.values()} == {key.id for _, key in secrets_of.values()}
    assert {record.weights for record in found.values() if record.cache} == {f"{MODEL}@{'a' * 12}"}

    used = [record for record in records(tmp_path) if record.kind in ("call", "rest")]
    assert sum(record.device_s for record in used) == pytest.approx(server.engine.meter.busy_s, rel=1e-6)
    engine = records(tmp_path, kind="engine")  # one a minute, and one at the end
    assert sum(record.device_s for record in engine) == pytest.approx(server.engine.meter.busy_s, rel=1e-6)
    assert sum(record.idle_s for record in engine) > 0
    for record in found.values():
        is_spared = record.cache in ("hit", "shared")
        assert record.spared_tokens == (record.prompt_tokens + record.completion_tokens if is_spared else 0)
        assert (record.device_s > 0) == (record.cache in ("miss", "bypass") and record.status == 200)


def test_what_breaks_is_recorded_with_what_it_used(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(is_driven=True, price_device_hour=3600.0)

    def ask(**fields: object) -> int:
        with server.client() as client:
            return client.post(CHAT, json=chat(**fields)).status_code

    with ThreadPoolExecutor(2) as pool:
        streamed, plain = pool.submit(ask, stream=True), pool.submit(ask, seed=1, n=2)
        scripts = [until(lambda: server.engine.asked.qsize() and server.engine.asked.get_nowait()) for _ in range(2)]
        for script in scripts:
            server.engine.loop.call_soon_threadsafe(script.say, "word ")
        until(lambda: all(each.timings.device_s for each in _flights(server)))
        for script in scripts:
            server.engine.loop.call_soon_threadsafe(script.fail, EngineFailed("it broke"))
        assert (streamed.result(), plain.result()) == (200, 500)
    server.stop()
    found = {record.status: record for record in calls(tmp_path).values()}
    for record in found.values():
        assert (record.finish, record.error, record.cache) == ("broken", "engine_error", "miss")
        assert record.completion_tokens == 1
        assert record.device_s > 0
        assert record.cost == pytest.approx(record.device_s)
    assert found[200].stream
    assert not found[500].stream


def _flights(server: Running) -> list[object]:
    return list(server.app.state.service.flights._by_key.values())


def test_a_generation_that_outlives_its_client_is_paid_for_once(serve: Callable[..., Running], tmp_path: Path) -> None:
    """The first pays until it leaves, the last what is left; and what goes on for nobody is its tenant's."""
    server = serve(is_driven=True, stream_resume_s=30.0, keep_alive_s=0.1)
    with server.client() as client, client.stream("POST", CHAT, json=chat(stream=True)) as answer:
        script = until(lambda: server.engine.asked.qsize() and server.engine.asked.get_nowait())
        server.engine.loop.call_soon_threadsafe(script.say, "one ")
        lines = answer.iter_lines()
        while "one" not in next(lines):  # comments keep the stream alive until then
            continue
    until(lambda: len(records(tmp_path, kind="call")) == 1)
    server.engine.loop.call_soon_threadsafe(script.say, "two ")
    server.engine.loop.call_soon_threadsafe(script.finish)
    (rest,) = until(lambda: records(tmp_path, kind="rest"))
    (call,) = calls(tmp_path).values()
    assert call.finish == "left"
    assert (rest.tenant, rest.weights, rest.endpoint) == (call.tenant, call.weights, CHAT)
    assert call.device_s > 0
    assert rest.device_s > 0
    assert call.device_s + rest.device_s == pytest.approx(server.engine.meter.busy_s, rel=1e-6)


def test_a_stale_answer_is_spared_and_its_refresh_is_not(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(cache_ttl_s=1, cache_stale_while_revalidate_s=600)
    with server.client() as client:
        client.post(CHAT, json=chat())
        until(lambda: client.post(CHAT, json=chat()).headers["x-cache"] == "stale", every_s=0.3)
    (rest,) = until(lambda: records(tmp_path, kind="rest"))
    stale = until(lambda: next((record for record in calls(tmp_path).values() if record.cache == "stale"), None))
    assert stale.device_s == 0
    assert stale.spared_tokens > 0
    assert rest.device_s > 0


def test_no_text_is_recorded_unless_asked_for_and_then_no_more_than_asked(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    for text_bytes in (0, 64):
        server = serve(ledger_text_bytes=text_bytes)
        with server.client() as client:
            whole = client.post(CHAT, json=chat("a secret")).content
            streamed = client.post(CHAT, json=chat("a secret", stream=True)).content
        server.stop()
        if not text_bytes:
            assert not any(record.request or record.response for record in records(tmp_path))
            assert not any("secret" in path.read_text() for path in (tmp_path / "ledger").glob("*.jsonl"))
    kept = [record for record in calls(tmp_path).values() if record.request]
    assert {record.response for record in kept} == {whole[:64].decode(), streamed[:64].decode()}
    assert all(len(record.request) == 64 for record in kept)


def test_with_the_ledger_off_nothing_is_written(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(ledger=False)
    with server.client() as client:
        assert client.post(CHAT, json=chat()).status_code == 200
    server.stop()
    assert not (tmp_path / "ledger").exists()


# --- faults ----------------------------------------------------------------------------------------


def test_kill_9_loses_the_last_moment_alone(start: Start, tmp_path: Path) -> None:  # noqa: F811
    running = start()
    answered: dict[str, float] = {}
    is_over = threading.Event()

    def load(number: int) -> None:
        with running.client() as client:
            while not is_over.is_set():
                ident = secrets.token_hex(8)
                try:
                    answer = client.post(CHAT, json=chat(f"{number % 3}"), headers={"x-request-id": ident})
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200
                answered[ident] = time.monotonic()

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, number) for number in range(4)]
        until(lambda: len(answered) > 500 and time.monotonic() - began > 4, 120)
        killed_at = time.monotonic()
        running.process.kill()
        running.process.wait()
        is_over.set()
        for each in loads:
            each.result()
    home = tmp_path / "home"
    found = calls(home)
    lost = answered.keys() - found.keys()
    assert len(found) > len(answered) / 4
    assert all(killed_at - answered[ident] < 3 for ident in lost), "more than the last moment is lost"
    assert {record.cache for record in found.values()} >= {"hit"}

    again = start()  # what the dead server left is compressed, and is still all there
    until(lambda: list((home / "ledger").glob("*.zst")))
    assert found.keys() <= calls(home).keys()
    assert again.stop() == 0


def test_a_full_disk_stops_no_call_and_loses_no_record(start: Start, tmp_path: Path) -> None:  # noqa: F811
    running = start(REFRAIN_ACCESS_LOG="false")
    home = tmp_path / "home"
    ask(running, 5)
    until(lambda: len(calls(home)) == 5)
    _, hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (0, hard))
    ask(running, 20)
    until(lambda: metric(running, "refrain_ledger_up") == 0)
    until(lambda: metric(running, "refrain_ledger_held") >= 20)
    assert len(calls(home)) == 5
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: metric(running, "refrain_ledger_up") == 1)
    assert len(calls(home)) == 25
    assert metric(running, "refrain_ledger_lost_total") == 0
    assert running.stop() == 0
    assert len(calls(home)) == 25
    left = files.listed(home / "ledger")  # nobody compresses them any more
    assert all(list(files.blocks(path, Record, files.Skipped())) for path in left), "a failure leaves no empty file"


def ask(running: Process, times: int) -> None:
    with running.client() as client:
        for number in range(times):
            assert client.post(CHAT, json=chat(f"{number}")).status_code == 200


def metric(running: Process, name: str) -> float:
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


class Devices:
    busy_s = idle_s = 0.0


async def test_unwritable_it_warns_once_holds_what_it_can_and_counts_what_it_loses(
    settings: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "MOST_HELD", 10)
    monkeypatch.setattr(ledgers, "_RETRY_S", 0.02)
    caplog.set_level(logging.INFO, "app.ledger")
    lost = ledgers.metrics.ledger_lost._value.get
    before, folder = lost(), tmp_path / "ledger"
    folder.write_text("not a folder")
    async with Ledger(settings, Devices()) as ledger:  # type: ignore[arg-type]
        ledger.note(Record(id="first"))
        until(lambda: "cannot be written" in caplog.text)
        for number in range(50):
            until(lambda: len(ledger._noted) < 10)
            ledger.note(Record(id=f"{number}"))
        until(lambda: lost() - before == 41)
        folder.unlink()
        until(lambda: "is written again" in caplog.text)
    assert [record.id for record in records(tmp_path, kind="call")] == [f"{number}" for number in range(40, 50)]
    assert lost() - before == 41
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_two_servers_of_one_home_share_a_ledger(serve: Callable[..., Running], tmp_path: Path) -> None:
    servers = [serve(), serve()]
    for server in servers:
        with server.client() as client:
            for number in range(3):
                client.post(CHAT, json=chat(f"{number}"))
    for server in servers:
        server.stop()
    assert len(calls(tmp_path)) == 6
    assert len(list((tmp_path / "ledger").iterdir())) == 2
