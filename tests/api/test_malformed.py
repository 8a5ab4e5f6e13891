"""A thousand bodies that nobody should send: each gets an error object, and the server goes on."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator

import psutil
import pytest

from app.domain import Endpoint
from tests.conftest import Running, chat

COUNT = 1000
JSON = {"content-type": "application/json"}
WRONG = (
    None,
    True,
    -1,
    1e308,
    "x",
    [],
    {},
    [[]],
    {"a": {}},
    "\u0000",
    2**63,
    2**70,
    -0.0,
    ["x", 1, None],
    {"type": "no"},
)
FIELDS = (
    "messages model temperature top_p n stream stop seed max_tokens logprobs top_logprobs tools tool_choice logit_bias "
    "response_format stream_options prompt input system cache presence_penalty user metadata priority"
).split()


def malformed(seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and bytes, without end; the same for the same seed."""
    chance = random.Random(seed)
    good = json.dumps(chat("hello", max_tokens=2)).encode()
    while True:
        depth = chance.choice([65, 500, 5_000, 100_000])
        cut = chance.randrange(1, len(good))
        digits = chance.choice([20, 400, 4_400])
        field = chance.choice(FIELDS)
        flipped = bytearray(good)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        yield from {
            "cut": good[:cut],
            "flipped": bytes(flipped),
            "deep arrays": b'{"messages":' + b"[" * depth + b"]" * depth + b"}",
            "deep objects": b'{"a":' * depth + b"1" + b"}" * depth,
            "never closed": b'{"messages":' + b"[" * depth,
            "huge number": b'{"model":"scripted","messages":[],"seed":' + b"9" * digits + b"}",
            "huge float": b'{"model":"scripted","messages":[],"temperature":1e%d}' % chance.choice([400, 999, 99_999]),
            "not a number": b'{"temperature":%b}' % chance.choice([b"NaN", b"Infinity", b"-Infinity"]),
            "bad utf-8": b'{"model":"' + bytes(chance.randrange(128, 256) for _ in range(8)) + b'"}',
            "lone surrogate": b'{"model":"scripted","messages":[{"role":"user","content":"\\ud800"}]}',
            "null byte": good[:cut] + b"\x00" + good[cut:],
            "byte order mark": b"\xef\xbb\xbf" + good,
            "gzip": gzip.compress(good),
            "noise": chance.randbytes(chance.randrange(1, 300)),
            "not an object": chance.choice([b"[]", b'"x"', b"1", b"null", b"true", b""]),
            "twice the same name": b'{"model":1,' + good[1:-1] + b',"messages":7}',
            f"wrong {field}": json.dumps(chat(max_tokens=2) | {field: chance.choice(WRONG)}).encode(),
            f"wrong message in {field}": json.dumps(chat(max_tokens=2) | {"messages": [chance.choice(WRONG)]}).encode(),
        }.items()


def test_a_thousand_malformed_bodies_get_an_error_object_each(server: Running) -> None:
    """2xx only where the body is in fact a call (a flipped letter in the prompt); never 5xx, never a hang."""
    memory = psutil.Process().memory_info().rss
    refused = 0
    with server.client(headers=JSON) as client:
        for number, (name, body) in zip(range(COUNT), malformed(seed=7), strict=False):
            path = list(Endpoint)[number % len(Endpoint)].value
            response = client.post(path, content=body)
            assert response.status_code < 500, (name, path, response.text[:300])
            if response.status_code >= 400:
                refused += 1
                error = response.json()["error"]
                assert error["message"], name
                assert error["type"], name
            elif response.headers["content-type"] == "application/json":
                response.json()
        good = client.post(Endpoint.CHAT.value, json=chat())
    assert good.status_code == 200
    assert refused > COUNT * 0.8
    assert psutil.Process().memory_info().rss - memory < 300 * 2**20


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_are_refused_and_the_server_goes_on(server: Running, chunked: bool) -> None:
    body = json.dumps(chat("x" * 10_000_000)).encode()
    content = (body[at : at + 65536] for at in range(0, len(body), 65536)) if chunked else body
    with server.client(headers=JSON) as client:
        response = client.post(Endpoint.CHAT.value, content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert client.post(Endpoint.CHAT.value, json=chat()).status_code == 200
