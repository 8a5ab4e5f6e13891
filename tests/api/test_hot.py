"""A hot hit is answered in the protocol, and nobody can tell: the same response, counted and logged the same, refused
the same, however its bytes arrive. Raw sockets, since HTTP libraries decide for themselves how bytes leave."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

import pytest

from app.api import answers, hot
from app.cache import tracking
from app.gate.keys import KeyFile
from tests.conftest import Running, chat, until
from tests.sockets import post, received

PATH = "/v1/chat/completions"
# A header that is not on the list of those that mean nothing: its call goes the whole way.
WHOLE_WAY = {"x-whole-way": "1"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that calls went from here on: `app` for each that the app was asked, `hot` for each that it was not.

    A client whose body is held up behind its head, or a server that was not let run, does not change them.
    """
    ways: list[str] = []
    monkeypatch.setattr(hot, "PATIENCE_S", 30.0)
    monkeypatch.setattr(tracking, "PING_AFTER_S", 30.0)
    whole_way, at_once = answers.AnswerRoute.__call__, answers.AnswerRoute.at_once

    async def in_app(*given: object) -> None:
        ways.append("app")
        await whole_way(*given)

    def in_protocol(*given: object) -> object:
        found = at_once(*given)
        if found is not None:
            ways.append("hot")
        return found

    monkeypatch.setattr(answers.AnswerRoute, "__call__", in_app)
    monkeypatch.setattr(answers.AnswerRoute, "at_once", in_protocol)
    return ways


def primed(server: Running, body: dict[str, object], **headers: str) -> None:
    """Ask until the answer is held in the server's own memory and its question is known."""
    until(lambda: server.app.state.service.store.is_near)
    with server.client(headers=headers) as client:
        until(lambda: client.post(PATH, json=body).headers["x-cache"] == "hit")
        client.post(PATH, json=body, headers=WHOLE_WAY)


def raw(body: dict[str, object] | bytes, **headers: str) -> bytes:
    return post(PATH, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)


def connected(server: Running) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
def test_a_hot_hit_is_the_response_that_the_app_would_have_given(
    server: Running, stream: bool, asked: list[str]
) -> None:
    body = chat("the same", max_tokens=6, stream=stream)
    primed(server, body)
    asked.clear()
    with server.client() as client:
        hot, whole = client.post(PATH, json=body), client.post(PATH, json=body, headers=WHOLE_WAY)
    assert asked == ["hot", "app"]
    assert hot.status_code == whole.status_code == 200
    differ = {"date", "x-request-id", "server-timing", "age", "content-length", "transfer-encoding"}
    assert {name: hot.headers[name] for name in hot.headers if name not in differ} == {
        name: whole.headers[name] for name in whole.headers if name not in differ
    }
    assert set(hot.headers) - {"content-length"} == set(whole.headers) - {"content-length", "transfer-encoding"}
    assert hot.headers["x-request-id"] != whole.headers["x-request-id"]
    nameless = [re.sub(r'"(id|created)":("[^"]*"|\d+)', "", each.text) for each in (hot, whole)]
    assert nameless[0] == nameless[1]
    assert hot.text != whole.text, "each has an id of its own"


def test_however_the_bytes_arrive_the_answer_is_the_same(server: Running, asked: list[str]) -> None:
    body = chat("in pieces", max_tokens=4)
    primed(server, body)
    request = raw(body)
    with connected(server) as connection:
        connection.sendall(request)  # these bytes are not those that the HTTP library sent
        received(connection)
        asked.clear()
        for cut in (1, 30, request.index(b"\r\n\r\n") + 4, len(request) - 1):
            connection.sendall(request[:cut])
            time.sleep(0.02)  # so that they arrive apart
            connection.sendall(request[cut:])
            ((status, headers, _),) = received(connection)
            assert (status, headers["x-cache"]) == (200, "hit")
        connection.sendall(request * 3)
        assert [headers["x-cache"] for _, headers, _ in received(connection, 3)] == ["hit"] * 3
        chunked = raw(body, **{"transfer-encoding": "chunked"}).partition(b"\r\n\r\n")[0]
        chunked = re.sub(rb"content-length: \d+\r\n", b"", chunked)
        content = json.dumps(body).encode()
        connection.sendall(chunked + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))
        assert received(connection)[0][1]["x-cache"] == "hit"
    assert asked == ["hot"] * 8


def test_a_body_too_long_to_be_known_is_not_held_back(serve: Callable[..., Running]) -> None:
    server = serve(max_body_bytes=200_000)
    with connected(server) as connection:
        connection.sendall(raw(b"x" * 300_000, **{"content-length": "100000000"}))
        ((status, _, _),) = received(connection)
    assert status == 413
    body = chat("long " * 20_000, max_tokens=2)
    with server.client() as client:
        assert [client.post(PATH, json=body).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]


def test_responses_keep_the_order_of_their_requests(server: Running) -> None:
    hot, cold = chat("hot", max_tokens=3), chat("cold", max_tokens=5)
    primed(server, hot)
    with connected(server) as connection:
        connection.sendall(raw(hot, **{"x-request-id": "a"}) + raw(cold, **{"x-request-id": "b"}))
        connection.sendall(raw(hot, **{"x-request-id": "c"}) + raw(hot, **{"x-request-id": "d"}))
        found = [(headers["x-request-id"], headers["x-cache"]) for _, headers, _ in received(connection, 4)]
    assert found == [("a", "hit"), ("b", "miss"), ("c", "hit"), ("d", "hit")]


def test_a_body_that_does_not_come_is_timed_out(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "PATIENCE_S", 1.5)  # longer than the time: it is not cut off before the app can answer
    server = serve(body_timeout_s=0.3)
    body = chat("slow", max_tokens=3)
    with connected(server) as connection:
        connection.sendall(raw(body))  # in one piece, so that none of it is late
        assert received(connection)[0][0] == 200
        connection.sendall(raw(body)[:-1])
        ((status, _, content),) = received(connection)
    assert status == 408
    assert json.loads(content)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("broken", [b"\r\n\r\nzz\r\n", b"\r\n\r\n5\r\nabcdefgh\r\n"], ids=["no number", "too long"])
def test_a_broken_body_is_a_400_and_the_server_goes_on(server: Running, broken: bytes) -> None:
    body = chat("broken", max_tokens=3)
    primed(server, body)
    head = re.sub(rb"content-length: \d+\r\n", b"", raw(body).partition(b"\r\n\r\n")[0])
    with connected(server) as connection:
        connection.sendall(head + b"\r\ntransfer-encoding: chunked" + broken)
        ((status, _, content),) = received(connection)
    assert status == 400
    assert json.loads(content)["error"]["type"] == "invalid_request_error"
    assert server.client().post(PATH, json=body).headers["x-cache"] == "hit"


def test_hot_hits_are_counted_and_logged_as_all_are(server: Running, asked: list[str]) -> None:
    body = chat("counted", max_tokens=7)
    primed(server, body)

    def counts() -> dict[str, float]:
        with server.client() as client:
            lines = client.get("/metrics").text.splitlines()
        wanted = (
            'refrain_calls_total{cache="hit",endpoint="chat"',
            'refrain_http_responses_total{status="200"}',
            'refrain_call_seconds_count{cache="hit"}',
            'refrain_tokens_saved_total{kind="completion"',
            "refrain_near_hits_total",
        )
        return {name: sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in wanted}

    def grown(**headers: str) -> list[float]:
        before = counts()
        with server.client() as client:
            client.post(PATH, json=body, headers=headers)
        return [after - before[name] for name, after in counts().items()]

    asked.clear()
    hot = grown()
    assert hot == grown(**WHOLE_WAY)
    assert asked == ["hot", "app"]
    assert hot == [1, 2, 1, 7, 1]  # the look at the metrics is a response too


def test_who_asks_is_asked_of_every_hot_hit(serve: Callable[..., Running], settings: object, asked: list[str]) -> None:
    file = KeyFile(settings.home / "keys.json")  # type: ignore[attr-defined]
    (secret, key), (other, _) = file.create("shop"), file.create("bank")
    server = serve()
    body = chat("mine", max_tokens=3)
    mine = {"authorization": f"Bearer {secret}"}
    primed(server, body, **mine)
    asked.clear()
    with server.client() as client:
        assert client.post(PATH, json=body, headers=mine).headers["x-cache"] == "hit"
        assert client.post(PATH, json=body, headers={"authorization": f"Bearer {other}"}).headers["x-cache"] == "miss"
        assert client.post(PATH, json=body).status_code == 401
        assert asked == ["hot", "app", "app"]
        file.revoke(key.id)
        until(lambda: client.post(PATH, json=body, headers=mine).status_code == 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"cache-control": "no-cache"}, "miss"),
        ({"cache-control": "no-store"}, "hit"),
        ({"content-type": "text/plain"}, None),
        ({"idempotency-key": "k"}, "hit"),
        ({"expect": "100-continue"}, "hit"),
        ({"connection": "close"}, "hit"),
    ],
)
def test_what_a_header_asks_for_is_done(server: Running, headers: dict[str, str], status: str | None) -> None:
    body = chat("asked", max_tokens=3)
    primed(server, body)
    with server.client() as client:
        for _ in range(2):  # the second time the question is known
            response = client.post(
                PATH, content=json.dumps(body), headers={"content-type": "application/json"} | headers
            )
            assert response.headers.get("x-cache") == status
            assert response.status_code == (200 if status else 415)
            assert response.headers.get("connection") == headers.get("connection")


def test_a_client_that_is_silent_after_a_hot_hit_is_told_nothing(serve: Callable[..., Running]) -> None:
    """What it reads next would be taken for the answer to its next request."""
    server = serve(header_timeout_s=2.5, idle_timeout_s=30)
    body = chat("then nothing", max_tokens=3)
    primed(server, body)
    with connected(server) as connection:
        for _ in range(2):  # the second time the question is known by these bytes
            connection.sendall(raw(body))
            assert received(connection)[0][1]["x-cache"] == "hit"
        assert connection.recv(65536) == b""
