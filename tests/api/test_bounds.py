"""Careless and hostile connections, on raw sockets: each is answered or ended in time, and the server goes on."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from tests.conftest import Running, chat, until
from tests.sockets import post, received

PATH = "/v1/chat/completions"
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"


def connected(server: Running, *, buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if buffer is not None:  # before it is connected: it is what the window is made of
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    url = httpx.URL(server.url)
    connection.settimeout(20)
    connection.connect((url.host, url.port or 80))
    return connection


def all_of(connection: socket.socket) -> bytes:
    """What the server says until it ends the connection."""
    said = b""
    while data := _received(connection):
        said += data
    return said


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def refused(said: bytes) -> tuple[int, str]:
    head, _, body = said.partition(b"\r\n\r\n")
    error = json.loads(body)
    assert error["request_id"].encode() in head
    return int(head.split()[1]), error["error"]["code"]


def cut_off(server: Running, waiting_for: str) -> float:
    with server.client() as client:
        text = client.get("/metrics").text
    found = re.search(rf'refrain_connections_cut_off_total{{waiting_for="{waiting_for}"}} (\S+)', text)
    return float(found[1]) if found else 0.0


def lives(server: Running) -> None:
    with connected(server) as connection:
        connection.sendall(post(PATH, json.dumps(chat()).encode()))  # in one piece: no part of it comes too late
        assert received(connection)[0][0] == 200


@pytest.fixture
def hasty(serve: Callable[..., Running]) -> Running:
    """A server whose patience a test can wait for, and that a client which this machine holds up does not lose."""
    return serve(header_timeout_s=2.5, max_header_bytes=4096)


def test_a_head_that_dribbles_in_is_cut_off(hasty: Running) -> None:
    before = cut_off(hasty, "head")
    with connected(hasty) as slow, connected(hasty) as silent, connected(hasty) as blank:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        blank.sendall(b"\r\n\r\n")
        for number in range(90):  # one more each time that nothing was said; a hundred would be too many
            if select.select([slow], [], [], 0.2)[0]:
                break
            slow.sendall(f"x-{number}: y\r\n".encode())
        else:
            pytest.fail("it may go on for ever")
        assert refused(all_of(slow)) == (408, "request_timeout")
        assert all_of(silent) == b""
        all_of(blank)
    assert cut_off(hasty, "head") >= before + 3
    lives(hasty)


def test_so_is_the_head_of_a_second_request(hasty: Running) -> None:
    with connected(hasty) as connection:
        connection.sendall(GET + b"\r\n")
        assert received(connection)[0][0] == 200
        connection.sendall(GET)  # never ended
        assert refused(all_of(connection)) == (408, "request_timeout")


def test_an_idle_connection_is_closed(serve: Callable[..., Running]) -> None:
    with connected(serve(idle_timeout_s=1, header_timeout_s=60)) as connection:
        connection.sendall(GET + b"\r\n")
        assert all_of(connection).count(b"HTTP/1.1 200") == 1


def test_heads_are_bounded(hasty: Running) -> None:
    for head, expected in (
        (GET + b"x: " + b"y" * 5000 + b"\r\n\r\n", (431, "request_headers_too_large")),
        (
            GET + b"".join(b"x-%d: y\r\n" % number for number in range(101)) + b"\r\n",
            (431, "request_headers_too_large"),
        ),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", (414, "url_too_long")),
        (
            b"POST %b HTTP/1.1\r\nhost: x\r\nx: %b\r\n\r\n" % (PATH.encode(), b"y" * 5000),
            (431, "request_headers_too_large"),
        ),
    ):
        with connected(hasty) as connection:
            connection.sendall(head)
            assert refused(all_of(connection)) == expected
    lives(hasty)


def test_one_header_without_an_end_takes_no_memory(hasty: Running) -> None:
    """httptools keeps a header until it is whole, however long it grows."""
    with connected(hasty) as connection:
        connection.sendall(GET + b"x: ")
        sent, said = 0, b""
        try:
            while sent < 50_000_000:
                sent += connection.send(b"y" * 65536)
                time.sleep(0.001)
        except (ConnectionError, TimeoutError):
            said = b"reset"
        assert said == b"reset" or refused(all_of(connection))[0] == 431
        assert sent < 20_000_000
    lives(hasty)


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(serve: Callable[..., Running]) -> None:
    server = serve(body_timeout_s=1.0)
    before = cut_off(server, "body")
    with connected(server) as connection:
        connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 15:
                connection.sendall(b"y")
                time.sleep(0.1)
            pytest.fail("it may go on for ever")
        except ConnectionError:
            assert cut_off(server, "body") >= before + 1
    lives(server)


def test_a_client_that_reads_nothing_is_cut_off_and_holds_no_memory(serve: Callable[..., Running]) -> None:
    server = serve(is_driven=True, write_timeout_s=1.0, cache="off")
    before = cut_off(server, "write")
    with connected(server, buffer=4096) as connection:
        body = json.dumps(chat(stream=True)).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        until(lambda: not server.engine.asked.empty())
        script = server.engine.asked.get_nowait()
        until(lambda: server.engine.running == 1)
        for _ in range(100):
            server.engine.loop.call_soon_threadsafe(script.say, "x" * 4000)
        until(lambda: cut_off(server, "write") >= before + 1)
        until(lambda: server.engine.running == 0)  # nobody else wants it: the engine is free
        assert script.was_aborted


def test_a_slow_reader_gets_all_of_it(serve: Callable[..., Running]) -> None:
    server = serve(is_driven=True, write_timeout_s=2.5, cache="off")
    with connected(server, buffer=65536) as connection:
        body = json.dumps(chat(stream=True)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(f"{head}connection: close\r\n\r\n".encode() + body)
        until(lambda: not server.engine.asked.empty())
        script = server.engine.asked.get_nowait()
        for _ in range(60):
            server.engine.loop.call_soon_threadsafe(script.say, "x" * 4000)
        server.engine.loop.call_soon_threadsafe(script.finish)
        said = b""
        while data := _received(connection):
            said += data
            time.sleep(0.03)
    assert b"data: [DONE]" in said
    assert said.count(b"x") > 240_000


def test_one_connection_too_many_is_refused(serve: Callable[..., Running]) -> None:
    server = serve(max_connections=5)
    held = [connected(server) for _ in range(5)]
    try:
        for connection in held:
            connection.sendall(GET + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with connected(server) as one_more:
            assert refused(all_of(one_more)) == (503, "too_many_connections")
    finally:
        for connection in held:
            connection.close()
    with server.client() as client:
        until(lambda: client.get("/healthz").status_code == 200)


def test_pipelined_requests_are_answered_in_their_order(server: Running) -> None:
    with connected(server) as connection:
        asked = [b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-request-id: n%d\r\n\r\n" % number for number in range(300)]
        connection.sendall(b"".join(asked) + b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = all_of(connection)
    assert re.findall(rb"x-request-id: (n\d+)", said) == [b"n%d" % number for number in range(300)]


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"content-length: +5\r\n",
        b"content-length : 5\r\n",
    ],
)
def test_a_request_of_two_lengths_is_not_http(server: Running, framing: bytes) -> None:
    """Two servers that read it differently would take one client's body for another's request."""
    with connected(server) as connection:
        connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\n" % PATH.encode() + framing + b"\r\n0\r\n\r\n")
        assert refused(all_of(connection)) == (400, "invalid_http")


def test_nobody_speaks_websocket(server: Running) -> None:
    with connected(server) as connection:
        upgrade = b"connection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        connection.sendall(b"GET /docs HTTP/1.1\r\nhost: x\r\n" + upgrade + b"sec-websocket-key: eHh4\r\n\r\n")
        assert not connection.recv(65536).startswith(b"HTTP/1.1 101")
