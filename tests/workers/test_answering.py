"""What a client gets does not depend on the process that its connection began in. A paused server shows who answers."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from app.gate.keys import KeyFile
from app.gate.limits import NONE_OF_ITS_OWN
from tests.conftest import chat, until
from tests.ledger.reading import records
from tests.sockets import post, received, request_bytes
from tests.workers.conftest import BOT, CHAT, HOT, WHOLE_WAY, House, access_lines


def raw(house: House, body: bytes, **headers: str) -> bytes:
    return post(CHAT, body, **(house.keys | headers))


def connected(house: House, receive_bytes: int | None = None) -> socket.socket:
    """A connection that a worker has accepted."""
    host, _, port = house.url.removeprefix("http://").partition(":")
    with house.server_paused():
        connection = socket.socket()
        connection.settimeout(20)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(raw(house, json.dumps(HOT).encode()))
        assert received(connection)[0][0] == 200
    return connection


# --- hits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
def test_a_workers_hit_is_the_servers_hit(house: House, stream: bool) -> None:
    body = HOT | {"stream": stream}
    with house.client() as client:
        with house.server_paused():
            by_worker = client.post(CHAT, json=body)
        by_server = client.post(CHAT, json=body, headers=WHOLE_WAY)
    assert by_worker.status_code == by_server.status_code == 200
    differ = {"date", "x-request-id", "server-timing", "age", "content-length", "transfer-encoding"}
    assert {name: by_worker.headers[name] for name in by_worker.headers if name not in differ} == {
        name: by_server.headers[name] for name in by_server.headers if name not in differ
    }
    assert set(by_worker.headers) - {"content-length"} == set(by_server.headers) - {
        "content-length",
        "transfer-encoding",
    }
    assert by_worker.headers["x-request-id"] != by_server.headers["x-request-id"]
    nameless = [re.sub(r'"(id|created)":("[^"]*"|\d+)', "", each.text) for each in (by_worker, by_server)]
    assert nameless[0] == nameless[1]


def test_what_redis_has_a_worker_answers_the_first_time_too(house: House) -> None:
    body = chat("recorded by the server", model=BOT, max_tokens=4)
    with house.client_of_a_worker() as client:
        assert client.post(CHAT, json=body, headers=WHOLE_WAY).headers["x-cache"] == "miss"
    with house.client() as client, house.server_paused():
        assert client.post(CHAT, json=body).headers["x-cache"] == "hit"


def test_hot_hits_are_answered_while_the_server_stands_still(house: House) -> None:
    def asked(_: int) -> str:
        return house.ask().headers["x-cache"]

    with house.server_paused(), ThreadPoolExecutor(8) as pool:
        assert set(pool.map(asked, range(40))) == {"hit"}


# --- what is no hit ---------------------------------------------------------------------------------


def test_a_key_with_limits_is_counted_by_the_server(house: House) -> None:
    limits = NONE_OF_ITS_OWN.changed({"rpm": "2"})
    secret, _ = KeyFile(house.home / "keys.json").create("shop", limits=limits)
    limited = {"authorization": f"Bearer {secret}"}
    with house.client_of_a_worker() as client:
        until(lambda: client.post(CHAT, json=HOT, headers=limited).status_code == 200)
        second = client.post(CHAT, json=HOT, headers=limited)
        assert (second.headers["x-cache"], second.headers["x-ratelimit-remaining-requests"]) == ("hit", "0")
        assert client.post(CHAT, json=HOT, headers=limited).json()["error"]["code"] == "rate_limit_exceeded"


def test_a_connection_goes_to_the_server_for_a_miss_and_comes_back(house: House) -> None:
    with connected(house) as connection:
        for number in range(5):
            body = chat(f"there and back {number}", model=BOT, max_tokens=4)
            connection.sendall(raw(house, json.dumps(body).encode()))
            ((_, headers, _),) = received(connection)
            assert headers["x-cache"] == "miss"
            until(lambda: house.is_with_a_worker(connection), every_s=0.1)


def test_the_official_client_notices_nothing(house: House) -> None:
    """Miss, stream, hit, refusal, other routes: all on one connection that began in a worker."""
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key=house.secret, http_client=house.client()) as client:
        with house.server_paused():
            client.chat.completions.create(**HOT)
        question = {"model": BOT, "messages": [{"role": "user", "content": "official"}], "max_tokens": 7}
        whole = client.chat.completions.create(**question, temperature=0).choices[0].message.content
        for _ in range(2):
            chunks = list(client.chat.completions.create(**question, temperature=0, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        sampled = client.chat.completions.create(**question, temperature=1, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in sampled][-1] == "length"
        assert client.responses.create(model=BOT, input="hi", max_output_tokens=5).output_text
        assert [model.id for model in client.models.list()] == [BOT]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(**question | {"model": "nobody"})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**question, extra_body={"stream": "yes"})


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, None),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"authorization": "Bearer nobody"}, 401, "invalid_api_key"),
        (json.dumps(HOT | {"model": "nobody"}).encode(), {}, 404, "model_not_found"),
        (json.dumps(chat("absent", model=BOT)).encode(), {"cache-control": "only-if-cached"}, 504, "not_cached"),
        (b"", {"content-length": str(2**24), "expect": "100-continue"}, 413, "request_too_large"),
        (b'{"model":', {"content-length": "100"}, 408, "request_timeout"),
        (b"", {"content-length": "many"}, 400, "invalid_http"),
    ],
)
def test_every_refusal_is_the_servers(
    house: House, content: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    before = house.metric(f'refrain_http_responses_total{{status="{status}"')
    with connected(house) as connection:
        connection.sendall(raw(house, content, **headers))
        ((found, told, body),) = received(connection)
    assert found == status
    error = json.loads(body)
    assert code is None or error["error"]["code"] == code
    assert error["request_id"] == told["x-request-id"]
    if code != "invalid_http":  # that is no request, and nobody counts it
        assert house.metric(f'refrain_http_responses_total{{status="{status}"') == before + 1, "once, not twice"


def test_a_body_is_waited_for_by_the_server(house: House) -> None:
    request = raw(house, json.dumps(HOT).encode())
    with connected(house) as connection:
        connection.sendall(request[:-5])
        time.sleep(0.4)  # longer than a worker has patience
        connection.sendall(request[-5:])
        ((status, headers, _),) = received(connection)
    assert (status, headers["x-cache"]) == (200, "hit")


def test_a_long_body_goes_over_whole(house: House) -> None:
    body = chat("long " * 40_000, model=BOT, max_tokens=2)
    with house.client_of_a_worker() as client:
        assert [client.post(CHAT, json=body).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]


@pytest.mark.parametrize("cut", [1, 40, -1], ids=["first byte", "in the head", "last byte"])
def test_a_request_in_pieces_is_a_hit_all_the_same(house: House, cut: int) -> None:
    request = raw(house, json.dumps(HOT).encode())

    def is_answered() -> bool:
        """By a worker, which it is where less than a worker's patience lies between the pieces."""
        with connected(house) as connection:
            with house.server_paused():
                connection.sendall(request[:cut])
                time.sleep(0.02)  # so that they arrive apart
                connection.sendall(request[cut:])
                is_there = bool(select.select([connection], [], [], 2)[0])
            assert received(connection)[0][1]["x-cache"] == "hit"
        return is_there

    until(is_answered)


def test_who_asks_without_waiting_gets_answers_in_order(house: House) -> None:
    hot, cold = json.dumps(HOT).encode(), json.dumps(chat("pipelined", model=BOT, max_tokens=5)).encode()
    with connected(house) as connection:
        connection.sendall(
            b"".join(
                raw(house, body, **{"x-request-id": name})
                for body, name in ((hot, "a"), (cold, "b"), (hot, "c"), (hot, "d"))
            )
        )
        found = [(headers["x-request-id"], headers["x-cache"]) for _, headers, _ in received(connection, 4)]
    assert found == [("a", "hit"), ("b", "miss"), ("c", "hit"), ("d", "hit")]


def test_a_client_that_reads_late_gets_all_of_it_in_order(house: House) -> None:
    """What a worker has not got rid of yet must be out before the server writes on the same connection."""
    long, cold = (chat(text, model=BOT, max_tokens=90) for text in ("long", "read late"))
    hot = json.dumps(long | {"stream": True}).encode()
    until(lambda: house.ask(long).headers["x-cache"] == "hit")
    with connected(house, receive_bytes=4096) as connection:
        for number in range(120):  # more than the kernel keeps for them
            connection.sendall(raw(house, hot, **{"x-request-id": f"n{number}"}))
            time.sleep(0.001)  # each a request of its own
        connection.sendall(raw(house, json.dumps(cold).encode(), **{"x-request-id": "cold"}))
        time.sleep(0.3)
        found = received(connection, 121)
    assert [headers["x-request-id"] for _, headers, _ in found] == [*(f"n{number}" for number in range(120)), "cold"]
    assert {content.count(b"data: ") for _, _, content in found[:-1]} == {found[0][2].count(b"data: ")}
    assert found[-1][1]["x-cache"] == "miss"


def test_a_client_that_leaves_frees_the_engine(house: House) -> None:
    left = house.metric("refrain_clients_left_total")
    slow = chat("leaving", model=BOT, max_tokens=500, stream=True) | {"cache": {"no_store": True}}
    with house.client_of_a_worker() as client, client.stream("POST", CHAT, json=slow) as response:
        lines = response.iter_lines()
        next(lines)
        assert house.metric("refrain_generations_in_flight ") == 1
    until(lambda: house.metric("refrain_generations_in_flight ") == 0)
    until(lambda: house.metric("refrain_clients_left_total") == left + 1)


def test_a_stream_that_was_cut_is_gone_on_with(house: House) -> None:
    question = chat("cut off", model=BOT, max_tokens=300, stream=True)
    with house.client_of_a_worker() as client, client.stream("POST", CHAT, json=question) as response:
        lines = response.iter_lines()
        seen = next(line[4:] for line in lines if line.startswith("id: "))
    with house.client_of_a_worker() as client:
        again = client.post(CHAT, json=question, headers={"last-event-id": seen})
    assert again.status_code == 200
    assert "data: [DONE]" in again.text


# --- counted and logged once ------------------------------------------------------------------------


def test_what_all_processes_count_is_added_up_and_logged_once(house: House) -> None:
    names = (
        'refrain_calls_total{cache="hit"',
        'refrain_calls_total{cache="miss"',
        'refrain_calls_total{cache="bypass"',
        "refrain_cache_bypass_total",
        'refrain_call_seconds_count{cache="hit"}',
        'refrain_tokens_saved_total{kind="completion"',
    )
    before = [house.metric(name) for name in names]
    marked = {"x-request-id": "counted.once"}
    with house.client_of_a_worker() as client:
        client.post(CHAT, json=HOT, headers=marked)
        client.post(CHAT, json=HOT, headers=marked | WHOLE_WAY)
        client.post(CHAT, json=chat("counted", model=BOT), headers=marked)
        client.post(CHAT, json=chat("counted", model=BOT, temperature=1), headers=marked)
    hits = 3  # with the one that opened the connection
    assert [house.metric(name) - was for name, was in zip(names, before, strict=True)] == [hits, 1, 1, 1, hits, 18]
    until(lambda: sum("counted.once" in line for line in access_lines(house)) == 4)


def test_a_purge_is_seen_at_once(house: House) -> None:
    body = chat("purged", model=BOT, max_tokens=3)
    with house.client_of_a_worker() as client:
        assert [client.post(CHAT, json=body).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]
        assert client.post("/admin/cache/purge", json={"model": BOT}).json()["purged"] > 0

    # Redis tells each process by a connection of its own; nobody waits for that.
    def is_a_miss() -> bool:
        asked = house.ask(body | {"cache": {"only_if_cached": True}})
        return asked.status_code == 504

    until(is_a_miss)
    assert house.ask(**WHOLE_WAY).status_code == 200  # as it was, for the others: in Redis again


def test_connections_are_counted_as_they_go(house: House) -> None:
    before = house.metric("refrain_connections_handed_total")
    with connected(house) as connection:
        connection.sendall(request_bytes("GET", "/v1/models", b"", **house.keys))
        assert received(connection)[0][0] == 200
        until(lambda: house.is_with_a_worker(connection), every_s=0.1)
    assert house.metric("refrain_connections_handed_total") >= before + 2
    assert httpx.get(f"{house.url}/healthz").json() == {"status": "alive"}


def test_a_workers_hits_are_in_the_usage_ledger(house: House) -> None:
    names = [f"in.the.ledger.{number}" for number in range(4)]
    with house.client_of_a_worker() as client, house.server_paused():
        for name in names:
            assert client.post(CHAT, json=HOT, headers={"x-request-id": name}).headers["x-cache"] == "hit"

    def hits() -> list[str]:
        return [each.id for each in records(house.home, kind="call") if each.cache == "hit" and each.id in names]

    assert sorted(until(lambda: found if len(found := hits()) >= 4 else None)) == names
